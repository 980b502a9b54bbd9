"""Recipes that train a model of a few thousand weights for a few steps."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from nsa_convert.training.recipe import Recipe, recipe_from_dict

FRESH = {
    "family": "llama",
    "vocab": 257,
    "config": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    },
}
NSA = {
    "method": "nsa",
    "compression_block": 4,
    "compression_stride": 2,
    "block_size": 4,
    "num_blocks": 4,
    "window_size": 4,
    "key_compressor": "linear",
}
SSA = {"method": "ssa", "block_size": 4, "num_blocks": 3, "gate": "signed"}
DATA = [{"kind": "recall", "pairs": 4, "weight": 1}, {"kind": "reference", "weight": 2}]


def stage(name: str = "pretrain", **changes: Any) -> dict[str, Any]:
    values = {
        "name": name,
        "kind": "pretrain",
        "train": "all",
        "seq_len": 32,
        "tokens": 64 * 5,
        "batch_tokens": 64,
        "lr": 1e-3,
        "lr_new": 1e-2,
        "log_every": 1,
        "save_every": 2,
        "data": copy.deepcopy(DATA),
    }
    return {**values, **changes}


def recipe_values(out: Path, method: dict | None = NSA, *stages: dict, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model": copy.deepcopy(FRESH),
        "out": str(out),
        "stages": list(stages or [stage()]),
    }
    if method is not None:
        values["sparse_attention"] = {"default": dict(method)}
    return {**values, "report_to": "none", **changes}


def recipe(out: Path, method: dict | None = NSA, *stages: dict, **changes: Any) -> Recipe:
    return recipe_from_dict(recipe_values(out, method, *stages, **changes))


def losses(out: Path) -> list[tuple[str, int, float]]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(row["stage"], row["step"], row["loss"]) for row in rows]
