"""Several processes for one model: FSDP2, tensor parallel and context parallel, on engines that exist.

FSDP2 and tensor parallel are transformers' own (``DistributedConfig``); what is ours is the plan for the new
weights, whose rows belong to heads, and the sums that a loss over local heads needs. Context parallel splits
the tokens of a row: queries stay local, keys and values are gathered, so a layer sees the layout it knows, a
run of queries at an offset among all keys.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nsa_convert.errors import ConfigError, NsaConvertError
from nsa_convert.methods.base import SparseMethod
from nsa_convert.patch.attention import SparseAttention
from nsa_convert.patch.collectives import sum_gradient
from nsa_convert.patch.loading import load_causal_model, safe_config

T = TypeVar("T")

HEAD_STYLE = "nsa_heads"
TENSOR_PARALLEL_METHODS = ("nsa", "ssa", "full")


def tensor_parallel_problems(methods: list[SparseMethod], size: int) -> list[str]:
    """Return why these methods cannot share their heads among ``size`` processes."""
    problems = []
    for name in sorted({m.spec.name for m in methods} - set(TENSOR_PARALLEL_METHODS)):
        problems.append(f"tensor_parallel knows {', '.join(TENSOR_PARALLEL_METHODS)}, not {name}")
    if any(m.extra_head_sets() for m in methods):
        problems.append("tensor_parallel needs branch_kv shared")
    heads = {m.geometry.num_kv_heads for m in methods}
    if any(count % size for count in heads):
        problems.append(f"{sorted(heads)} key/value heads cannot be shared by {size} processes")
    return problems


def tensor_plan(model: nn.Module) -> dict[str, str]:
    """Return the styles of the new weights: the first dimension of each counts heads."""
    plan = {}
    for name, module in model.named_modules():
        if ".self_attn.sparse." not in f"{name}." or not list(module.parameters(recurse=False)):
            continue
        parts = name.split(".")
        parts[parts.index("layers") + 1] = "*"
        plan[".".join(parts)] = HEAD_STYLE
        for parameter, _ in module.named_parameters(recurse=False):
            plan[".".join([*parts, parameter])] = HEAD_STYLE
    return plan


def register_head_style() -> None:
    """Teach transformers to shard a module by the heads its weights' first dimension counts."""
    from torch.distributed.tensor import Shard, distribute_tensor
    from transformers.distributed import tensor_parallel as engine

    if HEAD_STYLE in engine.ALL_PARALLEL_STYLES:
        return

    class HeadParallel(engine.TensorParallelLayer):
        """Weights ``[heads * n, ...]`` sharded by head; the module runs on its local ones."""

        def should_use_local_tensors(self, module: nn.Module) -> bool:
            return True

        def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
            whole = module._parameters[param]
            module._parameters[param] = nn.Parameter(
                distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None),
                requires_grad=whole.requires_grad,
            )

        def transform_inputs_pre_forward(self, module: nn.Module, args: Any, kwargs: Any, mesh: Any) -> Any:
            if not hasattr(module, "open_branches"):  # a compressor reads local heads
                return args, kwargs
            group = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")
            return (sum_gradient(args[0], group), *args[1:]), kwargs

    engine.ALL_PARALLEL_STYLES.register(HEAD_STYLE, HeadParallel())


def distributed_config(plain: nn.Module, *, fsdp: int = 1, tensor_parallel: int = 1) -> Any:
    """Return transformers' DistributedConfig for a converted model.

    Args:
        plain: The model on the meta device, for the names of its new weights.
        fsdp: Processes that share each weight.
        tensor_parallel: Processes that share each layer.

    Raises:
        ConfigError: A method cannot be shared that way.
    """
    from transformers.distributed import DistributedConfig

    methods = [m.sparse for m in plain.modules() if isinstance(m, SparseAttention)]
    values: dict[str, Any] = {"fsdp_size": fsdp, "tp_size": tensor_parallel}
    if tensor_parallel > 1:
        problems = tensor_parallel_problems(methods, tensor_parallel)
        if problems:
            raise ConfigError("; ".join(problems), code="RC09")
        register_head_style()
        values["tp_plan"] = tensor_plan(plain)
    return DistributedConfig(**values)


def join_processes() -> None:
    """Join the processes that torchrun or accelerate started."""
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def from_main(work: Callable[[], T]) -> T:
    """Return in every process what the main one computes, or raise the error it raises."""
    if not dist.is_initialized():
        return work()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = work()
        except NsaConvertError as error:
            box[1] = error
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


def load_sharded(folder: Path, dtype: torch.dtype, fsdp: int) -> nn.Module:
    """Load a checkpoint with every weight shared by ``fsdp`` processes."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(safe_config(folder))
    return load_causal_model(folder, dtype, distributed_config=distributed_config(plain, fsdp=fsdp))


def whole_optimizer_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Return the optimizer's state with whole tensors, by parameter name; every process has to call this."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    return get_optimizer_state_dict(
        model, inner, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )


def load_optimizer_state(model: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
    """Give an optimizer the state that :func:`whole_optimizer_state` returned, cut to this process's part."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    inner = getattr(optimizer, "optimizer", optimizer)
    set_optimizer_state_dict(model, inner, state, options=StateDictOptions(full_state_dict=True))


def share_heads(model: nn.Module, group: Any) -> None:
    """Let the auxiliary losses of a tensor-parallel model be means over the heads of all processes."""
    for layer in _layers(model):
        layer.loss_group = group


def share_tokens(model: nn.Module, group: Any) -> None:
    """Let the layers of a model attend across the processes of a group, each with its run of every row."""
    for layer in _layers(model):
        layer.context_group = layer.loss_group = group
    model.base_model.context_group = group


def split_tokens(batch: dict[str, Tensor], group: Any) -> dict[str, Tensor]:
    """Return this process's run of every row, with the labels of the tokens that follow.

    Args:
        batch: ``input_ids`` and ``labels`` ``[B, T]``; one document a row.
        group: The context group; T must be a multiple of its size.

    Returns:
        ``input_ids``, ``position_ids`` (of the whole row) and ``shift_labels`` of this process.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    length = ids.shape[1] // size
    here = slice(rank * length, (rank + 1) * length)
    following = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return {
        "input_ids": ids[:, here],
        "position_ids": positions[:, here],
        "shift_labels": following[:, here].contiguous(),
    }


def _layers(model: nn.Module) -> list[SparseAttention]:
    return [module for module in model.modules() if isinstance(module, SparseAttention)]
