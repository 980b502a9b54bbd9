"""Fifty steps of every trainable method on a small real model: bf16-mixed is within 1 % of fp32.

Losses, the KL of what chooses, and the norm of the gradient. Two runs drift apart by rounding, step by step,
so it is the mean of the steps' differences that is held against the limit.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nsa_convert.methods.parts.registry import METHODS
from nsa_convert.training.recipe.schema import recipe_from_dict
from nsa_convert.training.run.runner import train_recipe
from tests.models import VARIANTS, plan
from tests.training.recipes import ROOT, recipe_values, stage

DATA = ROOT.parent / "shared" / "data"
MODEL = DATA / "models" / "stories260k"
TEXT = DATA / "text" / "train" / "middlemarch.txt"
TRAINED = [name for name, settings in VARIANTS.items() if METHODS[settings["method"]].spec.trainable]
LIMIT = 0.01
STEPS = 50
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODEL.exists(), reason="needs the real checkpoint in ../shared/data"),
]


def figures(out: Path, variant: str, precision: str) -> list[dict[str, float]]:
    """Train; return the losses and the gradient's norm of each step."""
    data = [{"kind": "text", "path": str(TEXT)}]
    steps = stage(seq_len=256, batch_tokens=256, tokens=256 * STEPS, data=data, save_every=0, lr=3e-5)
    values = recipe_values(out, None, steps, model=str(MODEL), precision=precision, alarms="warn")
    values["sparse_attention"] = plan(VARIANTS[variant]).to_dict()
    train_recipe(recipe_from_dict(values), MODEL, base=ROOT)

    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    kept = [name for name in rows[0] if name in ("loss", "grad_norm", "cross_entropy") or "kl" in name]
    return [{name: row[name] for name in kept} for row in rows]


@pytest.mark.parametrize("variant", TRAINED)
def test_mixed_precision_gives_the_figures_of_float32(variant: str, tmp_path: Path) -> None:
    wide = figures(tmp_path / "wide", variant, "fp32")
    mixed = figures(tmp_path / "mixed", variant, "bf16-mixed")
    assert len(wide) == len(mixed) == STEPS

    for name in wide[0]:
        off = [abs(x[name] - y[name]) / abs(x[name]) for x, y in zip(wide, mixed, strict=True)]
        print(f"{variant} {name}: mean {sum(off) / STEPS:.2%}, largest {max(off):.2%}")
        assert sum(off) / STEPS < LIMIT, name
        assert min(row[name] for row in mixed) >= 0, name
