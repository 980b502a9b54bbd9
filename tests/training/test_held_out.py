"""Evaluations while a stage trains: right figures, the same training as without, the best weights kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from nsa_convert.errors import ConfigError
from nsa_convert.evaluation.models import dense_attention_in
from nsa_convert.loading import load_causal_model, load_tokenizer
from nsa_convert.training.data.rows import collate
from nsa_convert.training.recipe.schema import Recipe, recipe_from_dict
from nsa_convert.training.run.held_out import best_step, compare_ends, open_held_out, start_was_better
from nsa_convert.training.run.runner import Interrupted, TrainingReport, train_recipe
from tests.training.recipes import NSA, ROOT, losses, recipe_values, run, same_weights, stage

DATA = [{"kind": "reference", "hold_out": 0.1, "weight": 2}, {"kind": "recall", "pairs": 4}]
EVALUATED = {"eval_every": 2, "eval_rows": 3, "data": DATA}
WORSE = {"lr": 3.0, "tokens": 64 * 20, "keep_best": "loss"}
"""At such a rate every step makes the model worse, so the first evaluation is the best."""


def evaluated(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if "eval_loss" in row]


def read(out: Path, **changes: Any) -> Recipe:
    return recipe_from_dict(recipe_values(out, NSA, stage(**{**EVALUATED, **changes}), alarms="warn"))


def train(out: Path, resume: bool = False, **changes: Any) -> TrainingReport:
    return train_recipe(read(out, **changes), None, base=ROOT, resume=resume)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("held") / "run"
    train(out)
    return out


def test_the_start_every_second_step_and_the_end_are_evaluated(done):
    rows = evaluated(done)
    assert [row["step"] for row in rows] == [0, 2, 4, 5]
    names = {"loss", "dense_loss", "kl", "captured", "oracle", "score_kl"}
    assert all({f"eval_{name}" for name in names} <= row.keys() for row in rows)
    assert all(0 < row["eval_captured"] <= row["eval_oracle"] <= 1 for row in rows)


def test_the_figures_are_those_of_the_ordinary_forward(done):
    """Of the written model, on the same rows: losses of documents, divergence from dense attention."""
    folder = done / "pretrain" / "model"
    model = load_causal_model(folder, torch.float32).eval()
    part = read(done).stages[0]
    held = open_held_out(part, load_tokenizer(folder), ROOT, budget=0)
    assert len(held.rows) == part.eval_rows

    found = {"eval_loss": 0.0, "eval_dense_loss": 0.0, "eval_kl": 0.0}
    for row in held.rows:
        batch = collate([row])
        labels = batch.pop("labels")[0, 1:]
        counted = labels != -100
        with torch.no_grad():
            sparse = model(**batch, use_cache=False).logits[0, :-1][counted]
            with dense_attention_in(model):
                dense = model(**batch, use_cache=False).logits[0, :-1][counted]
        found["eval_loss"] += cross_entropy(sparse, labels[counted]).item() / part.eval_rows
        found["eval_dense_loss"] += cross_entropy(dense, labels[counted]).item() / part.eval_rows
        p, q = dense.log_softmax(-1), sparse.log_softmax(-1)
        found["eval_kl"] += (p.exp() * (p - q)).sum(-1).mean().item() / part.eval_rows

    last = evaluated(done)[-1]
    assert found["eval_kl"] > 0
    for name, value in found.items():
        assert last[name] == pytest.approx(value, rel=1e-3), name


def test_training_is_the_same_with_and_without(done, tmp_path):
    train(tmp_path / "run", eval_every=0)
    rows = [json.loads(line) for line in (done / "log.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows if "loss" in row] == [row[2] for row in losses(tmp_path / "run")]
    assert same_weights(done / "pretrain", tmp_path / "run" / "pretrain")


def test_a_resumed_run_evaluates_what_is_left(done, tmp_path):
    stages = recipe_values(tmp_path / "run", NSA, stage(**EVALUATED))["stages"]
    with pytest.raises(Interrupted):
        run(tmp_path / "run", "nsa", "pretrain 3/", stages=stages)
    run(tmp_path / "run", "nsa", resume=True, stages=stages)
    assert evaluated(tmp_path / "run") == evaluated(done)
    assert same_weights(tmp_path / "run" / "pretrain", done / "pretrain")


def test_the_best_weights_are_kept_and_a_stage_without_progress_ends(tmp_path):
    report = train(tmp_path / "run", **WORSE, patience=2, keep=1, save_every=1)
    rows = evaluated(tmp_path / "run")
    best, after = best_step(rows, "loss")
    assert after == 2
    assert rows[-1]["step"] == best + 4 < 20
    assert min(row["eval_loss"] for row in rows[1:]) == rows[best // 2]["eval_loss"]

    place = tmp_path / "run" / "pretrain"
    kept, last = (load_file(place / f"checkpoint-{n}" / "model.safetensors") for n in (best, best + 4))
    model = load_file(place / "model" / "model.safetensors")
    assert all(torch.equal(model[name], kept[name]) for name in model)
    assert any(not torch.equal(model[name], last[name]) for name in model)
    assert report.stages["pretrain"]["weights_of_step"] == best
    assert f"step 0 -> {best + 4}: loss" in report.to_text()


def test_a_stage_that_made_nothing_better_says_so():
    def rows(*values: float, figure: str = "kl") -> list[dict[str, Any]]:
        return [{"step": 2 * n, f"eval_{figure}": value} for n, value in enumerate(values)]

    assert (
        start_was_better(rows(0.1, 0.3, 0.2), "kl") == "kl is 0.1000 at the start and 0.2000 at best after it"
    )
    assert start_was_better(rows(0.1, 0.3, 0.05), "kl") is None
    assert start_was_better(rows(0.9, 0.5, 0.7, figure="needles"), "needles") is not None
    assert start_was_better(rows(0.9, 0.5, 1.0, figure="needles"), "needles") is None
    assert start_was_better(rows(0.1), "kl") is None


def test_the_run_says_that_its_start_was_better(tmp_path):
    said: list[str] = []
    train_recipe(read(tmp_path / "run", **WORSE | {"tokens": 64 * 4}), None, base=ROOT, say=said.append)
    (line,) = [line for line in said if "made the model no better" in line]
    assert line.startswith("warning: pretrain made the model no better: loss is ")


def test_an_ended_stage_is_not_trained_on(tmp_path, monkeypatch):
    """The process dies after the stage has ended, before its model is written."""

    def die(*_: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("nsa_convert.training.run.runner.finish_stage", die)
        with pytest.raises(RuntimeError, match="killed"):
            train(tmp_path / "run", **WORSE, patience=1, save_every=0)
    before = evaluated(tmp_path / "run")
    assert before[-1]["step"] < 20
    train(tmp_path / "run", resume=True, **WORSE, patience=1, save_every=0)
    assert evaluated(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": [{"kind": "recall"}]}, "no source holds any out"),
        ({"keep_best": "needles"}, "rows of more than 256 tokens"),
        ({"eval_every": 0, "keep_best": "loss"}, "set eval_every"),
        ({"patience": 2}, "set keep_best"),
        ({"eval_rows": 0}, "eval_rows >= 1"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_the_comparison_names_the_figures_of_both_ends():
    rows = [{"step": 0, "eval_loss": 3.0, "eval_kl": 0.5}, {"step": 9, "eval_loss": 2.5, "eval_kl": 0.25}]
    assert compare_ends(rows) == "held out, step 0 -> 9: loss 3 -> 2.5, kl 0.5 -> 0.25"
    assert compare_ends(rows[:1]) == ""
