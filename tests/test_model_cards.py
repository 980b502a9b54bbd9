"""The rendered cards in model_cards/ are valid and show files that are there."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from nsa_convert.card import check_card

FOLDER = Path(__file__).parents[1] / "model_cards"
CARDS = sorted(FOLDER.glob("*/README.md"))


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.parent.name)
def test_a_card_is_valid_and_complete(path):
    text = path.read_text()
    assert check_card(text) == []
    assert ModelCard(text).data.eval_results
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    assert [link for link in links if not (path.parent / link).is_file()] == []
    report = path.parent / "evaluation" / "long" / "report.html"
    assert "<script" not in report.read_text()


def test_every_card_is_listed():
    listed = re.findall(r"\]\((\S+)/README\.md\)", (FOLDER / "README.md").read_text())
    assert listed == [path.parent.name for path in CARDS]
