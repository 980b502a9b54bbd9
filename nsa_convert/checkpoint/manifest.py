"""The list of files of a converted folder with their hashes, written last: a folder with it is complete."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nsa_convert.checkpoint.scan import hash_file, run_threads
from nsa_convert.errors import CheckpointError
from nsa_convert.strict_files import read_json_mapping

MANIFEST = "nsa_manifest.json"
REPORT = "conversion_report.json"
REPORT_LIMIT = 64_000_000
"""Bytes that a report of a conversion, a training or an evaluation may have."""
RECIPE = "recipe.yaml"
TRAINING = "training_report.json"
"""Lies in a folder that was trained after conversion."""
SOURCE_FOLDER = "source"
"""Holds the source's files that conversion replaced, byte for byte."""


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON in UTF-8, indented by two, with a newline at the end."""
    # why: inside the staging folder of the caller
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_manifest(folder: Path, known: Mapping[str, str], only: Sequence[str] = ("**/*",)) -> None:
    """Hash the files of a folder but an earlier manifest, and write the manifest.

    Args:
        folder: The folder.
        known: Hashes that are known already, by path inside the folder.
        only: Patterns of the files to list; all by default.
    """
    files = {}
    found = {path for pattern in only for path in folder.glob(pattern) if path.is_file()}
    for path in sorted(found):
        name = path.relative_to(folder).as_posix()
        if name == MANIFEST:
            continue
        files[name] = {"bytes": path.stat().st_size, "sha256": known.get(name) or hash_file(path)}

    write_json(folder / MANIFEST, {"schema": 1, "files": files})


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Return path -> ``{"bytes", "sha256"}`` of a converted folder.

    Raises:
        CheckpointError: There is no manifest, or it is damaged.
    """
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"{folder} has no {MANIFEST}: it was not written by `nsa-convert convert`, or is incomplete",
            code="SV17",
            where=str(folder),
            hint="convert the source again",
        )

    manifest = read_json_mapping(folder / MANIFEST, code="SV17")
    files = manifest.get("files")
    # Strict to the last key: the manifest is the one file whose hash is written nowhere.
    whole = manifest.keys() == {"schema", "files"} and manifest["schema"] == 1
    if not isinstance(files, dict) or not whole or not all(_is_entry(*item) for item in files.items()):
        raise CheckpointError(
            f"{MANIFEST} is damaged", code="SV17", where=MANIFEST, hint="convert the source again"
        )

    return files


def check_manifest(folder: Path) -> list[str]:
    """Return one line for every file that is missing or differs from the manifest."""

    def difference(item: tuple[str, dict[str, Any]]) -> str | None:
        name, entry = item
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes, it was written with {entry['bytes']:,}"
        return (
            None
            if hash_file(path) == entry["sha256"]
            else f"{name} was changed after conversion (sha256 differs)"
        )

    return [line for line in run_threads(difference, sorted(read_manifest(folder).items())) if line]


def _is_entry(name: str, entry: Any) -> bool:
    parts = Path(name).parts
    inside = bool(parts) and not Path(name).is_absolute() and ".." not in parts

    return (
        inside
        and isinstance(entry, dict)
        and entry.keys() == {"bytes", "sha256"}
        and isinstance(entry.get("sha256"), str)
        and type(entry.get("bytes")) is int
    )
