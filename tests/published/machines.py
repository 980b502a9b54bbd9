"""What every recipe for a model of the Hub needs: the table of docs/reference/machines.md.

python -m tests.published.machines          # write the page: some minutes

Each line is what ``nsa-convert train NAME --dry-run`` says, from the config of the published model
(:mod:`tests.published.bases`); nothing is fetched.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from unittest import mock

from nsa_convert.training.recipe.library import known_recipes
from nsa_convert.training.recipe.schema import read_recipe
from nsa_convert.training.run import forecast
from nsa_convert.training.run.models import read_start
from nsa_convert.training.run.needs import ASSUMED_MFU, SPARE
from nsa_convert.training.run.parallel import planned
from tests.guards.reference import FOLDER, table
from tests.published.bases import BASES

PAGE = FOLDER / "reference" / "machines.md"
HEADER = ["recipe", "stage", "tokens", "rows", "machine", "memory", "disk", "host", "hours", "GPU hours"]


def names() -> list[str]:
    """Return the recipes whose model is one of the Hub."""
    models = {name: read_recipe(path).model for name, path in known_recipes().items()}
    return [name for name, model in models.items() if isinstance(model, str) and model in BASES]


def forecast_of(name: str) -> forecast.RecipeForecast:
    """Return the forecast of a recipe, its model of its published size, its data not looked at."""
    path = known_recipes()[name]
    recipe = read_recipe(path)
    base = BASES[str(recipe.model)]
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(forecast, "source_notes", return_value=[]),
    ):
        (Path(folder) / "config.json").write_text(json.dumps({"model_type": base.family, **base.config()}))
        start = read_start(recipe, Path(folder))
        return forecast.forecast_recipe(recipe, start, path.parent, parallel=planned(recipe), memory=True)


def lines(name: str) -> list[list[str]]:
    """Return the lines of a recipe, one for each stage."""
    found = forecast_of(name)
    machine = found.machine
    assert machine is not None, f"{name} names no machine"
    rows = []
    for stage in found.stages:
        assert stage.memory is not None
        assert stage.hours is not None
        rows.append(
            [
                f"`{name}`",
                stage.name,
                f"{stage.tokens / 1e6:,.0f}M",
                f"{stage.seq_len:,}",
                f"{machine.devices} x {machine.gpu}, {machine.memory:g} GB",
                f"{stage.memory / 1e9:.1f} GB",
                f"{stage.disk / 1e9:,.0f} GB",
                f"{stage.host / 1e9:,.0f} GB",
                f"{stage.hours:,.1f}",
                f"{stage.hours * machine.devices:,.0f}",
            ]
        )
    return rows


def page() -> str:
    """Return the page."""
    text = [
        "# What the recipes need", "",
        "<!-- Written by `python -m tests.published.machines`; do not edit. -->", "",
        "What `nsa-convert train NAME --dry-run` says of each recipe for a model of the Hub. `memory` is the",
        f"most that one device holds at once; a plan leaves {SPARE:.0%} of it free. `disk` is what the",
        "run has written at most by the end of the stage, `host` what loading and saving take. The hours are",
        f"estimates at a share of the peak (MFU) of {ASSUMED_MFU}, of runs that were never made.",
        "[train.md](../howto/train.md#memory-disk-time) says what is counted.", "",
        table(HEADER, [line for name in names() for line in lines(name)]),
    ]  # fmt: skip
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
