"""The log of a run, one JSON line per entry, and the progress lines made from it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nsa_convert.training.recipe.schema import Stage


def progress_line(stage: Stage, step: int, logs: Mapping[str, float]) -> str:
    """Return one line of progress: losses first, then rate, speed and the time that is left."""
    # Shown in another format, or not at all.
    hidden = ("loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu", "epoch")

    parts = [f"{stage.name} {step}/{stage.steps}", f"loss {logs['loss']:.4f}"]
    parts += [f"{key} {value:.4f}" for key, value in logs.items() if key not in hidden]

    parts.append(f"lr {logs.get('learning_rate', 0.0):.2e}")
    parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in logs:
        parts.append(f"MFU {100 * logs['mfu']:.1f} %")

    left = (stage.steps - step) * stage.batch_tokens / max(logs["tokens_per_second"], 1e-9)
    parts.append(f"{left / 60:.1f} min left")
    return "  ".join(parts)


def read_log(log_file: Path, stage: str) -> list[dict[str, Any]]:
    """Return the log entries of a stage; a line cut off by a crash is left out."""
    rows = []
    for line in log_file.read_text().splitlines() if log_file.is_file() else ():
        with contextlib.suppress(ValueError):  # why: a line cut off by a kill is left out
            rows.append(json.loads(line))
    return [row for row in rows if row["stage"] == stage]


def trim_log(log_file: Path, stage: str, step: int) -> None:
    """Remove the entries of a stage after optimizer step ``step``: a resumed run writes them again."""
    if not log_file.is_file():
        return
    kept = []
    for line in log_file.read_text().splitlines():
        with contextlib.suppress(ValueError):  # why: a line cut off by a kill is left out
            row = json.loads(line)
            if row["stage"] != stage or row["step"] <= step:
                kept.append(line)

    aside = log_file.with_suffix(".tmp")
    # why: the log of a resumed run, renamed into place
    aside.write_text("".join(f"{line}\n" for line in kept))
    aside.replace(log_file)
