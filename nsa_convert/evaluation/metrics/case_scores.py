"""Rows of needles, tasks and times from the results of cases, and warnings about them."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nsa_convert.evaluation.tasks.cases import Case

Outcomes = Sequence[tuple[Case, str, Mapping[str, Any]]]
"""Cases with the attention they ran with and their results."""

FEW_REPEATS = 3
"""Times that rest on fewer prompts get a warning."""
NEAR = 0.75
"""Prompts shorter than this share of their nominal length do not count for times."""


def needle_rows(outcomes: Outcomes) -> dict[str, list[dict[str, Any]]]:
    """Return attention -> one row for each needle."""
    rows: dict[str, list[dict[str, Any]]] = {"dense": [], "sparse": []}
    for case, kind, value in outcomes:
        if case.depth is not None:
            row = {"length": case.length, "depth": case.depth, "tokens": value["tokens"]}
            row |= {"hit": value["forced"] == 1, "nll": value["nll"], "generated": value["score"]}
            rows[kind].append(row)
    return rows


def prompt_rows(outcomes: Outcomes) -> list[dict[str, Any]]:
    """Return one row for each prompt of a task and kind of attention; needles are left out."""
    keys = ("tokens", "score", "forced", "forced_tokens", "spans", "nll", "text")

    return [
        {
            "task": case.task,
            "length": case.length,
            "index": case.index,
            "attention": kind,
            **_pick(value, keys),
        }
        for case, kind, value in outcomes
        if case.depth is None
    ]


def _pick(values: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """Return a mapping with some of its keys."""
    return {key: values[key] for key in keys}


def busy_warnings() -> list[str]:
    """Return a warning if other processes also use the processor, so that times are not reliable."""
    cores = os.cpu_count() or 1
    own = min(torch.get_num_threads(), os.cpu_count() or 1)

    # Average load of the last five minutes, less that of this process.
    others = os.getloadavg()[1] - own
    if others <= max(0.5, 0.25 * cores):
        return []
    return [f"other processes kept {others:.1f} of {cores} cores busy: the times are not reliable"]


def few_repeats(speed: list[dict[str, Any]]) -> list[str]:
    """Return a warning for lengths whose times are medians of few prompts."""
    few = sorted({row["length"] for row in speed if row["repeats"] < FEW_REPEATS})
    return [f"times at {few} rest on fewer than {FEW_REPEATS} prompts"] if few else []


def empty_warnings(outcomes: Outcomes) -> list[str]:
    """Return warnings about free answers without text: they score 0 although nothing was answered."""
    texts = [(kind, value["text"]) for _, kind, value in outcomes if value["text"] is not None]
    lines = []
    for kind in sorted({kind for kind, _ in texts}):
        said = [text for which, text in texts if which == kind]
        empty = sum(not text.strip() for text in said)
        if empty:
            lines.append(f"{empty} of {len(said)} free answers of {kind} attention are empty; they score 0")
    return lines


def speed_rows(outcomes: Outcomes) -> list[dict[str, Any]]:
    """Return the medians over the prompts of each length: times and size of the cache.

    Args:
        outcomes: Cases with the attention they ran with and their results.

    Returns:
        One row for each length and kind of attention that has timed decoding steps.
    """
    # Prompts that are much shorter than their nominal length would make it look faster.
    groups: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for case, kind, value in outcomes:
        if value["tokens"] >= NEAR * case.length:
            groups.setdefault((case.length, kind), []).append(value)

    rows = []
    for (length, kind), values in sorted(groups.items()):
        prefill = [value["prefill_s"] for value in values]
        decode = [value["decode_ms"] for value in values if value["decode_ms"] is not None]
        if decode:
            rows.append(
                {
                    "attention": kind,
                    "length": length,
                    "repeats": len(values),
                    "prefill_s": statistics.median(prefill),
                    "prefill_max_s": max(prefill),
                    "decode_ms": statistics.median(decode),
                    "decode_max_ms": max(decode),
                    "cache_bytes": round(statistics.median(value["cache_bytes"] for value in values)),
                }
            )
    return rows
