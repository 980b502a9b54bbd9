"""The verdict of an evaluation in two sentences, and the confidence interval of a share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nsa_convert.evaluation.report.compare_tables import comparison_verdict

Z95 = 1.959964
"""Normal quantile of a two-sided 95 % interval."""


def wilson(hits: float, cases: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share.

    Args:
        hits: Number of successes, 0 .. cases; may be a sum of partial scores.
        cases: Number of trials; 0 gives (0, 1).
    """
    if cases == 0:
        return 0.0, 1.0

    p = hits / cases
    z2 = Z95 * Z95
    middle = (p + z2 / (2 * cases)) / (1 + z2 / cases)
    half = Z95 * math.sqrt(p * (1 - p) / cases + z2 / (4 * cases * cases)) / (1 + z2 / cases)
    return max(0.0, middle - half), min(1.0, middle + half)


def task_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row per task and length, with the scores of both kinds of attention side by side.

    Args:
        report: The JSON of an evaluation.

    Returns:
        Rows ``task, length, main, dense, sparse``. The last two are ``{"score", "n", "low", "high"}``, or
        None where that attention was not run; ``main`` is False for the teacher-forced form of a task that
        was also answered freely.
    """
    # (task, length, main) -> attention -> (sum of scores, number of cases) of each entry.
    scores: dict[tuple[str, int, bool], dict[str, list[tuple[float, int]]]] = {}

    def add(task: str, length: int, main: bool, mode: str, score: float, cases: int = 1) -> None:
        scores.setdefault((task, length, main), {}).setdefault(mode, []).append((score * cases, cases))

    # Needles count in their forced form, tasks in their free form where they have one.
    for mode, cases in report.get("needles", {}).items():
        for case in cases:
            add("needle, forced", case["length"], True, mode, float(case["hit"]))
            if case.get("generated") is not None:
                add("needle, free", case["length"], False, mode, case["generated"])

    for row in report.get("tasks", []):
        free = row.get("score") is not None
        if free:
            add(f"{row['task']}, free", row["length"], True, row["attention"], row["score"])
        if row.get("forced") is not None:
            add(
                f"{row['task']}, forced",
                row["length"],
                not free,
                row["attention"],
                row["forced"],
                row["spans"],
            )

    rows = []
    for (task, length, main), by_mode in scores.items():
        cells = {mode: _cell(by_mode[mode]) if mode in by_mode else None for mode in ("dense", "sparse")}
        rows.append({"task": task, "length": length, "main": main, **cells})
    return rows


def _cell(values: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """Return the mean score of some cases with its interval."""
    hits = sum(score for score, _ in values)
    cases = sum(count for _, count in values)
    low, high = wilson(hits, cases)
    return {"score": hits / cases, "n": cases, "low": low, "high": high}


def processor(machine: Mapping[str, Any]) -> str:
    """Return the device and the number of threads in a report's ``environment`` as text."""
    return f"{machine['device_name']}, {machine['threads']} thread{'s' * (machine['threads'] != 1)}"


def benchmark_cells(row: Mapping[str, Any]) -> list[str]:
    """Return dense score, sparse score and interval of a row of lm-eval as text."""
    scores = ["-" if row[mode] is None else f"{row[mode]:.4g}" for mode in ("dense", "sparse")]
    return [*scores, "" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"]


def verdict(report: Mapping[str, Any]) -> str:
    """Return two sentences with the most important numbers: quality, then retrieval or cost.

    They state what was measured and on how many cases; they never claim that nothing was lost.
    """
    if report.get("rows"):
        return comparison_verdict(report)

    budget = report.get("visible_budget")
    if not budget:
        return "No layer of this model is sparse. Dense and sparse attention are the same here."

    # Quality: benchmarks if there are any, else the texts that exceed the budget.
    beyond = [text for text in report.get("texts", []) if text["tokens"] - 1 > budget]
    if report.get("benchmarks"):
        first = _benchmark_sentence(report["benchmarks"])
    elif not beyond:
        first = f"No text exceeded the visible budget of {budget} tokens, so nothing sparse was measured."
    else:
        parts = [
            f"x{text['beyond']['ppl_ratio']:.3f} on {text['name']} (KL {text['beyond']['kl_mean']:.4f}, "
            f"same first choice {text['beyond']['top1']:.1%})"
            for text in beyond
        ]
        first = (
            f"Beyond its visible budget of {budget} tokens, up to {max(t['tokens'] for t in beyond)} tokens, "
            f"the perplexity is {' and '.join(parts)} of the dense model's."
        )

    return f"{first} {_second_sentence(report, budget)}"


def _benchmark_sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a sentence with the first three scores of lm-eval."""
    parts = []
    for row in rows[:3]:
        dense, sparse, _ = benchmark_cells(row)
        parts.append(f"{sparse} on {row['task']} ({row['metric']}) where dense attention has {dense}")
    more = f", and so on over {len(rows)} scores" if len(rows) > 3 else ""
    return f"By lm-eval it has {' and '.join(parts)}{more}."


def _second_sentence(report: Mapping[str, Any], budget: int) -> str:
    """Return a sentence about retrieval beyond the budget, or else about the time to read a prompt."""
    beyond = [row for row in task_rows(report) if row["main"] and row["length"] > budget]
    rows = [row for row in beyond if row["dense"] and row["sparse"]]

    # The mean over all cases of all tasks.
    if rows:
        cases = sum(row["sparse"]["n"] for row in rows)
        dense, sparse = (sum(r[m]["score"] * r[m]["n"] for r in rows) / cases for m in ("dense", "sparse"))
        low, high = wilson(sparse * cases, cases)
        return (
            f"In {cases} retrieval cases beyond the budget it scores {sparse:.1%} (95 % interval {low:.0%} "
            f"to {high:.0%}) where dense attention scores {dense:.1%}."
        )

    if speed := [row for row in report.get("speed", []) if row["attention"] == "sparse"]:
        last = max(speed, key=lambda row: row["length"])
        return f"A prompt of {last['length']} tokens takes {last['prefill_s']:.3g} s to read."
    return "Retrieval from far back and speed were not measured."
