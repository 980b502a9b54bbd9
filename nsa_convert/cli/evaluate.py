"""The command ``eval``."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from nsa_convert.cli.commands import main
from nsa_convert.cli.frame import common, hint, print_json, show_tables, tell

SUITES = ("quick", "long", "full", "tasks")


@main.command(name="eval")
@click.argument("model")
@click.option("--method", help="Run the unmodified dense MODEL with this method; nothing is written to it.")
@click.option("--against", help="The dense MODEL to compare with; the weights of MODEL when left out.")
@click.option(
    "--suite", type=click.Choice(SUITES), default="quick", show_default=True, help="What to measure."
)
@click.option(
    "--set",
    "pairs",
    multiple=True,
    metavar="KEY=VALUE",
    help="A setting of the suite or of the --method, or text_file, length.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for the reports, tables and plots; a long suite that was killed resumes from it.",
)
@common
def evaluate(
    model: str,
    method: str | None,
    against: str | None,
    suite: str,
    pairs: tuple[str, ...],
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure how far MODEL is from the dense model, what it still finds, how fast it is, and draw it."""
    from nsa_convert.cli.options import read_method
    from nsa_convert.evaluation.lm_eval_adapter import run_tasks
    from nsa_convert.evaluation.long import run_long
    from nsa_convert.evaluation.quick import run_quick
    from nsa_convert.hub import dense_folder, resolve_model

    settings, plan = read_method(method, pairs, suite_settings(suite))
    folders = [
        None if name is None else dense_folder(resolve_model(name, tell=tell), tell)
        for name in (model, against)
    ]
    if suite == "quick":
        report: Any = run_quick(
            folders[0], against=folders[1], out_dir=out, progress=tell, plan=plan, **settings
        )
    elif suite == "tasks":
        report = run_tasks(folders[0], against=folders[1], out_dir=out, say=tell, plan=plan, **settings)
    else:
        with cell_progress() as progress:
            report = run_long(
                folders[0],
                suite=suite,
                against=folders[1],
                out_dir=out,
                say=tell,
                progress=progress,
                plan=plan,
                **settings,
            )
    if as_json:
        print_json(report.to_dict())
        return
    show_tables(report.tables())
    for line in report.warnings:
        click.echo(f"Warning: {line}", err=True)
    click.echo(report.headline())
    if out is not None:
        click.echo(f"written: {out / 'report.html'}")
    elif suite in ("long", "full"):
        hint("--out DIR keeps the report, and lets a run that was killed go on")


def suite_settings(suite: str) -> set[str]:
    """Return the names that --set takes for a suite."""
    from nsa_convert.evaluation.lm_eval_adapter import TaskSettings
    from nsa_convert.evaluation.long_settings import LongSettings
    from nsa_convert.evaluation.settings import QuickSettings

    if suite == "tasks":
        return {field.name for field in dataclasses.fields(TaskSettings)}
    settings = QuickSettings if suite == "quick" else LongSettings
    return {"text_file", "length", *(field.name for field in dataclasses.fields(settings))}


@contextlib.contextmanager
def cell_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a callback: a bar for each part on a terminal, elsewhere a line for every tenth."""
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bars:
            tasks: dict[str, Any] = {}

            def draw(name: str, done: int, total: int) -> None:
                part = name.partition(",")[0] if name.startswith("texts") else "prompts"
                if part not in tasks:
                    tasks[part] = bars.add_task(part, total=total)
                bars.update(tasks[part], completed=done, description=name)

            yield draw
        return

    def line(name: str, done: int, total: int) -> None:
        if done * 10 // total > (done - 1) * 10 // total:
            tell(f"{name} ({done}/{total})")

    yield line
