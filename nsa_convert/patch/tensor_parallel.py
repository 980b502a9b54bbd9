"""Tensor parallel on transformers' engine: the plan for the new weights, whose rows belong to heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from nsa_convert.methods.parts.base import SparseMethod
from nsa_convert.methods.parts.registry import parallel_problems
from nsa_convert.patch.attention import SparseAttention
from nsa_convert.patch.collectives import Processes
from nsa_convert.settings import raise_problems

HEAD_STYLE = "nsa_heads"


def tensor_problems(methods: Sequence[SparseMethod], config: Mapping[str, Any], size: int) -> list[str]:
    """Return why ``size`` processes cannot share the heads of the layers."""
    problems = parallel_problems("tensor", methods, "tensor parallel")

    if any(m.cache_needs().extra_head_sets for m in methods):
        problems.append("tensor parallel needs branch_kv shared, not independent")
    if any(m.cache_needs().key_taps > 1 for m in methods):
        problems.append("tensor parallel needs key_conv 0")

    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    if heads % size:
        problems.append(
            f"tensor parallel of {size} processes has to divide the {heads} key/value heads of a layer"
        )

    return problems


def tensor_plan(model: nn.Module) -> dict[str, str]:
    """Return the styles of the new weights: the first dimension of each counts heads."""
    plan = {}
    for name, module in model.named_modules():
        if ".self_attn.sparse." not in f"{name}." or not list(module.parameters(recurse=False)):
            continue

        # transformers' plans stand for all layers at once: `*` in the place of the layer's number.
        parts = name.split(".")
        parts[parts.index("layers") + 1] = "*"
        plan[".".join(parts)] = HEAD_STYLE
        for parameter, _ in module.named_parameters(recurse=False):
            plan[".".join([*parts, parameter])] = HEAD_STYLE

    return plan


def prepare_heads(model: Any, size: int) -> None:
    """Add the new weights to the plan by which transformers cuts a model among ``size`` processes.

    Raises:
        ConfigError: A method whose heads cannot live in different processes.
    """
    methods = [layer.self_attn.sparse for layer in model.base_model.layers]
    raise_problems(tensor_problems(methods, model.config.to_dict(), size), code="RC09")

    register_head_style()
    model._tp_plan = {**model._tp_plan, **tensor_plan(model)}


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
            whole = module.get_parameter(param)
            module._parameters[param] = nn.Parameter(
                distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None),
                requires_grad=whole.requires_grad,
            )

        def transform_inputs_pre_forward(self, module: nn.Module, args: Any, kwargs: Any, mesh: Any) -> Any:
            if not hasattr(module, "open_branches"):  # a compressor reads local heads
                return args, kwargs
            return (Processes(tensor_group(mesh)).sum_gradient(args[0]), *args[1:]), kwargs

    engine.ALL_PARALLEL_STYLES.register(HEAD_STYLE, HeadParallel())


def tensor_group(mesh: Any) -> Any:
    """Return the processes that share the heads; since 5.19 transformers keeps torch's mesh in an object."""
    if hasattr(mesh, "get_mesh"):
        mesh = mesh.get_mesh("tp")
    return mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")


def share_heads(model: nn.Module, mesh: Any) -> None:
    """Let the auxiliary losses of a tensor-parallel model be means over the heads of all processes."""
    group = Processes(tensor_group(mesh))
    for module in model.modules():
        if isinstance(module, SparseAttention):
            module.loss_group = group
