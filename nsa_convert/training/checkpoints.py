"""Checkpoints that are whole or absent, and what a resumed run must agree with."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nsa_convert.errors import CheckpointError
from nsa_convert.patch.staging import machine_errors

COMPLETE = "complete.json"
"""Written last; lists the size of every file of a checkpoint."""
SAVING = ".saving"
NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "data_state.json")


def step_of(folder: Path) -> int:
    """Return the optimizer step in a checkpoint's name; -1 for another name."""
    found = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(found.group(1)) if found else -1


def checkpoints(stage: Path) -> list[Path]:
    """Return the checkpoint folders of a stage, newest first, whole or not."""
    found = [path for path in stage.glob("checkpoint-*") if step_of(path) >= 0] if stage.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Note the size of every file and flush all of it: from now on the folder counts as whole."""
    files = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != COMPLETE
    }
    (folder / COMPLETE).write_text(json.dumps({"files": files, **facts}, indent=1))
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None when it is whole."""
    try:
        facts = json.loads((folder / COMPLETE).read_text())
        files = dict(facts["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{COMPLETE} is missing or damaged"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    missing = [name for name in NEEDED if name not in files]
    if missing:
        return f"{', '.join(missing)} missing"
    return None


def newest(stage: Path, say: Callable[[str], None]) -> Path | None:
    """Return the newest whole checkpoint of a stage, passing over damaged ones with a warning.

    Raises:
        CheckpointError: There are checkpoints, but none is whole.
    """
    found = checkpoints(stage)
    for folder in found:
        reason = damage(folder)
        if reason is None:
            return folder
        say(f"warning [TR05]: {folder} is passed over: {reason}")
    if found:
        raise CheckpointError(
            f"no checkpoint in {stage} is whole: {damage(found[0])} in {found[0].name}",
            code="TR06",
            where=str(stage),
            hint="remove the folder to begin the stage again",
        )
    return None


def check_same_run(folder: Path, expected: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint that another recipe, model or number of processes wrote.

    Raises:
        CheckpointError: Something differs; every difference is named.
    """
    facts = json.loads((folder / COMPLETE).read_text())
    problems = [
        f"{key} is {facts.get(key)!r} in the checkpoint and {value!r} now"
        for key, value in expected.items()
        if facts.get(key) != value
    ]
    if problems:
        raise CheckpointError(
            f"{folder} belongs to another run: {'; '.join(problems)}",
            code="TR12",
            where=str(folder),
            hint="resume with the recipe and settings of the run, or choose another out",
        )


def publish(staging: Path, stage: Path, keep: int) -> Path:
    """Move a sealed checkpoint to its place, then remove old ones; the newest is never touched."""
    target = stage / staging.name
    with machine_errors():
        if target.exists():
            remove(target)
        staging.rename(target)
        sync(stage)
        for old in [path for path in checkpoints(stage) if path != target][max(0, keep - 1) :]:
            remove(old)
    return target


def remove(folder: Path) -> None:
    """Remove a checkpoint; its seal goes first, so that a half-removed one never counts as whole."""
    with contextlib.suppress(FileNotFoundError):
        (folder / COMPLETE).unlink()
    shutil.rmtree(folder, ignore_errors=True)
