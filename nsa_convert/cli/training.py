"""The commands ``train`` and ``recipes``."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from nsa_convert.cli.frame import common, hint, print_json, say, show
from nsa_convert.errors import UsageError
from nsa_convert.notices import silent
from nsa_convert.training.recipe.bases import resolved_text
from nsa_convert.training.recipe.library import find_recipe, known_recipes


@click.command()
@click.argument("recipe")
@click.option(
    "--set", "pairs", multiple=True, metavar="KEY=VALUE", help="Change a key, such as stages.align.lr."
)
@click.option("--resume", is_flag=True, help="Go on with the run in the recipe's out.")
@click.option("--dry-run", is_flag=True, help="Check everything and show the plan; train nothing.")
@click.option(
    "--allow-partial-resume", is_flag=True, help="Resume without optimizer, schedule or random states."
)
@click.option("--allow-data-change", is_flag=True, help="Resume with other data, at the same position.")
@click.option("--allow-eager-fallback", is_flag=True, help="Go on in plain torch where a kernel fails.")
@common
def train(
    recipe: str,
    pairs: tuple[str, ...],
    resume: bool,
    dry_run: bool,
    allow_partial_resume: bool,
    allow_data_change: bool,
    allow_eager_fallback: bool,
    as_json: bool,
) -> None:
    """Convert and train by RECIPE: a YAML file, or a name that `nsa-convert recipes` lists."""
    from nsa_convert.cli.options import parse_settings
    from nsa_convert.training.recipe.schema import read_recipe
    from nsa_convert.training.run.forecast import forecast_recipe
    from nsa_convert.training.run.micro_batches import device_bytes, fit_micro_batches, one_by_one
    from nsa_convert.training.run.models import read_start
    from nsa_convert.training.run.parallel import planned
    from nsa_convert.training.run.resume import Allow
    from nsa_convert.training.run.runner import Interrupted, train_recipe
    from nsa_convert.training.run.timing import measure_stages

    path = find_recipe(recipe)
    read = read_recipe(path, parse_settings(pairs))
    folder = model_folder(read.model, read.revision, path.parent)

    if dry_run:
        start = read_start(read, folder)
        # What stands in the recipe is checked before rows are chosen for it.
        if any(not stage.micro_batch for stage in read.stages):
            forecast_recipe(one_by_one(read), start, path.parent, parallel=planned(read))
            read = fit_micro_batches(read, start, planned(read), device_bytes(read.machine), say)
        forecast = forecast_recipe(read, start, path.parent, parallel=planned(read), memory=True)
        if read.measure:
            forecast = measure_stages(read, start, path.parent, forecast)
        show(forecast, as_json)
        return

    # Of the processes of a distributed run the first one speaks.
    is_main = int(os.environ.get("RANK", "0")) == 0
    allow = Allow(
        partial_resume=allow_partial_resume,
        data_change=allow_data_change,
        eager_fallback=allow_eager_fallback,
    )

    try:
        report = train_recipe(
            read, folder, base=path.parent, resume=resume, say=say if is_main else silent, allow=allow
        )
    except Interrupted as error:
        hint(f"the state is saved; go on with{_resume_line(recipe, pairs)}")
        raise SystemExit(128 + error.number) from None

    if is_main:
        show(report, as_json)
        hint(f"next: nsa-convert eval {report.model}")


def _resume_line(recipe: str, pairs: Sequence[str]) -> str:
    """Return the command that goes on: without the same --set it would be another run."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # who started the processes, and how, is not known here
        return " the same command, and --resume"

    words = [word for pair in pairs for word in ("--set", pair)]
    return f": {shlex.join(['nsa-convert', 'train', recipe, *words, '--resume'])}"


def model_folder(model: Any, revision: str | None, base: Path) -> Path | None:
    """Return the local folder of a recipe's model; None for a fresh one."""
    from nsa_convert.hub import dense_folder, resolve_model

    if not isinstance(model, str):
        return None

    beside = base / model
    name = str(beside) if beside.exists() else model
    return dense_folder(resolve_model(name, revision=revision, say=say), say)


@click.command()
@click.argument("action", required=False, type=click.Choice(["show"]))
@click.argument("name", required=False)
@common
def recipes(action: str | None, name: str | None, as_json: bool) -> None:
    """List the recipes that come with the project; `show NAME` prints one whole, to be kept and edited."""
    known = known_recipes()

    # All recipes, by title.
    if action is None:
        titles = {key: _title(path) for key, path in known.items()}
        if as_json:
            print_json({"ok": True, "recipes": titles})
        else:
            for key, title in titles.items():
                click.echo(f"{key:32} {title}")
        return

    # One recipe, with what its bases say written out.
    if name is None:
        raise UsageError(
            "recipes show takes the NAME of a recipe", code="CL02", hint="see: nsa-convert recipes"
        )
    text = resolved_text(find_recipe(name))

    if as_json:
        print_json({"ok": True, "name": name, "text": text})
    else:
        click.echo(text, nl=False)


def _title(path: Path) -> str:
    """Return the first line of a recipe's head comment."""
    return path.read_text().split("\n", 1)[0].removeprefix("#").strip()
