"""The plan of a conversion: which method runs in which layer, and the tensors that have to be added."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nsa_convert.config import AttentionGeometry, SparseAttentionConfig
from nsa_convert.errors import ConfigError
from nsa_convert.families import family_of, geometry_of
from nsa_convert.methods.parts.base import SparseMethod
from nsa_convert.methods.parts.mix import leaves
from nsa_convert.methods.parts.registry import build_layer, read_rule
from nsa_convert.methods.parts.selection import NO_REUSE
from nsa_convert.settings import raise_problems

AUTO_CLASSES = {
    "AutoModel": "Model",
    "AutoModelForCausalLM": "ForCausalLM",
    "AutoModelForSequenceClassification": "ForSequenceClassification",
    "AutoModelForTokenClassification": "ForTokenClassification",
    "AutoModelForQuestionAnswering": "ForQuestionAnswering",
}
"""transformers' Auto class -> ending of the names of a family's classes."""


def resolve_plan(
    sparse: SparseAttentionConfig, num_layers: int, geometry: AttentionGeometry
) -> list[SparseMethod]:
    """Check a plan against a model and return one method per layer, on the meta device.

    Args:
        sparse: The plan.
        num_layers: Layers of the model.
        geometry: Sizes of an attention layer.

    Returns:
        Methods without storage, for sizes, budgets and parameter shapes.

    Raises:
        ConfigError: A layer that does not exist, an unknown method or setting, a bad value; all problems of
            all rules at once.
    """
    # Whether the layers and heads exist, then each rule by itself.
    problems = []
    try:
        sparse = sparse.resolved(num_layers, geometry.num_kv_heads)
    except ConfigError as error:
        problems.append(str(error))
    for where, rule in [
        ("default", sparse.default),
        *((f"rules[{i}]", r) for i, r in enumerate(sparse.rules)),
    ]:
        try:
            read_rule(rule, where)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("; ".join(problems), code="CF22")

    # Whether the methods fit the model and each other.
    with torch.device("meta"):
        methods = [build_layer(sparse, geometry, i) for i in range(num_layers)]
    raise_problems(_reuse_problems(methods), code="CF22")
    return methods


def _reuse_problems(methods: list[SparseMethod]) -> list[str]:
    """Return what is wrong with layers that reuse the selection of another one."""
    chosen = {}
    problems = []
    for layer, method in enumerate(methods):
        for leaf in leaves(method):
            source = getattr(leaf.settings, "reuse_from", NO_REUSE)
            if source == NO_REUSE:
                chosen[layer, leaf.heads] = leaf.settings
                continue

            # What a layer reuses must have been chosen as it would choose itself.
            wanted = dataclasses.replace(leaf.settings, reuse_from=NO_REUSE)
            if chosen.get((source, leaf.heads)) != wanted:
                problems.append(
                    f"layer {layer}: reuse_from {source} must name an earlier layer that chooses for the "
                    "same heads with the same method and settings"
                )
    return problems


def visible_budget(sparse: SparseAttentionConfig, num_layers: int, geometry: AttentionGeometry) -> int:
    """Return the longest context at which a freshly converted model equals the dense one."""
    return min(method.reach().visible_budget for method in resolve_plan(sparse, num_layers, geometry))


def sparse_prefix(layer: int) -> str:
    """Return the name prefix of a layer's new parameters."""
    return f"model.layers.{layer}.self_attn.sparse."


def new_tensors(
    config: Mapping[str, Any],
    sparse: SparseAttentionConfig,
    dtype: torch.dtype,
    read: Callable[[str], Tensor],
) -> dict[str, Tensor]:
    """Return the tensors that conversion adds, at their initial values.

    Args:
        config: Dense config.json.
        sparse: The plan.
        dtype: Dtype of the model.
        read: Returns a tensor of the dense checkpoint by name; called for independent branch projections,
            which start as copies.

    Raises:
        ConfigError: See :func:`resolve_plan`.
    """
    geometry = geometry_of(config)
    num_layers = config["num_hidden_layers"]
    resolve_plan(sparse, num_layers, geometry)
    sparse = sparse.resolved(num_layers, geometry.num_kv_heads)

    tensors = {}
    for layer in range(num_layers):
        method = build_layer(sparse, geometry, layer)

        def dense(name: str, layer: int = layer) -> Tensor:
            return read(f"model.layers.{layer}.self_attn.{name}")

        copy_dense_rows(method, dense)
        for name, parameter in method.named_parameters():
            tensors[sparse_prefix(layer) + name] = parameter.detach().to(dtype).contiguous()
    return tensors


def copy_dense_rows(method: SparseMethod, read: Callable[[str], Tensor]) -> None:
    """Write the dense rows into the parameters of a method that start as copies of them."""
    for own, copy_ in method.dense_copies().items():
        with torch.no_grad():
            method.get_parameter(own).copy_(copy_.rows(read(copy_.dense)))


def sparse_config_dict(config: Mapping[str, Any], sparse: SparseAttentionConfig) -> dict[str, Any]:
    """Return the config.json of the converted model.

    The plan goes into ``sparse_attention``; ``auto_map`` names the code files beside the weights; what would
    make a loader do something else (a quantisation note of a dequantised source, an attention backend) goes.
    """
    family = family_of(config)
    out = copy.deepcopy(dict(config))
    for key in (
        "quantization_config",
        "attn_implementation",
        "_attn_implementation",
        "_name_or_path",
        "auto_map",
    ):
        out.pop(key, None)

    # The classes that load it: those of this package, or of the code files beside the weights.
    prefix = f"NSA{family.class_prefix}"
    out["model_type"] = family.sparse_model_type
    out["architectures"] = [family.sparse_architecture]
    out["auto_map"] = {
        "AutoConfig": f"configuration_{family.sparse_model_type}.{prefix}Config",
        **{
            auto: f"modeling_{family.sparse_model_type}.{prefix}{part}" for auto, part in AUTO_CLASSES.items()
        },
    }

    out["sparse_attention"] = sparse.to_dict()
    return out
