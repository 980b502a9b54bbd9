"""The memory of a training step, from a rehearsal on tensors that have shapes and no values.

A model of few layers goes through the forward and backward pass of a stage as the run would take it (losses,
adapters, autocast, checkpointing); every allocation is followed, and nothing is computed or held. Layers
alike add alike, so that few of each kind give the memory of any number. Inside of a kernel nothing is seen:
what the kernels of a GPU hold there is small, plain torch holds some tens of MB.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nsa_convert.config import SparseAttentionConfig
from nsa_convert.kernels.common.custom_ops import whole_operators
from nsa_convert.methods.parts.selection import NO_REUSE
from nsa_convert.patch.models import config_class, model_classes
from nsa_convert.patch.patching import sparse_methods
from nsa_convert.training.losses import stage_losses
from nsa_convert.training.recipe.schema import Recipe, Stage
from nsa_convert.training.run.models import DTYPES, Start, prepare_model
from nsa_convert.training.run.parallel import Parallel

FEW = 2
"""Layers of a kind in the smallest rehearsal; one more of it tells what each of the others adds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes that a step takes beside weights, gradients and the optimizer's state.

    Attributes:
        fixed: Of the head, and of the layer at work.
        layer: Kept for the backward pass by each layer.
        layers: Number of layers.
    """

    fixed: int
    layer: int
    layers: int

    @property
    def peak(self) -> int:
        """When all layers have run."""
        return self.fixed + self.layers * self.layer

    @property
    def last(self) -> int:
        """When the backward pass has come to the first layer, and every gradient is there."""
        return self.fixed + self.layer


def step_memory(
    recipe: Recipe, stage: Stage, start: Start, parallel: Parallel, *, micro_batch: int | None = None
) -> StepMemory:
    """Return what one micro-batch of a stage takes on one device.

    Args:
        recipe: The recipe.
        stage: One of its stages.
        start: The model it starts from.
        parallel: How the processes share the work.
        micro_batch: Rows of the micro-batch; those of the stage when left out.
    """
    rows = stage.micro_batch if micro_batch is None else micro_batch
    layers = start.config["num_hidden_layers"]

    # A few of each kind of layer tell of all. Where most layers are a kind of their own, all are rehearsed.
    kinds = _layer_kinds(start)
    firsts = sorted(layer for kind in kinds for layer in kind[:FEW])
    work = len(firsts) + sum(len(firsts) + 1 for kind in kinds if len(kind) > FEW)
    if layers <= len(firsts) + 1 or (len(kinds) > 1 and work > layers):
        with _no_values():
            return StepMemory(
                fixed=_rehearse(recipe, stage, start, parallel, rows, range(layers)), layer=0, layers=0
            )

    with _no_values():
        less = _rehearse(recipe, stage, start, parallel, rows, firsts)
        rest = 0
        for kind in kinds:
            if len(kind) > FEW:
                one_more = sorted([*firsts, kind[FEW]])
                more = _rehearse(recipe, stage, start, parallel, rows, one_more) - less
                rest += (len(kind) - FEW) * more
    layer = rest // (layers - len(firsts))
    fixed = less - len(firsts) * layer

    # Keys and values of a row's other processes: kept by each layer, or held by the one at work.
    others = _gathered_keys(recipe, stage, start, parallel, rows)
    if stage.checkpointing:
        return StepMemory(fixed=fixed + others, layer=layer, layers=layers)
    return StepMemory(fixed=fixed, layer=layer + others, layers=layers)


def _layer_kinds(start: Start) -> list[list[int]]:
    """Return the layers by what they run: those that the same rules of the plan cover are alike."""
    layers = start.config["num_hidden_layers"]
    if start.plan is None:
        return [list(range(layers))]

    plan = start.plan.resolved(layers, start.geometry.num_kv_heads)
    if any(rule.settings.get("reuse_from", NO_REUSE) != NO_REUSE for rule in (plan.default, *plan.rules)):
        return [[layer] for layer in range(layers)]  # a layer that names another one needs it there

    kinds: dict[tuple[int, ...], list[int]] = {}
    for layer in range(layers):
        covers = [i for i, rule in enumerate(plan.rules) if rule.layers is None or layer in rule.layers]
        kinds.setdefault(tuple(covers), []).append(layer)
    return list(kinds.values())


def _plan_of(start: Start, picked: Sequence[int]) -> SparseAttentionConfig | None:
    """Return the plan of a model that has some layers of the start alone."""
    if start.plan is None:
        return None
    plan = start.plan.resolved(start.config["num_hidden_layers"], start.geometry.num_kv_heads)
    rules = []
    for rule in plan.rules:
        if rule.layers is None:
            rules.append(rule)
        elif places := tuple(place for place, layer in enumerate(picked) if layer in rule.layers):
            rules.append(dataclasses.replace(rule, layers=places))
    return dataclasses.replace(plan, rules=tuple(rules))


def _gathered_keys(recipe: Recipe, stage: Stage, start: Start, parallel: Parallel, rows: int) -> int:
    """Return the bytes of keys and values that a layer gathers from the others that share its rows."""
    g = start.geometry
    others = stage.seq_len - stage.seq_len // parallel.context
    return rows * others * 2 * g.num_kv_heads * g.head_dim * (4 if recipe.precision == "fp32" else 2)


@contextlib.contextmanager
def _no_values() -> Iterator[None]:
    """Let tensors made inside the block have shapes and no values, and attention be one operator each."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), whole_operators():
        yield


def _rehearse(
    recipe: Recipe, stage: Stage, start: Start, parallel: Parallel, rows: int, picked: Sequence[int]
) -> int:
    """Return the largest number of bytes that a step of a model of some of the layers has at once."""
    start = dataclasses.replace(start, plan=_plan_of(start, picked))
    with torch.device("meta"):
        model = _model(start, parallel, len(picked), DTYPES[recipe.precision])
        methods = sparse_methods(model)
        model = prepare_model(model, stage)

    _move_to_cpu(model)

    # Gradients are there already, from the micro-batch before: those of this one are added to them.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)

    ids = torch.zeros(rows, stage.seq_len // parallel.context, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids}
    losses = stage_losses(stage, methods, recipe.seed, 0)

    followed = Allocations(tensor for p in model.parameters() for tensor in (p, p.grad) if tensor is not None)
    with followed:
        mixed = recipe.precision != "fp32"
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed, cache_enabled=False):
            if methods:
                # Both streams of a method that trains both ways take a turn; the sparse one takes more.
                mode = dataclasses.replace(losses.mode(0), stream="teacher" if losses.teacher else "sparse")
                mode = dataclasses.replace(mode, teacher_kl=losses.teacher_kl)
                loss = losses.run(model, batch, mode).loss
            else:
                loss = model(**batch, use_cache=False).loss
        loss.backward()
    return followed.peak


def _model(start: Start, parallel: Parallel, layers: int, dtype: torch.dtype) -> Any:
    """Return a model of the start's sizes with fewer layers, and a process's part of the heads."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = shallow_config(start.config, layers)
    if parallel.tensor > 1:
        values["head_dim"] = start.geometry.head_dim
        for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            values[key] //= parallel.tensor

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model_type = values.pop("model_type")
        if start.plan is None:
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values)).train()
        config = config_class(start.family)(**{**values, "sparse_attention": start.plan.to_dict()})
        return model_classes(start.family)["ForCausalLM"](config).train()
    finally:
        torch.set_default_dtype(before)


def _move_to_cpu(model: nn.Module) -> None:
    """Put tensors of a CPU, without values, in the place of those of the meta device, unseen by autocast."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            other = nn.Parameter(torch.empty_like(weight, device="cpu"), weight.requires_grad)
            module._parameters[name] = moved.setdefault(id(weight), other)  # tied ones stay tied
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device="cpu")


def shallow_config(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Return a config.json's values for a model of some layers, without what is no argument of a config."""
    values = dict(config)
    for key in ("transformers_version", "auto_map", "architectures", "dtype", "torch_dtype"):
        values.pop(key, None)
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][:layers]
    return {**values, "num_hidden_layers": layers}


class Allocations(TorchDispatchMode):
    """Follows how many bytes the tensors have that were made inside the block.

    Attributes:
        now: Bytes at this moment.
        peak: Most bytes at once.

    Args:
        known: Tensors that do not count: they were there before.
    """

    def __init__(self, known: Iterator[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Values are asked for where something is checked (is all finite?): it is.
        if func is torch.ops.aten._local_scalar_dense.default:
            return args[0].dtype == torch.bool or 1

        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._follow(x.untyped_storage())
        return out

    def _follow(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key)
