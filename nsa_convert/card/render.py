"""The model card of a converted checkpoint: what it is made from, what was measured, what it cannot do."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from nsa_convert.card.facts import (
    CARD,
    EVAL_RESULTS,
    check_card,
    hub_source,
    is_current,
    licence_of,
    read_evaluations,
    read_facts,
)
from nsa_convert.checkpoint.manifest import RECIPE, read_manifest
from nsa_convert.checkpoint.staging import write_whole
from nsa_convert.errors import ConfigError, MachineError
from nsa_convert.evaluation.report.verdict import benchmark_cells, processor, task_rows, verdict
from nsa_convert.extras import pip_line

TEMPLATE = files("nsa_convert") / "templates" / "model_card.md"
PLACEHOLDER_OWNER = "ORG"
"""Stands for the owner of the repository until ``push`` knows it."""

PLOTS = {
    "perplexity.png": "Perplexity by position, dense and sparse",
    "needles.png": "Needles found by length and depth, dense and sparse",
    "layers.png": "Attention mass captured by layer",
    "speed.png": "Time against length",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CardReport:
    """A card that was written.

    Attributes:
        path: The file.
        evaluations: Commands of the evaluations it shows.
        warnings: What is missing from it.
    """

    path: Path
    evaluations: list[str]
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {"path": str(self.path), "evaluations": self.evaluations, "warnings": self.warnings}

    def to_text(self) -> str:
        """Return the report for people."""
        return f"written: {self.path} ({len(self.evaluations)} evaluations)"


def write_card(
    folder: str | Path,
    *,
    license: str | None = None,
    base_model: str | None = None,
    name: str | None = None,
    out: str | Path | None = None,
) -> CardReport:
    """Write ``README.md`` and ``.eval_results/`` of a converted folder.

    Args:
        folder: The converted folder. Evaluations are read from its sub-folder ``evaluation``.
        license: Licence id of the Hub; the source card's when left out.
        base_model: Hub id of the dense model; the source's when it came from the Hub.
        name: Title; the folder's name when left out.
        out: Write the card to this file instead, and no ``.eval_results/``.

    Raises:
        CheckpointError: The folder is not a converted one, or holds a damaged report.
        ConfigError: The licence is not known and none is given (HB16), or the card is not valid (HB15).
        MachineError: jinja2 is not installed.
    """
    folder = Path(folder)
    text, results, reports, warnings = _render(folder, license, base_model, name)

    path = folder / CARD if out is None else Path(out)
    write_whole(path, text)
    if out is None and results:
        _write_eval_results(folder, results)
    return CardReport(path=path, evaluations=[r["command"] for r in reports], warnings=warnings)


def _render(
    folder: Path, license: str | None, base_model: str | None, name: str | None
) -> tuple[str, list[Any], list[dict[str, Any]], list[str]]:
    """Return the text, the results for the Hub, the evaluations and warnings."""
    read_manifest(folder)
    facts, training = read_facts(folder)

    known = (folder / RECIPE).is_file()
    recipe = (folder / RECIPE).read_text(encoding="utf-8").rstrip() if known else ""

    # Only evaluations of exactly these files are shown.
    evaluations = read_evaluations(folder)
    reports = [report for report in evaluations if is_current(report, folder)]
    warnings = [] if reports else ["no evaluation of this model: the card shows no results"]
    if len(reports) < len(evaluations):
        warnings.append(f"{len(evaluations) - len(reports)} evaluations of other files were left out")

    name = name or folder.resolve().name
    base = base_model or hub_source(facts)
    if base is None:
        warnings.append("the base model is not a Hub id; --base-model ORG/NAME names it")

    header = {**licence_of(folder, license), **({"base_model": base} if base else {})}
    results = [row for report in reports for row in _results(report)]

    # Checked before anything is written.
    text = _fill(folder, facts, training, recipe, reports, header, name, results)
    if problems := check_card(text):
        raise ConfigError("; ".join(problems), code="HB15", where=CARD)

    return text, results, reports, warnings


def _fill(
    folder: Path,
    facts: Mapping[str, Any],
    training: Mapping[str, Any] | None,
    recipe: str,
    reports: list[dict[str, Any]],
    header: dict[str, Any],
    name: str,
    results: list[Any],
) -> str:
    from huggingface_hub import ModelCard, ModelCardData  # why: data classes for a card; nothing is sent

    methods = list(dict.fromkeys(run["method"] for run in facts["layers"]))
    if "base_model" in header:
        header = {**header, "base_model_relation": "finetune"}
    data = ModelCardData(
        **header,
        library_name="transformers",
        pipeline_tag="text-generation",
        model_name=name,
        tags=["sparse-attention", "nsa-convert", "custom_code", *(m for m in methods if m != "full")],
        eval_results=results or None,
    )

    values = {
        "name": name,
        "title": f"A {facts['family']} model",
        "methods": " and ".join(methods),
        "versions": facts["versions"],
        "verdict": verdict(reports[-1]) if reports else "It was not evaluated.",
        "repo": f"{PLACEHOLDER_OWNER}/{name}",
        "source": facts["source"],
        "files": [(file, entry["sha256"]) for file, entry in sorted(facts["source"]["files"].items())],
        "licence": header.get("license_name") or header["license"],
        "kept_parameters": f"{facts['kept_parameters']:,}",
        "kept_tensors": facts["kept_tensors"],
        "new_parameters": f"{facts['new_parameters']:,}",
        "new_tensors": len(facts["new_tensors"]),
        "trained": _training_text(training),
        "layers": [_layer_row(run) for run in facts["layers"]],
        "dense_until": facts["dense_until"],
        "costs": [_cost_row(row) for row in facts["costs"]],
        "reports": [_report_values(report, folder) for report in reports],
        "limits": _limits(facts, training, reports),
        "recipe": recipe,
    }

    try:
        card = ModelCard.from_template(data, template_path=str(TEMPLATE), **values)
    except ImportError as error:
        raise MachineError("cards need jinja2", code="CL11", hint=pip_line("eval")) from error
    return re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"


def _training_text(training: Mapping[str, Any] | None) -> str:
    if not training:
        return ""

    stages = [f"{stage['name']} ({stage['tokens']:,} tokens)" for stage in training.get("stages", [])]
    total = "an unknown number of tokens" if training["tokens"] is None else f"{training['tokens']:,} tokens"
    return total + (f": {', '.join(stages)}" if stages else "")


def _layer_row(run: Mapping[str, Any]) -> dict[str, Any]:
    scope = {key: run[key] for key in ("heads", "phase") if key in run}
    return {**run, "text": " ".join(f"{key}={value}" for key, value in {**scope, **run["settings"]}.items())}


def _cost_row(row: Mapping[str, Any]) -> dict[str, str]:
    bound = "at most " if row["prefill_depends_on_text"] else ""
    return {
        "context": f"{row['context']:,}",
        "dense": megabytes(row["dense_kv_bytes"]),
        "sparse": megabytes(row["sparse_kv_bytes"]),
        "work": f"{bound}{row['sparse_prefill_flops'] / row['dense_prefill_flops']:.2f}",
    }


def megabytes(count: float) -> str:
    """Return a number of bytes as text, in MB or GB."""
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


def _report_values(report: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    machine = report["environment"]
    place = report["folder"]

    inside = place.relative_to(folder).as_posix()
    plots = [{"path": f"{inside}/{n}", "alt": alt} for n, alt in PLOTS.items() if (place / n).is_file()]

    return {
        "command": report["command"],
        "machine": f"{processor(machine)}, torch {machine['torch']}, "
        f"transformers {machine['transformers']}, Python {machine['python']}, {machine['date']}",
        "texts": [_text_row(text) for text in report.get("texts", [])],
        "tasks": [
            {**row, "dense": _score(row["dense"]), "sparse": _score(row["sparse"])}
            for row in task_rows(report)
            if row["main"]
        ],
        "speed": _speed_rows(report),
        "benchmarks": [{**row, "cells": benchmark_cells(row)} for row in report.get("benchmarks", [])],
        "plots": plots,
        "html": f"{inside}/report.html" if (place / "report.html").is_file() else None,
    }


def _text_row(text: Mapping[str, Any]) -> dict[str, str]:
    beyond = text["beyond"]
    return {
        "name": text["name"],
        "tokens": text["tokens"],
        "dense_ppl": f"{beyond['dense_ppl']:.4g}",
        "sparse_ppl": f"{beyond['sparse_ppl']:.4g}",
        "ratio": f"x{beyond['ppl_ratio']:.3f}",
        "kl": f"{beyond['kl_mean']:.2g}",
        "top1": f"{beyond['top1']:.1%}",
    }


def _score(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "-"
    return f"{cell['score']:.2f} (n={cell['n']}, {cell['low']:.2f} to {cell['high']:.2f})"


def _speed_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows: dict[int, dict[str, Any]] = {}

    # One line for each length, with the columns of both kinds of attention.
    for row in report.get("speed", []):
        mode = row["attention"]
        line = rows.setdefault(row["length"], {"length": row["length"]})
        line[f"prefill_{mode}"] = f"{row['prefill_s']:.3g} s"
        line[f"decode_{mode}"] = f"{row['decode_ms']:.3g} ms"
        line[f"cache_{mode}"] = megabytes(row["cache_bytes"])

    return [rows[length] for length in sorted(rows)]


def _results(report: Mapping[str, Any]) -> list[Any]:
    """Return the figures as entries of a model-index."""
    from huggingface_hub import EvalResult  # why: a data class for a card; nothing is sent

    common: dict[str, Any] = {"task_type": "text-generation", "task_name": "Text generation"}
    out = []

    # Texts: three figures each, measured beyond the visible budget.
    for text in report.get("texts", []):
        place: dict[str, Any] = {"dataset_type": f"nsa-convert-text-{text['name']}"}
        place |= {"dataset_name": text["source"], "dataset_revision": text["sha256"]}
        for metric, title, key in (
            ("perplexity", "Perplexity beyond the visible budget", "sparse_ppl"),
            ("kl_divergence", "KL from the dense model beyond the visible budget", "kl_mean"),
            ("top1_agreement", "Same first choice as the dense model", "top1"),
        ):
            value = round(text["beyond"][key], 6)
            out.append(
                EvalResult(**common, **place, metric_type=metric, metric_name=title, metric_value=value)
            )

    # Tasks: one score for each length.
    for row in task_rows(report):
        if row["sparse"]:
            # The config tells results apart: the Hub lists those of one type and config as one result.
            place = {
                "dataset_type": "nsa-convert-synthetic",
                "dataset_name": f"{row['task']} at {row['length']}",
                "dataset_config": f"{row['task']}-{row['length']}".replace(", ", "-").replace(" ", "-"),
            }
            value = round(row["sparse"]["score"], 6)
            title = f"Score, n={row['sparse']['n']}"
            out.append(
                EvalResult(**common, **place, metric_type="accuracy", metric_name=title, metric_value=value)
            )

    return out


def _write_eval_results(folder: Path, results: list[Any]) -> None:
    """Write the same figures in the Hub's newer format."""
    import yaml

    # why: data classes for a card; nothing is sent
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    entries = [
        EvalResultEntry(
            dataset_id=f"nsa-convert/{row.dataset_type.removeprefix('nsa-convert-')}",
            task_id=f"{row.dataset_name}: {row.metric_name}",
            value=row.metric_value,
            notes="measured by nsa-convert eval on generated data or texts of Python",
        )
        for row in results
    ]

    path = folder / EVAL_RESULTS
    write_whole(path, yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False))


def _limits(
    facts: Mapping[str, Any], training: Mapping[str, Any] | None, reports: list[dict[str, Any]]
) -> list[str]:
    lines = []

    if facts["dense_until"] and not training:
        lines.append(
            f"It was not trained after conversion: beyond {facts['dense_until']} tokens it approximates the "
            "dense model, on other texts perhaps worse than on those measured here."
        )

    if facts["source"]["format"] == "gguf":
        lines.append("The source is a quantised GGUF file, so it is less exact than the original weights.")

    if not any(report.get("speed") for report in reports):
        lines.append("Speed was not measured. Sparse attention saves time on long contexts only.")

    # A score on few cases says little.
    small = [r["sparse"]["n"] for report in reports for r in task_rows(report) if r["sparse"]]
    if small and min(small) < 30:
        cases = "a single case" if min(small) == 1 else f"{min(small)} cases"
        lines.append(f"Some retrieval scores rest on {cases} only; mind their 95 % intervals.")

    # What holds for every evaluation and every model; the same warning is shown once.
    lines += [line for report in reports for line in report.get("warnings", [])]
    lines.append("Continuous batching and custom 4-D attention masks are refused with an error.")
    lines.append("It inherits the knowledge, the biases and the licence of the dense model.")
    return list(dict.fromkeys(lines))
