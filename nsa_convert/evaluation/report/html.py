"""The report as one self-contained HTML file, readable on a phone and with dark colours."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from nsa_convert.checkpoint.staging import write_whole
from nsa_convert.errors import MachineError
from nsa_convert.evaluation.report.compare_tables import tables as comparison_tables
from nsa_convert.evaluation.report.drawing import panel_svg, require_matplotlib
from nsa_convert.evaluation.report.plots import plots_of
from nsa_convert.evaluation.report.verdict import benchmark_cells, processor, task_rows, verdict
from nsa_convert.extras import pip_line

TEMPLATE = files("nsa_convert") / "templates" / "report.html"


def write_html(report: Mapping[str, Any], folder: Path) -> Path:
    """Write ``report.html`` from the JSON of an evaluation; it loads nothing and runs no script.

    Raises:
        MachineError: jinja2 or matplotlib is not installed.
    """
    require_html()
    path = folder / "report.html"
    write_whole(path, render_html(report))
    return path


def require_html() -> None:
    """Raise MachineError (CL11) if matplotlib or jinja2 is not installed."""
    require_matplotlib()
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise MachineError("the HTML report needs jinja2", code="CL11", hint=pip_line("eval")) from error


def render_html(report: Mapping[str, Any]) -> str:
    """Return the page; names and texts from the report are escaped."""
    from jinja2 import Environment

    # Drawings become part of the page.
    plots = [
        {
            "name": plot.name,
            "title": plot.title,
            "note": plot.note,
            "table": plot.table,
            "panels": [
                {"title": panel.title, "svg": panel_svg(panel, f"{plot.name}{number}")}
                for number, panel in enumerate(plot.panels)
            ],
        }
        for plot in plots_of(report)
    ]

    settings = {"settings": report.get("settings"), "environment": report.get("environment")}
    template = Environment(autoescape=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=f"{report['model']['name']}: sparse against dense attention",
        verdict=verdict(report),
        facts=_facts(report),
        warnings=report.get("warnings", []),
        command=report["command"],
        plots=plots,
        tables=[table for table in _tables(report) if table["rows"]],
        settings=json.dumps(settings, indent=2),
    )


def _facts(report: Mapping[str, Any]) -> list[str]:
    """Return the short facts below the title: budget, methods, reference, suite, machine, date."""
    machine = report["environment"]
    methods = ", ".join(f"{n} layers {name}" for name, n in report["model"]["layers_by_method"].items())
    against = report["against"].get("attention") or report["against"]["name"]
    budget = report.get("visible_budget")

    return [
        f"visible budget {budget} tokens" if budget else "no layer is sparse",
        methods or "dense model",
        f"dense reference: {against}",
        f"suite {report['suite']}",
        processor(machine),
        f"torch {machine['torch']}",
        machine["date"],
    ]


def _tables(report: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """Yield all tables as the template takes them; those without rows are left out by the caller."""
    # The rows of the suite `compare`.
    for table in comparison_tables(report):
        rows = [[_cell(value) for value in row] for row in table.rows]
        yield {"title": table.title, "header": table.header, "note": table.note, "rows": rows}

    yield {
        "title": "Scores by task",
        "header": ["task", "length", "dense", "sparse"],
        "note": "Share of right answers; in small type the cases and the 95 % interval.",
        "rows": [
            [_cell(row["task"]), _cell(row["length"]), _share(row["dense"]), _share(row["sparse"])]
            for row in task_rows(report)
        ],
    }

    yield {
        "title": "lm-eval",
        "header": ["task", "metric", "samples", "dense", "sparse", "95 % interval"],
        "note": "By the lm-eval harness. The interval is that of the sparse score, where it is a share.",
        "rows": [
            [_cell(row["task"]), _cell(row["metric"]), _cell(row["n"]), *map(_cell, benchmark_cells(row))]
            for row in report.get("benchmarks", [])
        ],
    }

    # One table per text: a line per range of context.
    for text in report.get("texts", []):
        yield {
            "title": f"{text['name']}: {text['tokens']} tokens",
            "header": ["context", "dense perplexity", "sparse", "ratio", "KL", "KL p99", "top-1", "top-5"],
            "note": f"{text['source']}, sha256 {text['sha256'][:16]}.",
            "rows": [
                [
                    _cell(value)
                    for value in (
                        row["context"],
                        f"{row['dense_ppl']:.4g}",
                        f"{row['sparse_ppl']:.4g}",
                        f"{row['ppl_ratio']:.4f}",
                        f"{row['kl_mean']:.2g}",
                        f"{row['kl_p99']:.2g}",
                        f"{row['top1']:.1%}",
                        f"{row['top5']:.1%}",
                    )
                ]
                for row in text["buckets"]
            ],
        }

    yield {
        "title": "Time and memory",
        "header": ["length", "attention", "prompt", "one token", "cache"],
        "note": "Medians; in small type the slowest repeat. Reading a prompt fills the cache.",
        "rows": [
            [
                _cell(row["length"]),
                _cell(row["attention"]),
                _cell(f"{row['prefill_s']:.3g} s", f"{row['prefill_max_s']:.3g}"),
                _cell(f"{row['decode_ms']:.3g} ms", f"{row['decode_max_ms']:.3g}"),
                _cell(f"{row['cache_bytes'] / 1e6:,.1f} MB"),
            ]
            for row in report.get("speed", [])
        ],
    }


def _cell(value: Any, small: str = "", share: float | None = None) -> dict[str, Any]:
    """Return a cell: its text, a remark in small type, and a share in percent to draw as a bar."""
    return {"text": value, "small": small, "share": share}


def _share(cell: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the cell of a score with its number of cases and interval; a dash for None."""
    if cell is None:
        return _cell("-")
    small = f"{cell['n']}, {cell['low']:.0%} to {cell['high']:.0%}"
    return _cell(f"{cell['score']:.0%}", small, round(100 * cell["score"], 1))
