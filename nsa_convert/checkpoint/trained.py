"""What a trained folder needs beside its weights to be verified, described and published."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsa_convert.checkpoint.manifest import (
    MANIFEST,
    RECIPE,
    REPORT,
    REPORT_LIMIT,
    SOURCE_FOLDER,
    TRAINING,
    read_manifest,
    write_json,
    write_manifest,
)
from nsa_convert.checkpoint.scan import hash_file
from nsa_convert.checkpoint.staging import copy_file
from nsa_convert.strict_files import read_json_mapping

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CARD = "README.md"
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
SAVED = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "*.py",
    TRAINING,
    REPORT,
    RECIPE,
    f"{SOURCE_FOLDER}/*",
    *LICENCES,
)
"""What a save makes of a model. Trainers keep logs and checkpoints beside it, and write a tokenizer, the
generation config and a card of their own after it."""


def seal_trained(
    folder: Path,
    *,
    recipe: Mapping[str, Any],
    stages: list[dict[str, Any]],
    source: Path | None,
    source_id: str,
    revision: str | None,
) -> None:
    """Write ``training_report.json``, ``recipe.yaml``, the source's card and licence, and the manifest.

    Args:
        folder: The trained model, complete but for these files.
        recipe: What trained it; the folder names in it are left out.
        stages: ``name, kind, tokens, steps, seq_len`` of every stage that was run.
        source: The checkpoint that training began from; None for a fresh model.
        source_id: Its name for others: a Hub id, or a folder's own name.
        revision: Its commit on the Hub.
    """
    import yaml

    # A source that was trained before brings its stages, a converted one the dense model it was made from.
    before = _report_of(source)
    stages = [*before.get("stages", []), *stages]
    kind = "safetensors" if source else "fresh"
    named = {"id": source_id, "revision": revision, "format": kind}
    base = before.get("source") or _origin(source) or {**named, "files": _hashes(source)}

    tokens = sum(stage["tokens"] for stage in stages)
    report = {"schema": 1, "tokens": tokens, "stages": stages, "source": base}
    write_json(folder / TRAINING, report)

    text = yaml.safe_dump(_public(dict(recipe)), sort_keys=False)
    # why: the recipe of a trained folder, inside the staging folder of the caller
    (folder / RECIPE).write_text(f"# nsa-convert train {RECIPE}\n{text}", encoding="utf-8")

    if source is not None:
        _carry_over(source, folder)
    # save_pretrained has just hashed the weights; what else it listed may have been written again since.
    weights = {name: known for name, known in _noted(folder).items() if name.endswith(".safetensors")}
    write_manifest(folder, weights)


def seal_saved(model: PreTrainedModel, folder: Path) -> None:
    """Write the training report, the source's card and licence, and the manifest, from what a model knows.

    For ``save_pretrained``, which any trainer calls: the number of tokens is known to that trainer alone, and
    the tokenizer's files are mostly written later. This package's own trainer writes a fuller report over it.
    The manifest lists what is ``SAVED``: whatever else lies there is the trainer's.

    Args:
        model: The model that was saved.
        folder: Where.
    """
    # A local folder is named without its place; anything else is a Hub id, or a model made in memory.
    name = getattr(model.config, "_name_or_path", "") or ""
    source = Path(name) if name and (Path(name) / "config.json").is_file() else None
    place = Path(name).resolve().name if source else name or "a fresh model"

    named: dict[str, Any] = {"id": place, "files": {}}
    origin = {**named, "revision": getattr(model.config, "_commit_hash", None)}
    origin["format"] = "safetensors" if name else "fresh"

    before = _report_of(source)
    base = before.get("source") or _origin(source) or origin
    report = {"schema": 1, "tokens": None, "stages": before.get("stages", []), "source": base}

    write_json(folder / TRAINING, report)
    if source is not None and source.resolve() != folder.resolve():
        _carry_over(source, folder)
    write_manifest(folder, {}, SAVED)


def _report_of(source: Path | None) -> dict[str, Any]:
    """Return the training report of a source that was trained before."""
    if source is None or not (source / TRAINING).is_file():
        return {}
    return read_json_mapping(source / TRAINING, limit=REPORT_LIMIT)


def _origin(source: Path | None) -> dict[str, Any] | None:
    """Return what a converted source was made from."""
    if source is None or not (source / REPORT).is_file():
        return None
    return read_json_mapping(source / REPORT, limit=REPORT_LIMIT)["source"]


def _noted(folder: Path) -> dict[str, str]:
    """Return name -> hash of the files that the manifest of a folder lists; nothing where it has none."""
    if not (folder / MANIFEST).is_file():
        return {}
    return {name: entry["sha256"] for name, entry in read_manifest(folder).items()}


def _hashes(source: Path | None) -> dict[str, dict[str, str]]:
    """Return name -> ``{"sha256"}`` of the weights of the source, from its manifest where it has one."""
    if source is None:
        return {}

    known = _noted(source)
    return {
        path.name: {"sha256": known.get(path.name) or hash_file(path)}
        for path in sorted(source.glob("*.safetensors"))
    }


def _public(values: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe in which names of folders stand for paths of this machine."""

    def name(text: Any) -> Any:
        return Path(text).name if isinstance(text, str) and (text.startswith(("/", "~", "."))) else text

    values = {key: value for key, value in values.items() if key != "out"}
    values["model"] = name(values.get("model"))
    for stage in values.get("stages", []):
        stage["data"] = [{**row, "path": name(row.get("path"))} for row in stage.get("data", [])]

    return {"out": "OUT", **values}


def _carry_over(source: Path, folder: Path) -> None:
    """Copy the card of the dense model and its licence files."""
    # A converted source keeps the dense model's card aside: its own card speaks of the conversion.
    kept = source / SOURCE_FOLDER / CARD
    card = kept if kept.is_file() else source / CARD
    if card.is_file():
        # why: the card of the source, inside the staging folder of the caller
        (folder / SOURCE_FOLDER).mkdir(exist_ok=True)
        (folder / SOURCE_FOLDER / CARD).unlink(missing_ok=True)
        copy_file(card, folder / SOURCE_FOLDER / CARD)

    for pattern in LICENCES:
        for path in source.glob(pattern):
            if path.is_file() and not (folder / path.name).exists():
                copy_file(path, folder / path.name)
