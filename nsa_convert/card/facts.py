"""Facts about a converted or trained folder, read from its files: conversion, licence, evaluations."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nsa_convert import __version__
from nsa_convert.checkpoint.manifest import REPORT, REPORT_LIMIT, SOURCE_FOLDER, TRAINING
from nsa_convert.checkpoint.source import SPARSE_TENSOR, open_converted
from nsa_convert.config import SparseAttentionConfig
from nsa_convert.convert import layer_table
from nsa_convert.errors import CheckpointError, ConfigError
from nsa_convert.estimate import CONTEXTS, context_costs, dense_until
from nsa_convert.evaluation.report.identity import manifest_hash
from nsa_convert.plan import resolve_plan
from nsa_convert.strict_files import parse_yaml, read_json_mapping

CARD = "README.md"
EVALUATION_FOLDER = "evaluation"
EVAL_RESULTS = ".eval_results/nsa-convert.yaml"

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
LICENCE_KEYS = ("license", "license_name", "license_link")


def read_facts(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the facts of a folder's conversion and, where it was trained, its training report.

    A folder that was only converted has a report that says so. For a trained one the same keys are read
    from its config and the headers of its weights.

    Returns:
        The facts of the conversion, and the training report or None.

    Raises:
        CheckpointError: A report is damaged.
    """
    # A folder that was only converted.
    if not (folder / TRAINING).is_file():
        return read_json_mapping(folder / REPORT, limit=REPORT_LIMIT, code="SV17"), None

    training = read_json_mapping(folder / TRAINING, limit=REPORT_LIMIT, code="SV17")
    if (folder / REPORT).is_file():
        return read_json_mapping(folder / REPORT, limit=REPORT_LIMIT, code="SV17"), training

    # A trained folder has no conversion report: the same facts from its config and its headers.
    checkpoint = open_converted(folder)
    plan = SparseAttentionConfig.from_dict(checkpoint.config["sparse_attention"])
    methods = resolve_plan(plan, checkpoint.num_layers, checkpoint.geometry)
    tensors = checkpoint.weights.tensors()
    new = {name for name in tensors if SPARSE_TENSOR.match(name)}
    width = checkpoint.weights.value_bytes()

    facts = {
        "versions": {"nsa_convert": __version__},
        "source": training["source"],
        "family": checkpoint.family.title,
        "layers": layer_table(plan, checkpoint.num_layers, checkpoint.geometry.num_kv_heads),
        "kept_tensors": len(tensors) - len(new),
        "kept_parameters": sum(entry.size for name, entry in tensors.items() if name not in new),
        "new_tensors": sorted(new),
        "new_parameters": sum(tensors[name].size for name in new),
        "dense_until": dense_until(methods),
        "costs": [
            dataclasses.asdict(c) for c in context_costs(methods, checkpoint.geometry, width, CONTEXTS)
        ],
    }

    return facts, training


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """Return the reports in ``evaluation/`` and its sub-folders; each knows its own ``folder``.

    Raises:
        CheckpointError: A report is not one of this package.
    """
    base = folder / EVALUATION_FOLDER
    reports = []

    # One report in the folder itself, and one in each sub-folder, such as `quick` and `long`.
    for path in [base / "report.json", *sorted(base.glob("*/report.json"))]:
        if path.is_file():
            report = read_json_mapping(path, limit=REPORT_LIMIT)
            if report.get("schema") != 1 or "command" not in report:
                raise CheckpointError(
                    f"{path} is no report of `nsa-convert eval`",
                    code="EV13",
                    where=str(path),
                    hint=f"nsa-convert eval {folder} --out {base}",
                )
            reports.append({**report, "folder": path.parent})

    return reports


def is_current(report: Mapping[str, Any], folder: Path) -> bool:
    """Return whether a report was made of exactly the files in the folder: of the same manifest."""
    return report.get("model", {}).get("manifest_sha256") == manifest_hash(folder)


def check_card(text: str) -> list[str]:
    """Return what is wrong or missing in a card's header; the Hub is not asked."""
    # why: its checks of a card's header run on this machine; nothing is sent
    from huggingface_hub import ModelCard

    try:
        data = ModelCard(text).data
    except Exception as error:  # why: whatever yaml or huggingface_hub say about a header is the reason shown
        return [f"the header cannot be read: {str(error).splitlines()[0]}"]

    problems = [f"the header has no {key}" for key in ("license", "library_name") if not data.get(key)]
    base = data.get("base_model")
    if base is not None and not (isinstance(base, str) and HUB_ID.fullmatch(base)):
        problems.append(f"base_model {base!r} is no Hub id")
    if data.get("license") == "other" and not data.get("license_name"):
        problems.append("license: other needs license_name and license_link")

    return problems


def hub_source(facts: Mapping[str, Any]) -> str | None:
    """Return the Hub id of the dense model; None where its name is that of a local folder."""
    name = facts["source"]["id"]
    return name if HUB_ID.fullmatch(name) else None


def licence_of(folder: Path, given: str | None) -> dict[str, str]:
    """Return the licence keys of the header: those given, else those of the source's card."""
    if given is not None:
        return {"license": given}

    # The header of the source's card lies between two lines of dashes.
    readme = folder / SOURCE_FOLDER / CARD
    if readme.is_file():
        match = re.match(
            r"---\s*\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL
        )
        values = parse_yaml(match[1], "the source's card") if match else None
        if isinstance(values, dict) and isinstance(values.get("license"), str):
            return {key: str(values[key]) for key in LICENCE_KEYS if values.get(key)}

    raise ConfigError(
        "the licence of the source is not known",
        code="HB16",
        where=str(folder),
        hint="give --license ID, the licence of the dense model (apache-2.0, llama3.2, ...)",
    )
