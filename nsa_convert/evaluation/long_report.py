"""The result of the long and the full suite: its JSON, CSV files and tables."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsa_convert.evaluation.compare_tables import Table as ComparisonTable
from nsa_convert.evaluation.compare_tables import csv_rows
from nsa_convert.evaluation.compare_tables import tables as comparison_tables
from nsa_convert.evaluation.report import flat_layer, simple_table, write_csv
from nsa_convert.evaluation.verdict import benchmark_cells, task_rows, verdict
from nsa_convert.patch.staging import write_whole

if TYPE_CHECKING:
    from rich.table import Table

    from nsa_convert.evaluation.cases import Case

NEAR = 0.75
"""Prompts shorter than this share of their nominal length do not count for times."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongReport:
    """What ``eval --suite long`` or ``full`` found.

    Attributes:
        values: The JSON object (``schema`` 1); the same keys as the quick suite's, and ``tasks`` and
            ``speed``.
    """

    values: dict[str, Any]

    @property
    def warnings(self) -> list[str]:
        """Return what limits the result."""
        return self.values["warnings"]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object."""
        return self.values

    def headline(self) -> str:
        """Return the verdict."""
        return verdict(self.values)

    def tables(self) -> list[Table]:
        """Return rich tables: texts, tasks, times, lm-eval."""
        tables = [*map(_text_table, self.values["texts"]), *map(_as_rich, comparison_tables(self.values))]
        tables += [_task_table(self.values), _speed_table(self.values), _benchmark_table(self.values)]
        return [table for table in tables if table.row_count]

    def write(self, folder: Path, files: Sequence[Path] = ()) -> LongReport:
        """Write ``report.json`` and the CSV files; return the report that lists them and ``files``."""
        folder.mkdir(parents=True, exist_ok=True)
        tables = {name: rows for name, rows in _csv_tables(self.values).items() if rows}
        for name, rows in tables.items():
            write_csv(folder / name, rows)
        names = [*(path.name for path in files), *tables, "report.json"]
        report = LongReport(values={**self.values, "files": names})
        write_whole(folder / "report.json", json.dumps(report.values, indent=2, allow_nan=False) + "\n")
        return report


def empty_warnings(outcomes: Iterable[tuple[Case, str, Mapping[str, Any]]]) -> list[str]:
    """Return how many free answers hold no text: a model that ends at once scores 0 for another reason."""
    texts = [(kind, value["text"]) for _, kind, value in outcomes if value["text"] is not None]
    lines = []
    for kind in sorted({kind for kind, _ in texts}):
        said = [text for which, text in texts if which == kind]
        empty = sum(not text.strip() for text in said)
        if empty:
            lines.append(f"{empty} of {len(said)} free answers of {kind} attention are empty; they score 0")
    return lines


def speed_rows(outcomes: Iterable[tuple[Case, str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return medians over the prompts of each length: seconds to read, milliseconds per token, cache bytes.

    Args:
        outcomes: Cases with the attention they ran with and what came out.
    """
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


def _csv_tables(values: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    texts = values["texts"]
    return {
        "buckets.csv": [{"text": text["name"], **row} for text in texts for row in text["buckets"]],
        "positions.csv": [{"text": text["name"], **row} for text in texts for row in text["curve"]],
        "layers.csv": [{"text": text["name"], **flat_layer(row)} for text in texts for row in text["layers"]],
        "needles.csv": [{"model": who, **row} for who, rows in values["needles"].items() for row in rows],
        "tasks.csv": [dict(row) for row in values["tasks"]],
        "speed.csv": [dict(row) for row in values["speed"]],
        "compare.csv": csv_rows(values),
        "benchmarks.csv": [dict(row) for row in values.get("benchmarks", [])],
    }


def _as_rich(table: ComparisonTable) -> Table:
    out = simple_table(table.title, table.header)
    for row in table.rows:
        out.add_row(*row)
    return out


def _text_table(text: Mapping[str, Any]) -> Table:
    title = f"{text['name']}, {text['tokens']} tokens\n{text['source']}"
    table = simple_table(
        title, ("context", "tokens", "dense ppl", "sparse", "ratio", "KL", "KL p99", "top-1")
    )
    for row in text["buckets"]:
        table.add_row(
            row["context"],
            str(row["tokens"]),
            f"{row['dense_ppl']:.4g}",
            f"{row['sparse_ppl']:.4g}",
            f"{row['ppl_ratio']:.4f}",
            f"{row['kl_mean']:.2g}",
            f"{row['kl_p99']:.2g}",
            f"{row['top1']:.1%}",
        )
    return table


def _task_table(values: Mapping[str, Any]) -> Table:
    table = simple_table("right answers", ("task", "length", "cases", "dense", "sparse", "95 % interval"))
    for row in task_rows(values):
        cells = [row["dense"], row["sparse"]]
        shares = ["-" if cell is None else f"{cell['score']:.0%}" for cell in cells]
        last = row["sparse"]
        span = "" if last is None else f"{last['low']:.0%}-{last['high']:.0%}"
        table.add_row(row["task"], str(row["length"]), "" if last is None else str(last["n"]), *shares, span)
    return table


def _benchmark_table(values: Mapping[str, Any]) -> Table:
    columns = ("task", "metric", "samples", "dense", "sparse", "95 % interval")
    table = simple_table("lm-eval", columns)
    for row in values.get("benchmarks", []):
        table.add_row(row["task"], row["metric"], str(row["n"]), *benchmark_cells(row))
    return table


def _speed_table(values: Mapping[str, Any]) -> Table:
    columns = ("length", "attention", "prompts", "prompt s", "token ms", "cache MB")
    table = simple_table("time and memory", columns)
    for row in values["speed"]:
        table.add_row(
            str(row["length"]),
            row["attention"],
            str(row["repeats"]),
            f"{row['prefill_s']:.3g}",
            f"{row['decode_ms']:.3g}",
            f"{row['cache_bytes'] / 1e6:.1f}",
        )
    return table
