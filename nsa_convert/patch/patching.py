"""Patching a model in memory, its inverse, and switches on converted models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from nsa_convert.config import SparseAttentionConfig
from nsa_convert.methods.base import SparseMethod
from nsa_convert.methods.gates import BranchGate
from nsa_convert.patch.attention import SparseAttention
from nsa_convert.patch.families import family_of, geometry_of
from nsa_convert.patch.modeling import adopt_class, install_sparse_attention
from nsa_convert.patch.models import classes_of
from nsa_convert.patch.plan import copy_dense_rows, resolve_plan, sparse_config_dict
from nsa_convert.patch.registration import register


def patch_model(model: PreTrainedModel, sparse: SparseAttentionConfig) -> PreTrainedModel:
    """Turn a dense causal model in memory into the converted model, in place; the inverse is unpatch_model.

    The dense weights stay the same tensors; new parameters get their initial values, in the dtype and on the
    device of the layer they join.

    Args:
        model: A dense causal language model of a supported family.
        sparse: The plan.

    Returns:
        The same object, now of the converted class.

    Raises:
        UnsupportedModelError: The architecture is not supported.
        ConfigError: The plan does not fit the model.
    """
    register()  # so that the Auto classes know the config of the patched model
    family = family_of(model.config.to_dict())
    config_class, model_class, lm_class = classes_of(family)
    geometry = geometry_of(model.config.to_dict(), family)
    resolve_plan(sparse, len(model.model.layers), geometry)
    sparse = sparse.resolved(len(model.model.layers), geometry.num_kv_heads)
    config = config_class(**_without_identity(sparse_config_dict(model.config.to_dict(), sparse)))
    dense = (
        model.config,
        type(model),
        type(model.model),
        [layer.self_attn for layer in model.model.layers],
    )
    config.dtype = model.config.dtype
    model.config = model.model.config = config
    adopt_class(model, lm_class)
    adopt_class(model.model, model_class)
    install_sparse_attention(model.model)
    for layer, attention in zip(model.model.layers, dense[3], strict=True):
        like = attention.q_proj.weight
        copy_dense_rows(layer.self_attn.sparse, attention.get_parameter)
        layer.self_attn.sparse.to(device=like.device, dtype=like.dtype)
        layer.self_attn.train(attention.training)
    object.__setattr__(model, "_dense_state", dense)
    return model


def unpatch_model(model: PreTrainedModel) -> PreTrainedModel:
    """Undo :func:`patch_model` in place; the new parameters are dropped.

    Raises:
        ValueError: The model was not patched in memory.
    """
    dense = getattr(model, "_dense_state", None)
    if dense is None:
        raise ValueError(
            "this model was not made by patch_model; load the dense checkpoint, or revert the converted one"
        )
    config, lm_class, model_class, layers = dense
    for layer, attention in zip(model.model.layers, layers, strict=True):
        attention.train(layer.training)
        layer.self_attn = attention
    model.__class__, model.model.__class__ = lm_class, model_class
    model.config = model.model.config = config
    object.__delattr__(model, "_dense_state")
    return model


def sparse_methods(model: nn.Module) -> list[SparseMethod]:
    """Return the methods of a converted model, one per layer."""
    return [module.sparse for module in model.modules() if isinstance(module, SparseAttention)]


@contextlib.contextmanager
def with_full_budget(model: nn.Module, length: int) -> Iterator[None]:
    """Run every layer's sparse path with a budget that covers ``length`` tokens and gates that pass through.

    The output must then equal dense attention; ``verify`` relies on it.
    """
    methods = [leaf for method in sparse_methods(model) for leaf in method.leaves()]
    gates = [module for method in methods for module in method.modules() if isinstance(module, BranchGate)]
    for method in methods:
        method.cover = length
    for gate in gates:
        gate.pass_through = True
    try:
        yield
    finally:
        for method in methods:
            method.cover = None
        for gate in gates:
            gate.pass_through = False


def set_mode(model: nn.Module, mode: str) -> None:
    """Switch layers whose method has modes (SSA) between ``"sparse"`` and ``"full"`` attention.

    Raises:
        ValueError: The mode is neither, or no layer has modes.
    """
    if mode not in ("sparse", "full"):
        raise ValueError(f"mode must be 'sparse' or 'full', got {mode!r}")
    leaves = [leaf for method in sparse_methods(model) for leaf in method.leaves()]
    switchable = [leaf for leaf in leaves if hasattr(leaf, "mode")]
    if not switchable:
        raise ValueError(
            "no layer of this model has a method with modes; NSA and streaming heads cannot run as full "
            "attention"
        )
    for method in switchable:
        method.mode = mode


def _without_identity(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("model_type", "transformers_version")}
