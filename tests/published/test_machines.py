"""Every recipe for a model of the Hub fits the machine it names, and docs say what it needs."""

from __future__ import annotations

import pytest

from nsa_convert.training.recipe.library import known_recipes
from nsa_convert.training.recipe.schema import read_recipe
from nsa_convert.training.run.control import CONTROL, shared_stages
from nsa_convert.training.run.needs import SPARE
from nsa_convert.training.run.parallel import planned
from tests.guards.reference import table
from tests.published.machines import HEADER, PAGE, lines, names

QUICK = {"smollm2/135m_infllm_v2"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names()]
)
def test_a_recipe_fits_its_machine_and_the_page_says_so(name):
    machine = read_recipe(known_recipes()[name]).machine
    assert machine is not None
    rows = lines(name)
    written = PAGE.read_text()
    for line, row in zip(table(HEADER, rows).splitlines()[2:], rows, strict=True):
        assert float(row[5].split()[0]) <= machine.memory * (1 - SPARE), line
        assert line in written


def test_the_page_has_every_recipe_and_every_stage():
    found = [line.split("|")[1:3] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    recipes = {name: read_recipe(known_recipes()[name]) for name in names()}
    wanted = []
    for name, recipe in recipes.items():
        stages = [stage.name for stage in recipe.stages]
        stages += [f"{CONTROL}/{stage.name}" for stage in shared_stages(recipe) if recipe.control]
        wanted += [[f" `{name}` ", f" {stage} "] for stage in stages]
    assert found == wanted


@pytest.mark.parametrize("name", names())
def test_the_processes_of_a_recipe_are_those_of_its_machine(name):
    recipe = read_recipe(known_recipes()[name])
    assert recipe.machine is not None
    assert planned(recipe).processes == recipe.machine.devices
