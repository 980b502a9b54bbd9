"""The result of the suite ``quick``: an object, its JSON, its CSV files and its tables."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsa_convert.checkpoint.staging import write_whole
from nsa_convert.evaluation.metrics.divergence import Divergence
from nsa_convert.evaluation.metrics.mass import LayerMass
from nsa_convert.evaluation.metrics.perplexity import Bucket
from nsa_convert.evaluation.report.compare_tables import known_mean
from nsa_convert.evaluation.tasks.needle import NeedleScore, hits_by_length
from nsa_convert.evaluation.tasks.text import EvalText

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 1
CURVE_POINTS = 32
"""Number of parts that a text is divided into for plots."""
WORST_LAYERS = 5
"""Number of layers with the least captured mass that a table shows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextResult:
    """Comparison of both kinds of attention on one text.

    Attributes:
        text: The text and its origin.
        tokens: Tokens that both models read.
        divergence: Values for each prediction.
        buckets: Ranges of context length to average over.
        layers: Captured mass per layer and pattern; empty if nothing was hidden.
        prompt: Tokens that were read as a prompt before the scored ones; 0 where all are scored.
    """

    text: EvalText
    tokens: int
    divergence: Divergence
    buckets: tuple[Bucket, ...]
    layers: tuple[LayerMass, ...]
    prompt: int = 0

    def bucket_rows(self) -> list[dict[str, Any]]:
        """Return one summary per bucket, with its range as ``context``."""
        return [{"context": b.label, **self.divergence.summary(b)} for b in self.buckets]

    def beyond(self, budget: int | None) -> dict[str, Any]:
        """Return the summary over contexts beyond the budget, or over all if there are none."""
        last = self.tokens - 1
        first = max(0, self.prompt - 1)
        begin = budget or 0
        return self.divergence.summary(Bucket(begin, last, first) if first < begin < last else None)

    def curve(self) -> list[dict[str, Any]]:
        """Return the summaries of :data:`CURVE_POINTS` equal ranges of context, for plots."""
        last = self.tokens - 1
        first = max(0, self.prompt - 1)
        edges = sorted({first + round(i * (last - first) / CURVE_POINTS) for i in range(CURVE_POINTS + 1)})
        pieces = [Bucket(a, b, first) for a, b in zip(edges, edges[1:], strict=False)]
        return [{"context_end": p.end, **self.divergence.summary(p)} for p in pieces]

    def to_dict(self, budget: int | None = None) -> dict[str, Any]:
        """Return all but the single predictions; ``beyond`` leaves out contexts within the budget."""
        return {
            "name": self.text.name,
            "kind": self.text.kind,
            "source": self.text.source,
            "sha256": self.text.sha256,
            "tokens": self.tokens,
            "prompt": self.prompt,
            "all": self.divergence.summary(),
            "beyond": self.beyond(budget),
            "buckets": self.bucket_rows(),
            "curve": self.curve(),
            "layers": [row.to_dict() for row in self.layers],
            "mean_layer": mean_layers(self.layers),
        }


def mean_layers(layers: Iterable[LayerMass]) -> dict[str, dict[str, float | None]]:
    """Return pattern -> means over the layers of density, captured mass, oracle and recall."""
    grouped: dict[str, list[LayerMass]] = {}
    for row in layers:
        grouped.setdefault(row.pattern, []).append(row)

    return {
        name: {
            "density": known_mean(row.density for row in rows),
            "captured": known_mean(row.captured for row in rows),
            "captured_min": min(row.captured for row in rows),
            "oracle": known_mean(row.oracle for row in rows),
            "recall": known_mean(row.recall for row in rows),
        }
        for name, rows in grouped.items()
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuickReport:
    """Result of ``eval --suite quick``.

    Attributes:
        command: Command line that repeats the evaluation.
        model: Facts about the evaluated model.
        against: Facts about the dense reference.
        visible_budget: Longest context within which every layer is dense; None if no layer is sparse.
        texts: One result per text.
        needles: Dense and sparse scores; empty if there were no needles.
        warnings: What limits the results.
        settings: All settings of the run.
        environment: Versions and device.
        seconds: Wall time.
        files: Files that were written.
    """

    command: str
    model: Mapping[str, Any]
    against: Mapping[str, Any]
    visible_budget: int | None
    texts: tuple[TextResult, ...]
    needles: Mapping[str, tuple[NeedleScore, ...]]
    warnings: tuple[str, ...]
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    seconds: float
    files: tuple[Path, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object (``schema`` 1)."""
        return {
            # The keys are a published format: tools read them by name.
            "schema": SCHEMA,
            "ok": True,
            "suite": "quick",
            "command": self.command,
            "model": dict(self.model),
            "against": dict(self.against),
            "visible_budget": self.visible_budget,
            "texts": [text.to_dict(self.visible_budget) for text in self.texts],
            "needles": {
                who: [dataclasses.asdict(score) for score in scores] for who, scores in self.needles.items()
            },
            "warnings": list(self.warnings),
            "settings": dict(self.settings),
            "environment": dict(self.environment),
            "seconds": round(self.seconds, 2),
            "files": [path.name for path in self.files],
        }

    def headline(self) -> str:
        """Return one line: budget, and per text the perplexity ratio, KL and top-1 beyond it."""
        budget = self.visible_budget
        parts = [f"visible budget {budget} tokens" if budget else "no layer is sparse"]
        for text in self.texts:
            last = self.texts_beyond(text)
            parts.append(
                f"{text.text.name}: perplexity x{last['ppl_ratio']:.3f}, KL {last['kl_mean']:.4f}, "
                f"top-1 {last['top1']:.1%}"
            )
        return " | ".join(parts)

    def texts_beyond(self, result: TextResult) -> dict[str, Any]:
        """Return the summary of a text over contexts beyond the budget, or over all if there are none."""
        return result.beyond(self.visible_budget)

    def tables(self) -> list[Table]:
        """Return rich tables: one per text, the layers, the needles."""
        tables = [_text_table(result, self.visible_budget) for result in self.texts]
        tables += [_layer_table(result) for result in self.texts if result.layers]
        if self.needles:
            tables.append(_needle_table(self.needles))
        return tables

    def write(self, folder: Path) -> list[Path]:
        """Write ``report.json``, ``buckets.csv``, ``positions.csv``, ``layers.csv`` and ``needles.csv``.

        Files without rows are left out. Each row names its text.
        """
        # File name -> its rows.
        tables = {
            "buckets.csv": [{"text": t.text.name, **r} for t in self.texts for r in t.bucket_rows()],
            "positions.csv": [{"text": t.text.name, **r} for t in self.texts for r in t.curve()],
            "layers.csv": [
                {"text": t.text.name, **flat_layer(row.to_dict())} for t in self.texts for row in t.layers
            ],
            "needles.csv": [
                {"model": who, **dataclasses.asdict(score)}
                for who, scores in self.needles.items()
                for score in scores
            ],
        }

        folder.mkdir(parents=True, exist_ok=True)  # why: the folder of --out, which may not exist yet
        written = [folder / name for name, rows in tables.items() if rows]
        for path in written:
            write_csv(path, tables[path.name])

        # The JSON is written last and lists all files.
        report = folder / "report.json"
        whole = dataclasses.replace(self, files=(*self.files, *written, report)).to_dict()
        write_whole(report, json.dumps(whole, indent=2, allow_nan=False) + "\n")
        return [*written, report]


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with equal keys as a CSV file; the keys are its header."""
    with path.open("w", newline="", encoding="utf-8") as file:  # why: a table in the folder of --out
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def flat_layer(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a :class:`LayerMass`, with lists as one text, for a CSV file."""
    gates = row["gates"] or {}
    return {
        **row,
        "captured_by_head": " ".join(f"{x:.6f}" for x in row["captured_by_head"]),
        "gates": " ".join(f"{name}={value:.6f}" for name, value in gates.items()),
    }


def after_prompt_warnings(scores_after_prompt: bool) -> list[str]:
    """Return the warning for texts of which only what follows a prompt is scored; empty otherwise."""
    if not scores_after_prompt:
        return []
    return [
        "some layers choose keys by later tokens of a prompt, or attend otherwise while decoding: texts are "
        "scored after a prompt, not in one pass"
    ]


def simple_table(title: str, columns: Sequence[str]) -> Table:
    """Return an empty rich table; its first column is aligned as text, the others as numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _text_table(result: TextResult, budget: int | None) -> Table:
    """Return the table of one text: a line per range of context, then all of it."""
    about = f"visible budget {budget}" if budget else "no layer is sparse"
    after = f", scored after a prompt of {result.prompt}" if result.prompt else ""
    title = f"{result.text.name}, {result.tokens} tokens{after}, {about}\n{result.text.source}"

    columns = ("context", "tokens", "dense ppl", "sparse", "ratio", "KL", "KL p99", "top-1", "top-5")
    table = simple_table(title, columns)

    for row in [*result.bucket_rows(), {"context": "all", **result.divergence.summary()}]:
        table.add_row(
            row["context"],
            str(row["tokens"]),
            f"{row['dense_ppl']:.4g}",
            f"{row['sparse_ppl']:.4g}",
            f"{row['ppl_ratio']:.4f}",
            f"{row['kl_mean']:.2g}",
            f"{row['kl_p99']:.2g}",
            f"{row['top1']:.1%}",
            f"{row['top5']:.1%}",
        )
    return table


def _layer_table(result: TextResult) -> Table:
    """Return the means over layers and the layers that capture least; the files have all layers."""
    columns = ("layer", "pattern", "density", "captured", "oracle", "worst head")
    title = f"{result.text.name}: captured attention mass beyond the budget"
    table = simple_table(title, columns)

    # One line per pattern with its means.
    for name, mean in mean_layers(result.layers).items():
        oracle = "-" if mean["oracle"] is None else f"{mean['oracle']:.3f}"
        table.add_row("mean", name, f"{mean['density']:.3f}", f"{mean['captured']:.3f}", oracle, "")

    # Then the layers whose choice of keys captures least.
    chosen = [row for row in result.layers if row.oracle is not None]
    for row in sorted(chosen, key=lambda row: row.captured)[:WORST_LAYERS]:
        table.add_row(
            str(row.layer),
            row.pattern,
            f"{row.density:.3f}",
            f"{row.captured:.3f}",
            f"{row.oracle:.3f}",
            f"{min(row.captured_by_head):.3f}",
        )
    return table


def _needle_table(needles: Mapping[str, Sequence[NeedleScore]]) -> Table:
    """Return the table of needles: a line per length, a column per kind of attention."""
    table = simple_table("needles, teacher-forced: hits/cases, answer NLL", ("length", *needles))
    for length in hits_by_length(next(iter(needles.values()))):
        cells = []
        for scores in needles.values():
            hits, cases = hits_by_length(scores)[length]
            nll = known_mean(score.nll for score in scores if score.length == length)
            cells.append(f"{hits}/{cases}  {nll:.3f}")
        table.add_row(str(length), *cells)
    return table
