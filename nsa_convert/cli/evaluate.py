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
from nsa_convert.cli.frame import common, hint, print_json, say, show_tables
from nsa_convert.errors import UsageError

SUITES = ("quick", "long", "full", "tasks", "compare")


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
    "--plan",
    "plans",
    multiple=True,
    metavar="NAME=FILE",
    help="A row of --suite compare: a file as convert --config takes it, or a head profile, FILE@SHARE.",
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
    plans: tuple[str, ...],
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure how far MODEL is from the dense model, what it still finds, how fast it is, and draw it."""
    from nsa_convert.cli.options import read_method
    from nsa_convert.hub import dense_folder, resolve_model

    settings, plan = read_method(method, pairs, suite_settings(suite))
    rows = _named_plans(suite, method, against, plans)

    folder = dense_folder(resolve_model(model, say=say), say)
    other = None if against is None else dense_folder(resolve_model(against, say=say), say)
    own: dict[str, Any] = {"plans": rows} if suite == "compare" else {"against": other, "plan": plan}

    report = _run(suite, folder, out, {**own, **settings})

    if as_json:
        print_json(report.to_dict())
        return

    show_tables(report.tables())
    for line in report.warnings:
        click.echo(f"Warning: {line}", err=True)
    click.echo(report.headline())

    if out is not None:
        click.echo(f"written: {out / 'report.html'}")
    elif suite in ("long", "full", "compare"):
        hint("--out DIR keeps the report, and lets a run that was killed go on")


def _run(suite: str, folder: Path, out: Path | None, options: dict[str, Any]) -> Any:
    """Return the report of a suite."""
    if suite == "quick":
        from nsa_convert.evaluation.suites.quick import run_quick

        return run_quick(folder, out_dir=out, say=say, **options)

    if suite == "tasks":
        from nsa_convert.evaluation.suites.lm_eval_tasks import run_tasks

        return run_tasks(folder, out_dir=out, say=say, **options)

    with cell_progress() as progress:
        if suite == "compare":
            from nsa_convert.evaluation.suites.compare import run_compare

            return run_compare(folder, out_dir=out, say=say, progress=progress, **options)

        from nsa_convert.evaluation.suites.long import run_long

        return run_long(folder, suite=suite, out_dir=out, say=say, progress=progress, **options)


def _named_plans(suite: str, method: str | None, against: str | None, plans: tuple[str, ...]) -> list[Any]:
    """Return the rows that --plan adds.

    Raises:
        UsageError: An option that does not belong to the suite, or no NAME=FILE.
    """
    from nsa_convert.cli.options import read_named_plan

    if suite != "compare" and plans:
        raise UsageError(
            "--plan belongs to --suite compare", code="CL02", hint="a single plan: convert --config"
        )

    if suite == "compare" and (method is not None or against is not None):
        raise UsageError(
            "--suite compare measures several methods against MODEL itself; leave out --method and --against",
            code="CL02",
            hint="--set methods=nsa,ssa chooses the methods",
        )

    return [read_named_plan(plan) for plan in plans]


def suite_settings(suite: str) -> set[str]:
    """Return the names that --set takes for a suite."""
    from nsa_convert.evaluation.suites.compare_settings import CompareSettings
    from nsa_convert.evaluation.suites.lm_eval_tasks import TaskSettings
    from nsa_convert.evaluation.suites.long_settings import LongSettings
    from nsa_convert.evaluation.suites.quick_settings import QuickSettings

    kinds: dict[str, type] = {"quick": QuickSettings, "tasks": TaskSettings, "compare": CompareSettings}

    own = {"tasks": set(), "compare": {"text_file"}}.get(suite, {"text_file", "length"})
    return own | {field.name for field in dataclasses.fields(kinds.get(suite, LongSettings))}


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
            say(f"{name} ({done}/{total})")

    yield line
