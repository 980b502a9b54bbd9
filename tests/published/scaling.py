"""A published recipe made small: lengths, budgets and tokens in proportion, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from nsa_convert.config import FULL, LayerRule
from nsa_convert.methods.parts.registry import METHODS
from nsa_convert.training.recipe.schema import Recipe, Stage

SHRINK = 64
"""Rows, positions, windows and budgets in tokens are divided by it."""
BLOCK = 16
"""Lengths of a block are divided by it; a selection has BLOCK / SHRINK of its blocks then."""
LONG = 1024
"""A recipe without a longer row is small as it is."""
STEPS = 2
EVALUATED = 2
"""Rows of an evaluation."""
HELD_OUT = 0.3
"""Share of documents that training never sees: of the few of a test some."""

DIVISORS = {
    **dict.fromkeys(
        ("block_size", "compression_block", "compression_stride", "kernel_size", "kernel_stride"), BLOCK
    ),
    **dict.fromkeys(("num_blocks", "topk"), SHRINK // BLOCK),
    **dict.fromkeys(("window_size", "num_tokens"), SHRINK),
}
"""Setting of a method -> what it is divided by."""
LENGTHS = ("min_tokens", "max_tokens", "filler")
"""Lengths of documents, by which data are chosen or made."""
KEPT = {
    "num_sink_blocks",
    "num_local_blocks",
    "init_blocks",
    "num_sinks",
    "dense_len",
    "key_conv",
    "reuse_from",
    "index_heads",
}
"""Settings that count what a small model has as many of, or are no size."""


def is_long(recipe: Recipe) -> bool:
    return max(stage.seq_len for stage in recipe.stages) > LONG


def processes_of(recipe: Recipe) -> int:
    """Return the processes that stand for those of the recipe: 2 where it shares anything, else 1."""
    return min(2, max(recipe.fsdp, recipe.tensor, recipe.context))


def small_rule(rule: LayerRule) -> dict[str, Any]:
    """Return the settings of a rule that change, those it leaves at their default included."""
    if rule.method == FULL:
        return {}
    settings = METHODS[rule.method].Settings(**rule.settings)
    sizes = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(settings)
        if type(getattr(settings, field.name)) is int
    }
    strange = sizes.keys() - DIVISORS.keys() - KEPT
    assert not strange, f"{rule.method}: is {', '.join(sorted(strange))} a length, a budget or neither?"
    return {key: max(1, size // DIVISORS[key]) for key, size in sizes.items() if key in DIVISORS}


def small_stage(stage: Stage, recipe: Recipe, shrink: int) -> dict[str, Any]:
    """Return the keys of a stage that change: two steps of at most two micro-batches each."""
    seq_len = stage.seq_len // shrink
    at_once = seq_len * stage.micro_batch * processes_of(recipe)
    if recipe.tensor > 1 or recipe.context > 1:  # the processes read the same row
        at_once //= processes_of(recipe)
    turns = min(2, stage.batch_tokens // (stage.seq_len * stage.micro_batch))
    values: dict[str, Any] = {"batch_tokens": at_once * turns, "tokens": STEPS * at_once * turns}
    if shrink > 1:
        values["seq_len"] = seq_len
        values |= {
            f"data.{index}.{key}": getattr(source, key) // shrink
            for index, source in enumerate(stage.data)
            for key in LENGTHS
            if getattr(source, key)
        }
        held = {index for index, source in enumerate(stage.data) if source.hold_out}
        values |= {f"data.{index}.hold_out": HELD_OUT for index in held}
    if stage.eval_every:
        values["eval_rows"] = EVALUATED
    if stage.rope is not None and stage.rope.original is not None and shrink > 1:
        values["rope.original"] = stage.rope.original // shrink
    return values


def changes(recipe: Recipe) -> dict[str, Any]:
    """Return dotted key -> value: all that a test changes in a recipe."""
    shrink = SHRINK if is_long(recipe) else 1
    values = {
        f"stages.{stage.name}.{key}": value
        for stage in recipe.stages
        for key, value in small_stage(stage, recipe, shrink).items()
    }
    values |= {key: 2 for key in ("fsdp", "tensor", "context") if getattr(recipe, key) > 1}
    if shrink > 1 and recipe.plan is not None:
        places = {"default": recipe.plan.default}
        places |= {f"rules.{index}": rule for index, rule in enumerate(recipe.plan.rules)}
        values |= {
            f"sparse_attention.{place}.{key}": value
            for place, rule in places.items()
            for key, value in small_rule(rule).items()
        }
    return values


def layers_of(recipe: Recipe) -> int:
    """Return how many layers a small model needs: those the rules name, and one that none of them does."""
    named = [layer for rule in (recipe.plan.rules if recipe.plan else ()) for layer in rule.layers or ()]
    front = max((layer + 1 for layer in named if layer >= 0), default=0)
    return front + max((-layer for layer in named if layer < 0), default=0) + 1


def set_words(values: Mapping[str, Any]) -> list[str]:
    """Return ``--set key=value`` for each change."""
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
