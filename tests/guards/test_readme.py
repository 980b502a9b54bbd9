"""The README is short, and its figures are those of the card, the benchmarks and the registry."""

from __future__ import annotations

import re

from PIL import Image

from benchmarks import overview
from nsa_convert.families import FAMILIES
from nsa_convert.methods.parts.registry import METHODS
from tests.published.pages import ROOT, pieces

README = (ROOT / "README.md").read_text()
CARD = (ROOT / "model_cards/SmolLM2-135M-Instruct-NSA/README.md").read_text()
MOST_LINES = 120


def section(title: str) -> str:
    """Return what stands below a heading of the README."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert found, f"the README has no section {title}"
    return found[1]


def row(first: str) -> list[str]:
    """Return the cells of a row of the card's tables."""
    found = re.search(rf"^\| {re.escape(first)} \|(.*)\|$", CARD, re.MULTILINE)
    assert found, f"the card has no row {first}"
    return [cell.strip() for cell in found[1].split("|")]


def test_it_is_short():
    assert len(README.splitlines()) <= MOST_LINES


def test_the_first_screen_says_what_holds_and_what_does_not():
    first = README.split("## Start")[0]
    assert len(first.splitlines()) <= 30
    bold = re.findall(r"^- \*\*(.*?)\*\*", first, re.MULTILINE | re.DOTALL)
    wanted = ("Exact to the budget", "Approximate beyond it", "GPU", "cache", "Slower")
    assert [word for word in wanted if not any(word in line for line in bold)] == []
    assert all(family.split(" ")[0] in first for family in (one.title for one in FAMILIES.values()))


def test_its_figures_of_the_model_are_those_of_the_card():
    first = README.split("## Start")[0]
    code, prose = row("code"), row("prose")
    assert f"{code[3]} on code and {prose[3]} on prose" in first.replace("\n  ", " ")
    assert f"(KL {code[4]} and {prose[4]})" in first
    dense, sparse = (round(16 * float(cell.split(" ")[0])) for cell in row("recall, forced")[1:])
    assert f"{sparse} of 16 names where dense attention finds {dense}" in first
    dense, sparse = (float(cell.split(" ")[0]) for cell in row("8,192")[:2])
    assert f"{100 * (sparse / dense - 1):.0f} % larger" in first


def test_its_figures_of_time_are_measured():
    dense, sparse = overview.read_times(overview.TIMES)[8192]
    assert f"{sparse:.2f} s against {dense:.2f} s for a prompt of 8192" in README


def test_the_picture_is_of_these_figures():
    with Image.open(ROOT / "docs" / "overview.png") as picture:
        assert picture.text["Comment"] == overview.fingerprint(), (
            "python -m benchmarks.overview docs/overview.png draws it"
        )


def test_which_method_has_six_rows_of_methods_there_are():
    text = section("Which method do I want")
    rows = [line.split("|")[2] for line in text.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 6
    assert {name for cell in rows for name in re.findall(r"`(\w+)`", cell)} <= METHODS.keys()
    assert f"All {len(METHODS)}" in text


def test_python_takes_eight_lines_and_commands_are_shown_with_their_output():
    (python,) = (piece.text for piece in pieces("README.md") if piece.language == "python")
    assert len([line for line in python.splitlines() if line.strip()]) <= 8
    shown = [piece for piece in pieces("README.md") if piece.printed]
    assert [piece.words[1] for piece in shown] == ["convert", "verify", "generate"]
