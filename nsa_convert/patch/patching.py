"""Patching a model in memory, its inverse, and switches on converted models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from nsa_convert.config import SparseAttentionConfig
from nsa_convert.errors import ConfigError, UnsupportedModelError
from nsa_convert.families import ModelFamily, check_config, family_of, geometry_of
from nsa_convert.methods.parts.base import SparseMethod
from nsa_convert.methods.parts.gates import BranchGate
from nsa_convert.methods.parts.mix import leaves_of, methods_in
from nsa_convert.patch.attention import SparseAttention
from nsa_convert.patch.model_classes import adopt_class
from nsa_convert.patch.modeling import install_sparse_attention
from nsa_convert.patch.models import config_class, model_classes
from nsa_convert.plan import copy_dense_rows, resolve_plan, sparse_config_dict


def patch_model(
    model: PreTrainedModel,
    sparse: str | Mapping[str, Any] | SparseAttentionConfig,
    **settings: Any,
) -> PreTrainedModel:
    """Turn a dense model in memory into the converted model, in place; the inverse is unpatch_model.

    The dense weights stay the same tensors; new parameters get their initial values, in the dtype and on the
    device of the layer they join.

    Args:
        model: A dense model of a supported family: the causal language model, the decoder alone, or one with
            another head.
        sparse: The plan, a :class:`SparseAttentionConfig` or the mapping that it is read from
            (``{"default": {...}, "rules": [...]}``); or one method for all layers, by name or as a mapping
            with ``method`` and its settings.
        **settings: Settings of a method given by name.

    Returns:
        The same object, now of the converted class.

    Raises:
        UnsupportedModelError: The architecture is not supported, or the weights are quantised.
        ConfigError: The plan does not fit the model, or the model has sliding windows or another RoPE than
            sparse layers know.
    """
    # Check everything before anything is changed.
    plan = _read_plan(sparse, settings)
    family = family_of(model.config.to_dict())
    _refuse_quantised(model)
    check_config(model.config.to_dict())
    model_class = _class_for(model, family)
    decoder = model.base_model
    geometry = geometry_of(model.config.to_dict(), family)
    resolve_plan(plan, len(decoder.layers), geometry)
    plan = plan.resolved(len(decoder.layers), geometry.num_kv_heads)

    # Make the config, and keep what unpatch_model needs.
    config = config_class(family)(**_without_identity(sparse_config_dict(model.config.to_dict(), plan)))
    config.dtype = model.config.dtype
    attentions = [layer.self_attn for layer in decoder.layers]
    dense = (model.config, type(model), type(decoder), attentions)

    # Retype the objects and replace their attention layers.
    model.config = decoder.config = config
    adopt_class(model, model_class)
    if decoder is not model:
        adopt_class(decoder, model_classes(family)["Model"])
    install_sparse_attention(decoder)
    for layer, attention in zip(decoder.layers, attentions, strict=True):
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

    # Put the dense modules back, then classes and config.
    config, model_class, decoder_class, attentions = dense
    decoder = model.base_model
    for layer, attention in zip(decoder.layers, attentions, strict=True):
        attention.train(layer.training)
        layer.self_attn = attention
    decoder.__class__ = decoder_class
    model.__class__ = model_class
    model.config = decoder.config = config

    object.__delattr__(model, "_dense_state")
    return model


def _read_plan(
    sparse: str | Mapping[str, Any] | SparseAttentionConfig, settings: Mapping[str, Any]
) -> SparseAttentionConfig:
    """Return the plan that a call of :func:`patch_model` names."""
    # The name of a method.
    if isinstance(sparse, str):
        return SparseAttentionConfig.from_dict({"default": {**settings, "method": sparse}})

    if settings:
        raise ConfigError(
            f"settings ({', '.join(settings)}) go with the name of a method, as in patch_model(model, 'nsa', "
            "num_blocks=32); a plan holds its own",
            code="CF20",
        )

    # One method for all layers, or a plan; as a mapping or as it is.
    if isinstance(sparse, Mapping):
        return SparseAttentionConfig.from_dict({"default": sparse} if "method" in sparse else sparse)
    if not isinstance(sparse, SparseAttentionConfig):
        raise ConfigError(
            "the plan must be the name of a method, a mapping or a SparseAttentionConfig, "
            f"got {type(sparse).__name__}",
            code="CF20",
        )
    return sparse


def _refuse_quantised(model: PreTrainedModel) -> None:
    """Refuse weights that are no floating-point numbers, before anything is changed."""
    weights = model.named_parameters()
    packed = [name for name, p in weights if not p.is_floating_point() or p.element_size() < 2]

    if packed or getattr(model, "hf_quantizer", None) is not None:
        what = packed[0] if packed else type(model.hf_quantizer).__name__
        raise UnsupportedModelError(
            f"the weights of this model are quantised ({what}), and its layers cannot be replaced",
            code="CK36",
            where="model",
            hint="load it without quantization_config, patch it, and train or quantise it afterwards",
        )


def _class_for(model: PreTrainedModel, family: ModelFamily) -> type:
    """Return the converted class that takes the place of a model's own."""
    for ending, converted in model_classes(family).items():
        if type(model).__name__ == f"{family.class_prefix}{ending}":
            return converted

    known = ", ".join(f"{family.class_prefix}{ending}" for ending in model_classes(family))
    raise UnsupportedModelError(
        f"a {type(model).__name__} cannot be patched",
        code="CF12",
        where="model",
        expected=known,
        found=type(model).__name__,
        hint="patch the model inside a wrapper (PEFT, DDP, torch.compile) before it is wrapped",
    )


def sparse_methods(model: nn.Module) -> list[SparseMethod]:
    """Return the methods of a converted model, one per layer."""
    return [module.sparse for module in model.modules() if isinstance(module, SparseAttention)]


@contextlib.contextmanager
def with_full_budget(model: nn.Module, length: int) -> Iterator[None]:
    """Run every layer's sparse path with a budget that covers ``length`` tokens and gates that pass through.

    The output must then equal dense attention; ``verify`` relies on it.
    """
    methods = [inner for method in sparse_methods(model) for inner in methods_in(method)]
    gates = [module for module in model.modules() if isinstance(module, BranchGate)]

    for method in methods:
        method.forced_budget = length
    for gate in gates:
        gate.pass_through = True

    try:
        yield
    finally:
        for method in methods:
            method.forced_budget = None
        for gate in gates:
            gate.pass_through = False


def set_mode(model: nn.Module, mode: str) -> None:
    """Switch layers whose method has modes (SSA) between ``"sparse"`` and ``"full"`` attention.

    Raises:
        ValueError: The mode is neither, or no layer has modes.
    """
    if mode not in ("sparse", "full"):
        raise ValueError(f"mode must be 'sparse' or 'full', got {mode!r}")

    switchable: list[Any] = [leaf for leaf in leaves_of(sparse_methods(model)) if hasattr(leaf, "mode")]
    if not switchable:
        raise ValueError(
            "no layer of this model has a method with modes; NSA and streaming heads cannot run as full "
            "attention"
        )

    for method in switchable:
        method.mode = mode


def _without_identity(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("model_type", "transformers_version")}
