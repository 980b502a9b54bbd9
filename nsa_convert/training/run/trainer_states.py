"""State files of a checkpoint: loaded without running code, checked before they are used."""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nsa_convert.errors import CheckpointError
from nsa_convert.training.run.optimizer_states import bad_states, is_optimizer

SCHEDULER = "scheduler.pt"
STATE_FILES = ("*.pt", "*.pth")
JSON_FILES = ("trainer_state.json", "data_state.json")


class Damaged(Exception):
    """A file of a checkpoint cannot be read; an earlier checkpoint may be usable."""


def load_state(path: Path, device: Any = "cpu") -> Any:
    """Return the content of a ``torch.save`` file; only tensors and plain values, no code is run.

    Raises:
        CheckpointError: The file holds something else (TR13).
        Damaged: The file cannot be read.
    """
    from transformers.trainer_pt_utils import safe_globals

    try:
        with safe_globals(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Mapped, not read: only what is used is in memory, and changes stay in this process.
            mapped = device == "cpu" and zipfile.is_zipfile(path)  # torch's older format cannot be mapped
            return torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and plain values; nothing of it was run",
            code="TR13",
            where=str(path),
            hint=f"do not trust this run; remove {path.parent} to go on from the checkpoint before",
        ) from error
    except Exception as error:
        # why: torch and the zip reader raise many kinds for bytes that are no file of theirs
        raise Damaged(f"{path.name} cannot be read ({type(error).__name__})") from error


def unreadable(folder: Path, step: int, skip: frozenset[str] = frozenset()) -> dict[str, str]:
    """Read every state file of a checkpoint once; return file name -> what is wrong with it.

    Args:
        folder: The checkpoint.
        step: The optimizer step in its name.
        skip: Names of files that are not read.

    Raises:
        CheckpointError: A file contains code (TR13), or the optimizer's state NaN or infinity (TR08).
    """
    problems = {}

    # JSON files: each a mapping, that of the Trainer of the step in the folder's name.
    for name in JSON_FILES:
        try:
            values = json.loads((folder / name).read_text())
        except (OSError, ValueError, RecursionError) as error:
            problems[name] = f"{name} cannot be read ({type(error).__name__})"
            continue

        if not isinstance(values, dict):
            problems[name] = f"{name} holds no mapping"
        elif name == "trainer_state.json" and values.get("global_step") != step:
            problems[name] = f"{name} is of step {values.get('global_step')}"

    # States of torch: schedule, random numbers.
    for path in sorted(path for pattern in STATE_FILES for path in folder.glob(pattern)):
        if path.name in skip:
            continue

        try:
            load_state(path)
        except Damaged as error:
            problems[path.name] = str(error)

    # The optimizer's, where nothing of it is missing.
    if any(is_optimizer(name) for name in skip):
        return problems
    for name, reason, not_finite in bad_states(folder):
        # A state that cannot be used is worse than a damaged one: the run must not start from it unnoticed.
        if not_finite:
            raise CheckpointError(
                f"{folder / name}: {reason} holds NaN or infinity, which would reach every weight",
                code="TR08",
                where=str(folder / name),
                hint=f"remove {folder} to go on from the checkpoint before it",
            )
        problems[name] = reason

    return problems


def forward_schedule(scheduler: Any, step: int) -> None:
    """Set a schedule whose state was lost to an optimizer step: the rate is a function of the step alone."""
    inner = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it

    # The three attributes that LambdaLR itself keeps.
    inner.last_epoch = step
    inner._step_count = step + 1
    inner._last_lr = [base * form(step) for base, form in zip(inner.base_lrs, inner.lr_lambdas, strict=True)]


def state_bytes(model: nn.Module) -> int:
    """Return about how many bytes a checkpoint takes: weights, and the state of AdamW for those trained."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())

    # Two float32 moments, and a float32 master of a weight in half precision.
    trained = [p for p in model.parameters() if p.requires_grad]
    return weights + sum(p.numel() * (12 if p.element_size() < 4 else 2 * p.element_size()) for p in trained)
