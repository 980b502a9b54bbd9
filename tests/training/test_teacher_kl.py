"""The divergence from the dense teacher on the logits: its formula, its gradient, its place in a recipe."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional

from nsa_convert.errors import ConfigError
from nsa_convert.methods.parts.training_mode import TrainingMode
from tests.faults.runs import train
from tests.models import NSA, SSA, dense_model, tokens, trained_model
from tests.training.recipes import NSA as TINY_NSA
from tests.training.recipes import stage


@pytest.mark.parametrize("settings", [NSA, {**SSA, "gate": "signed"}], ids=["nsa", "ssa"])
def test_value_and_gradient_are_those_of_the_formula(settings):
    ids = tokens(2, 60)
    labels = ids.clone()
    labels[0, :20] = -100
    model = trained_model("llama", settings).train()
    mode = TrainingMode(losses=("output_error",), teacher_kl=True)
    out = model(ids, labels=labels, training_mode=mode, num_items_in_batch=200)
    with torch.no_grad():
        teacher = dense_model("llama")(ids).logits  # the same weights, never patched
    student = model(ids, training_mode=None, use_cache=False).logits
    kl = functional.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1)
    counted = functional.pad(labels[:, 1:], (0, 1), value=-100) != -100
    want = (kl * counted).sum() / 200
    assert want > 1e-3
    torch.testing.assert_close(out.teacher_kl, want, rtol=1e-9, atol=1e-12)
    weights = [p for p in model.parameters() if p.requires_grad]
    got, expected = (torch.autograd.grad(x, weights, allow_unused=True) for x in (out.teacher_kl, want))
    pairs = [(a, b) for a, b in zip(got, expected, strict=True) if b is not None]
    assert len(pairs) > 20
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


def test_a_stage_of_distillation_alone_reads_every_token(tmp_path):
    """With cross_entropy 0 the divergence is that of all tokens, not of the last one alone."""
    found = []
    for weight in (0.0, 1.0):
        folder = tmp_path / f"run{weight:g}"
        train(folder, TINY_NSA, stage(cross_entropy=weight, teacher_kl=0.5, train="new", tokens=64))
        found.append(json.loads((folder / "log.jsonl").read_text().splitlines()[0]))
    alone, both = found
    assert alone["teacher_kl"] > 0
    assert alone["teacher_kl"] == pytest.approx(both["teacher_kl"], rel=1e-6)
    assert alone["loss"] == pytest.approx(0.5 * alone["teacher_kl"], rel=1e-3, abs=2e-4)


def test_within_the_budget_a_fresh_conversion_is_its_own_teacher():
    from nsa_convert.patch.patching import patch_model
    from tests.models import plan

    model, ids = patch_model(dense_model("llama"), plan(NSA)).train(), tokens(1, 30)
    out = model(ids, labels=ids, training_mode=TrainingMode(teacher_kl=True))
    assert out.teacher_kl.abs() < 1e-12


def test_a_recipe_trains_with_it_and_says_so(tmp_path):
    report = train(tmp_path / "run", TINY_NSA, stage(teacher_kl=0.5, train="new", tokens=64 * 3))
    assert report.stages["pretrain"]["steps"] == 3
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["teacher_kl"] >= 0
        assert row["loss"] == pytest.approx(row["cross_entropy"] + 0.5 * row["teacher_kl"], abs=2e-4)


@pytest.mark.parametrize(
    ("method", "changes", "says"),
    [
        (TINY_NSA, {"kind": "align", "train": "new", "teacher_kl": 1.0}, "leave teacher_kl out"),
        (TINY_NSA, {"teacher_kl": -1.0}, "the weight of teacher_kl must be a number from 0"),
        (None, {"teacher_kl": 1.0}, "teacher_kl needs a sparse model"),
    ],
)
def test_where_it_makes_no_sense_it_is_refused(tmp_path, method, changes, says):
    with pytest.raises(ConfigError, match=says):
        train(tmp_path / "run", method, stage(**changes))
    assert not (tmp_path / "run").exists()
