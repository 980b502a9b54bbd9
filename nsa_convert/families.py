"""The model families that can be converted: one table row each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from nsa_convert.config import AttentionGeometry
from nsa_convert.errors import ConfigError, UnsupportedModelError

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""RoPE variants whose rotation depends on the position alone, so that cached keys stay valid."""


_SCALING_NUMBERS = {
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

_REASONS = (
    ("deepseek", "its latent attention (MLA) keeps no keys and values per head"),
    ("moe", "its mixture of experts is not in the family table"),
    ("mixtral", "its mixture of experts is not in the family table"),
    ("bert", "it is an encoder, not a causal decoder"),
    ("t5", "it is an encoder and a decoder"),
    ("gemma", "some of its layers attend to a sliding window"),
    ("gpt_oss", "some of its layers attend to a sliding window"),
    ("gpt", "its positions are not rotary"),
    ("mamba", "it has no attention"),
    ("rwkv", "it has no attention"),
)
"""Part of a model type -> why it is not supported."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """What the converter has to know about one transformers architecture.

    Attributes:
        model_type: ``model_type`` of the dense config.
        title: Name for people.
        class_prefix: Prefix of the transformers classes (``LlamaForCausalLM``).
        qkv_bias: Whether q/k/v projections have a bias: ``"never"``, ``"always"``, or ``"attention_bias"``
            when the config key of that name decides (then o_proj has one too).
        qk_norm: Whether queries and keys pass an RMSNorm over the head dim before RoPE.
        mlp_bias: Whether the config key ``mlp_bias`` decides about a bias in the MLP.
        defaults: Values transformers assumes for keys that config.json leaves out.
    """

    model_type: str
    title: str
    class_prefix: str
    qkv_bias: Literal["never", "always", "attention_bias"]
    qk_norm: bool = False
    mlp_bias: bool = False
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def sparse_model_type(self) -> str:
        """``model_type`` of the converted model."""
        return f"nsa_{self.model_type}"

    @property
    def sparse_architecture(self) -> str:
        """Name of the converted causal model class."""
        return f"NSA{self.class_prefix}ForCausalLM"


FAMILIES: dict[str, ModelFamily] = {
    family.model_type: family
    for family in (
        ModelFamily(
            model_type="llama", title="Llama", class_prefix="Llama", qkv_bias="attention_bias", mlp_bias=True
        ),
        ModelFamily(
            model_type="qwen2",
            title="Qwen2 / Qwen2.5",
            class_prefix="Qwen2",
            qkv_bias="always",
            defaults={"num_key_value_heads": 32},
        ),
        ModelFamily(
            model_type="qwen3",
            title="Qwen3",
            class_prefix="Qwen3",
            qkv_bias="attention_bias",
            qk_norm=True,
            defaults={"num_key_value_heads": 32, "head_dim": 128},
        ),
        ModelFamily(
            model_type="mistral",
            title="Mistral",
            class_prefix="Mistral",
            qkv_bias="never",
            defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        ),
    )
}


def family_of(config: Mapping[str, Any]) -> ModelFamily:
    """Return the family of a dense config.json.

    Raises:
        UnsupportedModelError: The architecture is not in the table, or is already converted.
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]

    if model_type in [family.sparse_model_type for family in FAMILIES.values()]:
        raise UnsupportedModelError(
            f"this checkpoint is already converted (model_type {model_type!r})",
            code="CK35",
            where="config.json: model_type",
            hint="use it as it is, or `nsa-convert revert` it first",
        )

    # Why some well-known architectures cannot be converted is said with the refusal.
    reason = next((f": {why}" for part, why in _REASONS if part in str(model_type)), "")
    raise UnsupportedModelError(
        f"model_type {model_type!r} cannot be converted{reason}",
        code="CF12",
        where="config.json: model_type",
        expected=", ".join(FAMILIES),
        found=repr(model_type),
        hint="decoder-only models of the listed families with ordinary softmax attention are supported",
    )


def family_of_sparse(model_type: str) -> ModelFamily:
    """Return the family whose converted ``model_type`` this is.

    Raises:
        UnsupportedModelError: It is not a converted model type.
    """
    for family in FAMILIES.values():
        if family.sparse_model_type == model_type:
            return family
    raise UnsupportedModelError(
        f"model_type {model_type!r} is not a converted model",
        code="CF12",
        expected=", ".join(family.sparse_model_type for family in FAMILIES.values()),
        found=repr(model_type),
    )


def config_value(config: Mapping[str, Any], key: str, family: ModelFamily | None = None) -> Any:
    """Return a config value, or the default transformers assumes for the family."""
    family = family or family_of(config)
    value = config.get(key)
    return family.defaults.get(key) if key not in config else value


def geometry_of(config: Mapping[str, Any], family: ModelFamily | None = None) -> AttentionGeometry:
    """Return the attention sizes of a config.json; ``head_dim`` may be given or derived.

    Raises:
        ConfigError: A size is missing, not a positive integer, or head counts do not divide.
    """
    family = family or family_of(config)
    missing = [key for key in ("hidden_size", "num_attention_heads") if not _is_count(config.get(key))]
    if missing:
        found = ", ".join(f"{key}={config.get(key)!r}" for key in missing)
        raise ConfigError(
            f"config.json: positive integers are needed for {', '.join(missing)}; got {found}", code="CF01"
        )

    # Older configs do not give the head dim.
    hidden = config["hidden_size"]
    heads = config["num_attention_heads"]
    head_dim = config_value(config, "head_dim", family)
    if head_dim is None:
        if hidden % heads:
            raise ConfigError(
                f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads} "
                "and head_dim is not given",
                code="CF03",
            )
        head_dim = hidden // heads

    kv_heads = config_value(config, "num_key_value_heads", family)
    return AttentionGeometry(
        hidden_size=hidden,
        num_query_heads=heads,
        head_dim=head_dim,
        num_kv_heads=heads if kv_heads is None else kv_heads,
        qkv_bias=has_qkv_bias(config, family),
    )


def has_qkv_bias(config: Mapping[str, Any], family: ModelFamily) -> bool:
    """Return whether the query, key and value projections have a bias."""
    return family.qkv_bias == "always" or (
        family.qkv_bias == "attention_bias" and bool(config.get("attention_bias"))
    )


def check_config(config: Mapping[str, Any], family: ModelFamily | None = None) -> None:
    """Raise one ConfigError that names every feature of the config the sparse layers do not support.

    Args:
        config: Contents of config.json.
        family: Its family; by default that of a dense config.

    Raises:
        UnsupportedModelError: The architecture is not in the table.
        ConfigError: Sliding-window layers, an unsupported RoPE type, or bad RoPE numbers.
    """
    family = family or family_of(config)
    problems = [*_sliding_window_problems(config, family), *_rope_problems(config)]
    if geometry_of(config, family).head_dim % 2:
        problems.append(f"head_dim must be even for RoPE, got {geometry_of(config, family).head_dim}")
    if problems:
        raise ConfigError("; ".join(problems), code="CF09", where="config.json")


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``rope_type``, ``rope_theta`` and the scaling numbers, from the old or the new config keys."""
    new = config.get("rope_parameters")
    if new is None:
        new = {**(config.get("rope_scaling") or {}), "rope_theta": config.get("rope_theta", 10000.0)}
    parameters = dict(new)
    parameters.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    parameters["rope_type"] = parameters.get("rope_type", parameters.pop("type", "default"))
    return parameters


def _sliding_window_problems(config: Mapping[str, Any], family: ModelFamily) -> list[str]:
    # Newer configs list the kind of every layer.
    kinds = config.get("layer_types")
    if kinds is not None and (
        not isinstance(kinds, (list, tuple)) or set(map(str, kinds)) != {"full_attention"}
    ):
        return [f"layer_types must be all 'full_attention', got {sorted(set(map(str, kinds)))}"]
    if kinds is not None and len(kinds) != config.get("num_hidden_layers", len(kinds)):
        return [f"layer_types lists {len(kinds)} layers, num_hidden_layers is {config['num_hidden_layers']}"]

    # Older ones give one window for all; for Mistral, leaving it out means one of 4096 tokens.
    if family.model_type == "mistral" and config_value(config, "sliding_window", family) is not None:
        window = config_value(config, "sliding_window", family)
        return [f"sliding_window must be null (the model attends to its whole context), got {window!r}"]
    if config.get("use_sliding_window"):
        return ["use_sliding_window must be false (the model attends to its whole context)"]
    return []


def _rope_problems(config: Mapping[str, Any]) -> list[str]:
    for key in ("rope_parameters", "rope_scaling"):
        if config.get(key) is not None and not isinstance(config[key], Mapping):
            return [f"{key} must be a mapping or null, got {config[key]!r}"]

    # The kind of RoPE, and its base.
    parameters = rope_parameters(config)
    problems = []
    if parameters["rope_type"] not in ROPE_TYPES:
        problems.append(
            f"rope_type {parameters['rope_type']!r} is not supported (supported: {', '.join(ROPE_TYPES)})"
        )
    if not _is_positive(parameters["rope_theta"]):
        problems.append(f"rope_theta must be a positive finite number, got {parameters['rope_theta']!r}")

    # The numbers of a scaled one.
    problems += _scaling_problems(parameters)
    if "factor" in parameters and not (_is_positive(parameters["factor"]) and parameters["factor"] >= 1):
        problems.append(f"the rope scaling factor must be >= 1, got {parameters['factor']!r}")

    if config.get("partial_rotary_factor", parameters.get("partial_rotary_factor", 1.0)) not in (
        1,
        1.0,
        None,
    ):
        problems.append("partial_rotary_factor other than 1 is not supported")
    return problems


def _scaling_problems(parameters: Mapping[str, Any]) -> list[str]:
    """A scaled RoPE needs its numbers; without them a model cannot be loaded, or rotates by NaN."""
    needed = _SCALING_NUMBERS.get(str(parameters["rope_type"]), ())
    problems = [
        f"rope_type {parameters['rope_type']!r} needs a positive {key}, got {parameters.get(key)!r}"
        for key in needed
        if not _is_positive(parameters.get(key))
    ]
    if not problems and parameters["rope_type"] == "llama3":
        low = parameters["low_freq_factor"]
        high = parameters["high_freq_factor"]
        if high <= low:
            problems.append(f"high_freq_factor must be above low_freq_factor {low!r}, got {high!r}")
    return problems


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_positive(value: Any) -> bool:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    )
