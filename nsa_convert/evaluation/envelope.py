"""What the reports of all suites begin with, and how they are written."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nsa_convert.evaluation.html import write_html
from nsa_convert.evaluation.identity import command_line, describe_machine, describe_model
from nsa_convert.evaluation.long_report import LongReport
from nsa_convert.evaluation.models import ModelFacts
from nsa_convert.evaluation.plots import write_plots
from nsa_convert.evaluation.report import SCHEMA


def envelope(
    suite: str,
    models: Sequence[ModelFacts],
    *,
    given: Mapping[str, Any],
    chosen: Any,
    device: str,
    begin: float,
    files: Mapping[str, str | Path | None] | None = None,
    plans: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the keys that every report has, with nothing measured yet.

    Args:
        suite: Its name.
        models: The evaluated model, and the dense reference when it is another checkpoint.
        given: Settings that were given, None where one was left out.
        chosen: Dataclass of all settings.
        device: ``cpu`` or ``cuda``.
        begin: ``time.perf_counter()`` when the run began.
        files: Settings that are files or folders; the report names them without the folders they lie in.
        plans: ``NAME=FILE`` of further rows.
    """
    named = {key: None if path is None else Path(path).resolve().name for key, path in (files or {}).items()}
    shown = {key: value for key, value in {**given, **named}.items() if value is not None}
    against = models[1] if len(models) == 2 else None
    return {
        "schema": SCHEMA,
        "ok": True,
        "suite": suite,
        "command": command_line(models[0], against, suite, shown, plans),
        "model": describe_model(models[0]),
        "against": describe_model(models[-1], same_weights=against is None),
        "visible_budget": models[0].visible_budget,
        "texts": [],
        "needles": {},
        "tasks": [],
        "speed": [],
        "warnings": [],
        "settings": {**dataclasses.asdict(chosen), **named},
        "environment": describe_machine(device),
        "seconds": round(time.perf_counter() - begin, 2),
        "files": [],
    }


def finish(values: Mapping[str, Any], out_dir: str | Path | None, say: Callable[[str], None]) -> LongReport:
    """Return the report, written with its plots, page and tables where there is a folder."""
    report = LongReport(values=json.loads(json.dumps(values)))
    if out_dir is None:
        return report
    say("drawing")
    folder = Path(out_dir)
    return report.write(folder, [*write_plots(values, folder), write_html(values, folder)])
