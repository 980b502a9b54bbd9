"""The report of every suite except ``quick``: a JSON object, its files and tables."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsa_convert.checkpoint.staging import write_whole
from nsa_convert.evaluation.models import ModelFacts
from nsa_convert.evaluation.report.compare_tables import Table as ComparisonTable
from nsa_convert.evaluation.report.compare_tables import csv_rows
from nsa_convert.evaluation.report.compare_tables import tables as comparison_tables
from nsa_convert.evaluation.report.html import write_html
from nsa_convert.evaluation.report.identity import command_line, describe_machine, describe_model
from nsa_convert.evaluation.report.plots import write_plots
from nsa_convert.evaluation.report.result import SCHEMA, flat_layer, simple_table, write_csv
from nsa_convert.evaluation.report.verdict import benchmark_cells, task_rows, verdict
from nsa_convert.notices import Say

if TYPE_CHECKING:
    from rich.table import Table


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuiteReport:
    """Result of a suite.

    Attributes:
        values: The JSON object (``schema`` 1): the keys of :func:`envelope` and those of the suite.
    """

    values: dict[str, Any]

    @property
    def warnings(self) -> list[str]:
        """Return what limits the results."""
        return self.values["warnings"]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object."""
        return self.values

    def headline(self) -> str:
        """Return the verdict."""
        return verdict(self.values)

    def tables(self) -> list[Table]:
        """Return the rich tables that have rows: texts, comparison, tasks, times, lm-eval."""
        tables = [*map(_text_table, self.values["texts"]), *map(_as_rich, comparison_tables(self.values))]
        tables += [_task_table(self.values), _speed_table(self.values), _benchmark_table(self.values)]
        return [table for table in tables if table.row_count]

    def write(self, folder: Path, files: Sequence[Path] = ()) -> SuiteReport:
        """Write ``report.json`` and the CSV files; return the report, which lists them and ``files``."""
        folder.mkdir(parents=True, exist_ok=True)  # why: the folder of --out, which may not exist yet
        tables = {name: rows for name, rows in _csv_tables(self.values).items() if rows}
        for name, rows in tables.items():
            write_csv(folder / name, rows)

        names = [*(path.name for path in files), *tables, "report.json"]
        report = SuiteReport(values={**self.values, "files": names})
        write_whole(folder / "report.json", json.dumps(report.values, indent=2, allow_nan=False) + "\n")
        return report


def envelope(
    suite: str,
    models: Sequence[ModelFacts],
    *,
    given: Mapping[str, Any],
    chosen: Any,
    device: str,
    begin: float,
    files: Mapping[str, str | Path | None] | None = None,
    plans: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the keys that every report has, without any results.

    Args:
        suite: Name of the suite.
        models: The evaluated model, and the dense reference if it is another checkpoint.
        given: Settings that were given; None for those left out.
        chosen: Dataclass with all settings.
        device: ``cpu`` or ``cuda``.
        begin: ``time.perf_counter()`` at the start of the run.
        files: Settings that are files or folders; the report names them without their parent folders.
        plans: ``NAME=FILE`` of the plans that a comparison also runs.
    """
    named = {key: None if path is None else Path(path).resolve().name for key, path in (files or {}).items()}
    shown = {key: value for key, value in {**given, **named}.items() if value is not None}

    against = models[1] if len(models) == 2 else None

    # The keys are a published format: tools read them by name.
    return {
        "schema": SCHEMA,
        "ok": True,
        "suite": suite,
        "command": command_line(models[0], against, suite, shown, plans),
        "model": describe_model(models[0]),
        "against": describe_model(models[-1], same_weights=against is None),
        "visible_budget": models[0].visible_budget,
        "texts": [],
        "needles": {},
        "tasks": [],
        "speed": [],
        "warnings": [],
        "settings": {**dataclasses.asdict(chosen), **named},
        "environment": describe_machine(device),
        "seconds": round(time.perf_counter() - begin, 2),
        "files": [],
    }


def finish(values: Mapping[str, Any], out_dir: str | Path | None, say: Say) -> SuiteReport:
    """Return the report; with a folder, also write its plots, HTML page and tables there."""
    # Through JSON, so that it is the same as a report that is read from its file.
    report = SuiteReport(values=json.loads(json.dumps(values)))
    if out_dir is None:
        return report

    say("drawing")
    folder = Path(out_dir)
    return report.write(folder, [*write_plots(values, folder), write_html(values, folder)])


def _csv_tables(values: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return file name -> rows of all CSV files; some may be empty."""
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
    """Return a table of a comparison as a rich table."""
    out = simple_table(table.title, table.header)
    for row in table.rows:
        out.add_row(*row)
    return out


def _text_table(text: Mapping[str, Any]) -> Table:
    """Return the table of one text: a line per range of context."""
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
    """Return the scores of both kinds of attention by task and length; the interval is the sparse one's."""
    table = simple_table("right answers", ("task", "length", "cases", "dense", "sparse", "95 % interval"))
    for row in task_rows(values):
        cells = [row["dense"], row["sparse"]]
        shares = ["-" if cell is None else f"{cell['score']:.0%}" for cell in cells]
        last = row["sparse"]
        span = "" if last is None else f"{last['low']:.0%}-{last['high']:.0%}"
        table.add_row(row["task"], str(row["length"]), "" if last is None else str(last["n"]), *shares, span)
    return table


def _benchmark_table(values: Mapping[str, Any]) -> Table:
    """Return the table of lm-eval's scores."""
    columns = ("task", "metric", "samples", "dense", "sparse", "95 % interval")
    table = simple_table("lm-eval", columns)
    for row in values.get("benchmarks", []):
        table.add_row(row["task"], row["metric"], str(row["n"]), *benchmark_cells(row))
    return table


def _speed_table(values: Mapping[str, Any]) -> Table:
    """Return the table of times and cache sizes."""
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
