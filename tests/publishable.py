"""A tiny converted model with its evaluation and its card, ready to be published."""

from __future__ import annotations

from pathlib import Path

from nsa_convert.card import write_card
from nsa_convert.convert import convert_checkpoint
from nsa_convert.evaluation.suites.quick import run_quick
from tests.evaluation.tiny import save, tiny_dense
from tests.models import NSA, plan

SOURCE_CARD = "---\nlicense: apache-2.0\n---\n# Tiny\n"


def converted(folder: Path, card: str | None = SOURCE_CARD, **changes: object) -> Path:
    """Convert a tiny model of random weights, with the source's card beside it."""
    dense = save(tiny_dense(**changes).float(), folder / "dense")
    if card is not None:
        (dense / "README.md").write_text(card)
    convert_checkpoint(dense, folder / "tiny-nsa", plan(NSA), source_id="tiny/dense", revision="0" * 40)
    return folder / "tiny-nsa"


def publishable(folder: Path) -> Path:
    """Convert, evaluate and describe a tiny model."""
    out = converted(folder)
    run_quick(out, length=80, out_dir=out / "evaluation", needle_lengths=[500], needle_depths=[0.5])
    write_card(out)
    return out
