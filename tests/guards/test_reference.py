"""The reference pages say what the code says; `make pages` writes them again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import pytest

from nsa_convert.cli import main
from nsa_convert.cli.evaluate import SUITES
from nsa_convert.methods.parts.registry import METHODS
from nsa_convert.training.recipe.library import known_recipes
from tests.guards import reference

FOLDER = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", reference.pages())
def test_a_page_is_what_the_code_says(page):
    assert (FOLDER / page).read_text() == reference.written(page), "`make pages` writes it"


def test_nothing_is_left_out():
    settings, cli, recipes = (
        reference.written(f"reference/{name}.md") for name in ("settings", "cli", "recipes")
    )
    assert [name for name in METHODS if f"\n## {name}\n" not in settings] == []
    assert {suite for names in reference.SUITE_SETTINGS.values() for suite in names} == set(SUITES)
    assert [name for name in main.commands if f"\n## {name}\n" not in cli] == []
    assert [name for name in known_recipes() if f"[`{name}`]" not in recipes] == []


@pytest.mark.parametrize("kind", [*(method.Settings for method in METHODS.values()), *reference.RECIPE_PARTS])
def test_every_field_is_explained(kind):
    said = reference.attributes(kind)
    assert [field.name for field in dataclasses.fields(kind) if not said.get(field.name)] == []


def test_a_page_can_be_out_of_step():
    @dataclasses.dataclass(frozen=True)
    class Example:
        """An example.

        Attributes:
            size: Tokens of a
                ``block``, or | nothing.
        """

        size: int = 3
        kind: Literal["a", "b"] = "a"

    table = reference.fields_table(Example, "setting")
    assert "| `size` | `3` | a whole number | Tokens of a `block`, or \\| nothing. |" in table
    assert "| `kind` | `a` | `a`, `b` |  |" in table
    page = "x\n<!-- t -->\nold\n<!-- /t -->\ny"
    assert reference.with_part(page, "t", "new") == page.replace("old", "new")
    with pytest.raises(AssertionError, match="one <!-- u --> section"):
        reference.with_part(page, "u", "new")
