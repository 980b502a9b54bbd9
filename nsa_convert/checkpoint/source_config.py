"""Check the config.json of a dense checkpoint before anything is allocated for it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nsa_convert.checkpoint.problems import Problems
from nsa_convert.checkpoint.shards import refuse_training_state, resolve_inside
from nsa_convert.errors import CheckpointError
from nsa_convert.families import ModelFamily, check_config, geometry_of
from nsa_convert.strict_files import read_json_mapping

COUNT_LIMITS = {
    "hidden_size": ("CF06", 1_000_000),
    "intermediate_size": ("CF06", 10_000_000),
    "vocab_size": ("CF06", 100_000_000),
    "num_hidden_layers": ("CF04", 100_000),
    "num_attention_heads": ("CF01", 100_000),
}
"""Required whole numbers: error code and largest value that is believed."""

OPTIONAL_COUNTS = {"num_key_value_heads": "CF02", "head_dim": "CF07", "max_position_embeddings": "CF10"}

READ_KEYS = {
    *COUNT_LIMITS,
    *OPTIONAL_COUNTS,
    "model_type",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "layer_types",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "hidden_act",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
    "tie_word_embeddings",
    "dtype",
    "torch_dtype",
    "quantization_config",
    "sparse_attention",
}
"""Keys of config.json that decide what a model computes."""

DTYPES = ("float32", "float16", "bfloat16", "float64", "auto")
ACTIVATIONS = (
    "silu",
    "swish",
    "gelu",
    "gelu_new",
    "gelu_fast",
    "gelu_pytorch_tanh",
    "relu",
    "relu2",
    "quick_gelu",
)


FOREIGN_CODE = (
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
)
"""Keys that make transformers fetch kernels from the Hub."""


def read_source_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` of a checkpoint folder.

    Raises:
        CheckpointError: The folder or the file is missing, leads outside, is not strict JSON, or the folder
            holds an adapter instead of a model.
    """
    if not folder.is_dir():
        what = "is not a directory" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}", code="CF24", where=str(folder), hint="check the path")

    names = {path.name for path in folder.iterdir()}
    if "config.json" not in names:
        refuse_training_state(names, folder)
        ggufs = sorted(name for name in names if name.endswith(".gguf"))
        raise CheckpointError(
            f"{folder} is not a checkpoint: it has no config.json",
            code="CF24",
            where=str(folder),
            hint=f"name the GGUF file itself: {folder / ggufs[0]}" if ggufs else "check the path",
        )

    return read_json_mapping(resolve_inside(folder, "config.json"))


def check_source_config(config: Mapping[str, Any], family: ModelFamily, problems: Problems) -> None:
    """Note every value that no weight can match or that transformers would take silently."""
    before = len(problems.found)
    _check_keys(config, problems)
    _check_counts(config, problems)
    _check_numbers(config, problems)
    _check_choices(config, problems)
    if len(problems.found) == before:
        with problems.collect():
            check_config(config)
        with problems.collect():
            geometry_of(config, family)


def refuse_quantised(config: Mapping[str, Any]) -> None:
    """Refuse GPTQ, AWQ, bitsandbytes and every other quantised checkpoint."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return

    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    raise CheckpointError(
        f"the checkpoint is quantised ({method})",
        code="CK36",
        where="config.json: quantization_config",
        expected="float32, float16 or bfloat16 weights",
        found=str(method),
        hint="convert the original weights, or load the model, call `model.dequantize()` and save it",
    )


def strip_source_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the config without the keys that would fetch or run foreign code, and a warning for each."""
    warnings = []
    kept = dict(config)

    for key in FOREIGN_CODE:
        if kept.pop(key, None) is not None:
            warnings.append(f"config.json sets {key!r}; it is dropped (CF15)")

    if kept.pop("auto_map", None) is not None:
        warnings.append("config.json names custom code (auto_map); it is neither run nor copied (CF14)")

    return kept, tuple(warnings)


def dense_tensor_shapes(config: Mapping[str, Any], family: ModelFamily) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor a dense checkpoint of this config must hold.

    ``lm_head.weight`` is left out when the embeddings are tied.
    """
    geometry = geometry_of(config, family)
    hidden = config["hidden_size"]
    vocab = config["vocab_size"]
    inner = config["intermediate_size"]

    q_rows = geometry.num_query_heads * geometry.head_dim
    kv_rows = geometry.num_kv_heads * geometry.head_dim
    attention_bias = family.qkv_bias == "attention_bias" and bool(config.get("attention_bias"))
    mlp_bias = family.mlp_bias and bool(config.get("mlp_bias"))

    # One layer: norms, attention, MLP. Weights are stored as [out, in].
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }

    for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
        layer[f"self_attn.{name}_proj.weight"] = (rows, hidden)
        if attention_bias or family.qkv_bias == "always":
            layer[f"self_attn.{name}_proj.bias"] = (rows,)

    layer["self_attn.o_proj.weight"] = (hidden, q_rows)
    if attention_bias:
        layer["self_attn.o_proj.bias"] = (hidden,)

    if family.qk_norm:
        layer |= {
            "self_attn.q_norm.weight": (geometry.head_dim,),
            "self_attn.k_norm.weight": (geometry.head_dim,),
        }

    for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
        layer[f"mlp.{name}_proj.weight"] = shape
        if mlp_bias:
            layer[f"mlp.{name}_proj.bias"] = (shape[0],)

    # The whole model: every layer, and what lies around them.
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocab, hidden)

    return shapes


def _check_keys(config: Mapping[str, Any], problems: Problems) -> None:
    """Report misspelt keys, which would silently leave a default in force; other tools' keys are allowed."""
    absent = sorted(READ_KEYS - config.keys())
    for key in sorted(config.keys() - READ_KEYS):
        near = difflib.get_close_matches(key, absent, n=1, cutoff=0.9)
        hint = f"did you mean {near[0]!r}?" if near else None
        if key.startswith("nsa_"):
            hint = "settings of a method lie under 'sparse_attention', or come from --set"
        if hint is not None:
            where = f"config.json: {key}"
            problems.add(f"config.json: unknown key {key!r}; {hint}", code="CF13", where=where, hint=hint)


def _check_counts(config: Mapping[str, Any], problems: Problems) -> None:
    for key, (code, limit) in COUNT_LIMITS.items():
        value = config.get(key)
        if type(value) is not int or not 1 <= value <= limit:
            kind = "CF20" if value is not None and type(value) is not int else code
            problems.add(
                f"config.json: {key} must be a whole number from 1 to {limit:,}, got {value!r}",
                code=kind,
                where=f"config.json: {key}",
                expected=f"1 to {limit}",
                found=repr(value),
            )

    # Optional keys may be absent or null; then transformers has a default.
    for key, code in OPTIONAL_COUNTS.items():
        value = config.get(key)
        if value is not None and (type(value) is not int or not 1 <= value <= 2**31):
            problems.add(
                f"config.json: {key} must be a whole number from 1, got {value!r}",
                code=code,
                where=f"config.json: {key}",
                expected="a whole number from 1",
                found=repr(value),
            )


def _check_numbers(config: Mapping[str, Any], problems: Problems) -> None:
    for key, low, high in (("rms_norm_eps", 0.0, 1.0), ("attention_dropout", 0.0, 1.0)):
        value = config.get(key)
        if value is not None and not (_is_number(value) and low <= value < high):
            problems.add(
                f"config.json: {key} must be a number from {low} and below {high}, got {value!r}",
                code="CF10",
                where=f"config.json: {key}",
                expected=f"[{low}, {high})",
                found=repr(value),
            )

    vocab = config.get("vocab_size")
    pad = config.get("pad_token_id")
    if type(vocab) is int and pad is not None and not (type(pad) is int and -1 <= pad < vocab):
        problems.add(
            f"config.json: pad_token_id must be below vocab_size {vocab}, got {pad!r}",
            code="CF06",
            where="config.json: pad_token_id",
            expected=f"-1 to {vocab - 1}",
            found=repr(pad),
        )


def _check_choices(config: Mapping[str, Any], problems: Problems) -> None:
    dtype = config.get("dtype", config.get("torch_dtype"))
    if dtype is not None and str(dtype).removeprefix("torch.") not in DTYPES:
        problems.add(
            f"config.json: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}",
            code="CF21",
            where="config.json: dtype",
            expected=", ".join(DTYPES),
            found=repr(dtype),
        )

    activation = config.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        problems.add(
            f"config.json: hidden_act {activation!r} is not known",
            code="CF20",
            where="config.json: hidden_act",
            expected=", ".join(ACTIVATIONS),
            found=repr(activation),
        )

    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        if not isinstance(config.get(key, False), bool):
            problems.add(
                f"config.json: {key} must be true or false, got {config[key]!r}",
                code="CF20",
                where=f"config.json: {key}",
                expected="true or false",
                found=repr(config[key]),
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
