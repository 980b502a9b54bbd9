"""Recipes that train a model of a few thousand weights for a few steps."""

from __future__ import annotations

import copy
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nsa_convert.training.recipe.schema import Recipe, recipe_from_dict
from nsa_convert.training.run.runner import train_recipe

ROOT = Path(__file__).parents[2]
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


ALIGN = stage("align", kind="align", train="new", tokens=64 * 3)
RUNS = {
    "nsa": (NSA, (ALIGN, stage(micro_batch=2))),
    "ssa": (SSA, (stage(checkpointing=True),)),
    "dense": (None, (stage(),)),
    "nsa in bf16": (NSA, (ALIGN, stage(micro_batch=2)), {"precision": "bf16"}),
}
"""Name -> method, stages and further keys of a run of a few seconds."""


def run(out: Path, name: str, stop_at: str | None = None, *, say: Any = None, **options: Any):
    """Train one of RUNS; send this process a SIGTERM when the progress line ``stop_at`` comes."""

    def listen(line: str) -> None:
        if say is not None:
            say(line)
        if stop_at is not None and line.startswith(stop_at):
            os.kill(os.getpid(), signal.SIGTERM)

    method, stages, *keys = RUNS[name]
    known = {key: options.pop(key) for key in ("resume", "allow") if key in options}
    folder = options.pop("folder", None)
    options = {**(keys[0] if keys else {}), **options}
    return train_recipe(recipe(out, method, *stages, **options), folder, base=ROOT, say=listen, **known)


def same_weights(a: Path, b: Path) -> bool:
    """Return whether the models of two stages are equal to the bit."""
    left, right = (load_file(folder / "model" / "model.safetensors") for folder in (a, b))
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
