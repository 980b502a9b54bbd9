"""Checkpoints that are complete or absent, and the choice of the one to resume from."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nsa_convert.checkpoint.staging import machine_errors
from nsa_convert.errors import CheckpointError
from nsa_convert.notices import Say
from nsa_convert.training.run.optimizer_states import EARLIER_OPTIMIZER, OPTIMIZER, is_optimizer
from nsa_convert.training.run.trainer_states import SCHEDULER, unreadable

COMPLETE = "complete.json"
"""Written last; holds the size of every file of a checkpoint."""
SAVING = ".saving"
NEEDED = ("trainer_state.json", SCHEDULER, "data_state.json")


def step_of(folder: Path) -> int:
    """Return the optimizer step in a checkpoint's name; -1 for another name."""
    found = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(found.group(1)) if found else -1


def checkpoints(stage: Path) -> list[Path]:
    """Return the checkpoint folders of a stage, newest first, damaged ones included."""
    found = [path for path in stage.glob("checkpoint-*") if step_of(path) >= 0] if stage.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Record the size of every file and flush all files: from then on the folder counts as complete."""
    files = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != COMPLETE
    }

    # why: the seal of a checkpoint, written last
    (folder / COMPLETE).write_text(json.dumps({"files": files, **facts}, indent=1))

    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Flush a file or folder to disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def damage(folder: Path) -> dict[str, str]:
    """Return file name -> what is wrong with it, by presence and size; empty for a complete checkpoint."""
    try:
        facts = json.loads((folder / COMPLETE).read_text())
        files = dict(facts["files"])
    except (OSError, ValueError, KeyError, TypeError):
        # why: an unreadable seal is returned as the damage it is
        return {COMPLETE: f"{COMPLETE} is missing or damaged"}

    problems = {name: f"{name} is missing" for name in NEEDED if name not in files}
    if not any(is_optimizer(name) for name in files):
        old = EARLIER_OPTIMIZER in files
        reason = f"is in the form of an earlier version ({EARLIER_OPTIMIZER})" if old else "is missing"
        problems[OPTIMIZER] = f"the optimizer's state {reason}"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            problems[name] = f"{name} is missing"
        elif path.stat().st_size != size:
            problems[name] = f"{name} has {path.stat().st_size} bytes instead of {size}"
    return problems


def newest(stage: Path, say: Say, *, partial: bool = False) -> tuple[Path | None, frozenset[str]]:
    """Choose the newest usable checkpoint of a stage; damaged ones are passed over with a warning.

    Args:
        stage: Folder of the stage.
        say: Called with warnings.
        partial: Accept one whose optimizer, schedule or random states are missing or damaged.

    Returns:
        The checkpoint, None where there is none at all, and the names of its state files not to be loaded.

    Raises:
        CheckpointError: There are checkpoints, but none is usable (TR06); one contains code (TR13) or NaN
            (TR08).
    """
    found = checkpoints(stage)
    first = ""
    for folder in found:
        # Sizes first; files are only read where nothing is missing that a run needs.
        problems = damage(folder)
        if all(_optional(name) for name in problems):
            problems |= unreadable(folder, step_of(folder), frozenset(problems))

        if not problems:
            return folder, frozenset()

        reason = "; ".join(problems.values())
        if partial and all(_optional(name) for name in problems):
            say(f"warning [TR06]: going on from {folder.name} although {reason}: this is not the same run")
            return folder, frozenset(problems)

        # The message names the newest one, which the user expects to be used.
        first = first or f"{folder.name}: {reason}"
        say(f"warning [TR05]: {folder} is passed over: {reason}")

    if found:
        raise CheckpointError(
            f"no checkpoint in {stage} is whole ({first})",
            code="TR06",
            where=str(stage),
            hint="--allow-partial-resume goes on where only optimizer, schedule or random states are "
            "missing, with other numbers; or remove the folder to begin the stage again",
        )
    return None, frozenset()


def _optional(name: str) -> bool:
    """Return whether a run can continue without a file, though with other numbers than before."""
    return name == SCHEDULER or is_optimizer(name) or name.startswith("rng_state")


def publish(staging: Path, stage: Path, keep: int, *, spared: int = 0) -> Path:
    """Move a sealed checkpoint to its place, then remove old ones; the newest is never removed.

    Args:
        staging: The sealed checkpoint.
        stage: Folder of the stage.
        keep: Number of checkpoints to keep, this one included.
        spared: Step of one that is kept however old it is.

    Returns:
        The checkpoint in its place.
    """
    target = stage / staging.name
    with machine_errors():
        if target.exists():
            remove(target)
        staging.rename(target)  # why: sealed and whole, so it takes its final name
        sync(stage)

        # Old ones go only after the new one is safely on disk.
        for old in [path for path in checkpoints(stage) if path != target][max(0, keep - 1) :]:
            if step_of(old) != spared:
                remove(old)
    return target


def release_optimizer(stage: Path) -> None:
    """Remove the optimizer's state from the checkpoints of a finished stage, two thirds of their size."""
    for folder in checkpoints(stage):
        # why: a stage that has its model is never resumed; another call may have removed it before
        shutil.rmtree(folder / OPTIMIZER, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove a checkpoint; its seal first, so that a half-removed one never counts as complete."""
    with contextlib.suppress(FileNotFoundError):  # why: a checkpoint without a seal is removed just the same
        (folder / COMPLETE).unlink()  # why: without its seal a half-removed checkpoint never counts as whole
    shutil.rmtree(folder, ignore_errors=True)
