"""Tiny random models of every family, and sparse plans small enough that they select."""

from __future__ import annotations

import copy

import torch
import transformers
from transformers import PreTrainedModel

from nsa_convert.config import SparseAttentionConfig
from nsa_convert.families import FAMILIES as TABLE
from nsa_convert.methods.parts.registry import METHODS as REGISTERED
from nsa_convert.patch.patching import patch_model

FAMILIES = tuple(TABLE)
PREFIX = {name: family.class_prefix for name, family in TABLE.items()}
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "eos_token_id": None,
    "bos_token_id": None,
}

NSA = {
    "method": "nsa",
    "compression_block": 8,
    "compression_stride": 4,
    "block_size": 8,
    "num_blocks": 4,
    "window_size": 8,
}
MOBA = {"method": "moba", "block_size": 8, "num_blocks": 4}
INFLLM_V2 = {
    "method": "infllm_v2",
    "kernel_size": 8,
    "kernel_stride": 4,
    "block_size": 8,
    "topk": 3,
    "window_size": 16,
}
DSA = {"method": "dsa", "num_tokens": 24, "num_sinks": 1, "window_size": 4}
MSA = {"method": "msa", "block_size": 8, "num_blocks": 4}
STREAMING = {"method": "streaming", "num_sinks": 2, "window_size": 13, "cache": "keep"}
SSA = {"method": "ssa", "block_size": 8, "num_blocks": 4}
QUEST = {"method": "quest", "block_size": 8, "num_blocks": 4, "prefill": "sparse"}
HYBRID = {
    **NSA,
    "branch_kv": "independent",
    "rules": [
        {**SSA, "layers": [0], "heads": [0]},
        {"method": "full", "layers": [-1], "heads": [1]},
        {**DSA, "layers": [1], "heads": [1], "index_key": "shared"},
    ],
}

VARIANTS = {
    "nsa": NSA,
    "nsa-coarse-max": {**NSA, "block_size": 16, "num_blocks": 3, "block_score": "max"},
    "nsa-learned-before-rope": {
        **NSA,
        "key_compressor": "mlp",
        "value_compressor": "linear",
        "compress_rope": "before",
    },
    "nsa-independent": {**NSA, "branch_kv": "independent", "key_compressor": "weighted", "gate": "sigmoid"},
    "nsa-second-order": {**NSA, "scorer": "second_order"},
    "ssa": SSA,
    "ssa-learned": {**SSA, "key_compressor": "token_mlp"},
    "moba": MOBA,
    "moba-group": {**MOBA, "share": "group"},
    "moba-conv": {**MOBA, "key_conv": 3},
    "moba-conv-hybrid": {**SSA, "rules": [{**MOBA, "key_conv": 4, "layers": [0, 2], "heads": [1]}]},
    "infllm_v2": INFLLM_V2,
    "infllm_v2-coarse": {**INFLLM_V2, "kernel_size": 4, "kernel_stride": 2, "lse": "coarse"},
    "dsa": DSA,
    "dsa-shared": {**DSA, "index_key": "shared"},
    "msa": MSA,
    "msa-shared": {**MSA, "index_key": "shared"},
    "streaming": STREAMING,
    "streaming-cache": {**STREAMING, "positions": "cache"},
    "quest": QUEST,
    "hybrid": HYBRID,
    "msa-reuse": {**MSA, "rules": [{**MSA, "layers": [1, 2], "reuse_from": 0}]},
    "phases": {**SSA, "rules": [{**SSA, "phase": "decode"}]},
    "ssa-gated": {**SSA, "num_blocks": 3, "gate": "signed", "scorer": "second_order"},
}

XATTENTION = {"method": "xattention", "block_size": 8, "stride": 4, "threshold": 0.5}
SPARGEATTN = {"method": "spargeattn", "query_block": 16, "block_size": 8, "top": 0.2, "similarity": 0.02}
FLEXPREFILL = {"method": "flexprefill", "block_size": 8, "min_budget": 16, "gamma": 0.6, "tau": 0.3}
MINFERENCE = {
    "method": "minference",
    "block_size": 8,
    "head_patterns": [
        ["stream_llm", 4, 12],
        ["block_sparse", 3, 1],
        ["stream_llm", 8, 8],
        ["block_sparse", 2, 1],
    ],
}
TRI_SHAPE = {"method": "tri_shape", "num_sinks": 3, "window_size": 17, "num_last": 21}
VERTICAL_SLASH = {"method": "minference", "block_size": 8, "vertical_size": 40, "slash_size": 100}

PREFILL = {
    "xattention": XATTENTION,
    "xattention-group": {**XATTENTION, "share": "group"},
    "spargeattn": SPARGEATTN,
    "spargeattn-mass": {**SPARGEATTN, "budget": "mass", "mass": 0.5, "share": "group"},
    "flexprefill": FLEXPREFILL,
    "minference": MINFERENCE,
    "minference-vertical-slash": VERTICAL_SLASH,
    "tri_shape": TRI_SHAPE,
}
"""Variants that choose for tiles of a prompt and decode densely; vertical-slash sees at least 100 tokens."""

EVICTING = {
    "streaming-evict": {**STREAMING, "cache": "evict"},
    "h2o": {"method": "h2o", "num_heavy": 8, "num_recent": 7},
    "razor": {"method": "razor", "num_sinks": 2, "window_size": 9, "window_share": 0},
    "infllm": {
        "method": "infllm",
        "num_sinks": 3,
        "window_size": 12,
        "block_size": 4,
        "num_blocks": 2,
        "num_representatives": 2,
        "query_block": 1,
    },
}
"""Variants whose cache forgets, or reads the past another way than one pass over the text does."""
EVERY = {**VARIANTS, **PREFILL, **EVICTING}
"""All variants; every method of the registry has one (tests/guards/test_variants.py)."""

METHODS = (*(name for name in VARIANTS if name in REGISTERED), "hybrid")
"""Variants that are tested with every family; the others, which differ in an option, with one."""
PAIRS = [(family, name) for name in VARIANTS for family in (FAMILIES if name in METHODS else ("qwen2",))]
QUICK = {*METHODS, "phases"}
"""Variants of `make test`: each method once; its options run in `make test-all`."""
QUICK_PAIRS = {("llama", "nsa"), *((FAMILIES[i % len(FAMILIES)], name) for i, name in enumerate(METHODS))}
"""Pairs of `make test`: each method with one family, each family with some method."""


def plan(default: dict, *rules: dict) -> SparseAttentionConfig:
    """Return a plan with one default rule and further rules, which ``default`` may hold under "rules"."""
    default = dict(default)
    rules = (*rules, *default.pop("rules", ()))
    return SparseAttentionConfig.from_dict({"default": default, "rules": [dict(r) for r in rules]})


def dense_model(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """Return a tiny dense model in eval mode, float64, large weights so that errors show."""
    torch.manual_seed(seed)
    sizes = {**copy.deepcopy(SIZES), **({"sliding_window": None} if family == "mistral" else {}), **changes}
    config = getattr(transformers, f"{PREFIX[family]}Config")(**sizes)
    return getattr(transformers, f"{PREFIX[family]}ForCausalLM")(config).double().eval()


def trained_model(family: str, settings: dict, seed: int = 0, **changes: object) -> PreTrainedModel:
    """Return a patched model whose new weights are away from their initial values, as after training."""
    model = patch_model(dense_model(family, seed, **changes), plan(settings))

    for name, parameter in model.named_parameters():
        if ".sparse." in name:
            parameter.data += 0.3 * torch.randn_like(parameter)

    return model


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    """Return random token ids."""
    return torch.randint(1, 128, shape, generator=torch.Generator().manual_seed(seed))
