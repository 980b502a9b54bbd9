"""The dense control of a run: the dense model on the same rows, told beside the sparse one."""

import json
from pathlib import Path
from typing import Any

import pytest

from nsa_convert.errors import ConfigError
from nsa_convert.training.recipe.schema import Recipe, read_recipe
from nsa_convert.training.run.control import control_of, dense_start
from nsa_convert.training.run.forecast import forecast_recipe
from nsa_convert.training.run.held_out import compare_control
from nsa_convert.training.run.models import fresh_tokenizer, read_start
from nsa_convert.training.run.runner import Interrupted, TrainingReport
from nsa_convert.training.run.stages import data_order
from tests.training.recipes import ALIGN, NSA, ROOT, RUNS, recipe, run, same_weights, stage

DATA = [{"kind": "reference", "hold_out": 0.1, "weight": 2}, {"kind": "recall", "pairs": 4}]
LAST = stage(eval_every=5, eval_rows=2, data=DATA, losses={"score_kl": 2.0})
STAGES = (ALIGN, stage("first", tokens=64 * 4, data=DATA), LAST)
RUNS["with control"] = (NSA, STAGES, {"control": True})


def with_control(out: Path, *stages: dict[str, Any], **changes: Any) -> Recipe:
    return recipe(out, NSA, *(stages or STAGES), **{"control": True, **changes})


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, TrainingReport]:
    out = tmp_path_factory.mktemp("control") / "run"
    return out, run(out, "with control")


def test_the_control_is_the_dense_model_trained_by_itself(done, tmp_path, monkeypatch):
    """As a recipe without sparse attention trains it, whose stages begin where those of the run do."""
    out, _ = done
    assert {path.name for path in (out / "control").iterdir() if path.is_dir()} == {"first", "pretrain"}
    values = read_recipe(out / "control" / "resolved_recipe.yaml")
    assert values.plan is None
    assert not values.control
    assert [each.losses for each in values.stages] == [None, None]

    dense = [stage("first", tokens=64 * 4, data=DATA), {**LAST, "losses": None}]
    sparse = with_control(tmp_path)
    monkeypatch.setattr(Recipe, "readers", property(lambda self: sparse.stages))
    monkeypatch.setitem(RUNS, "alone", (None, dense))
    run(tmp_path / "alone", "alone")
    for name in ("first", "pretrain"):
        assert same_weights(out / "control" / name, tmp_path / "alone" / name)


def test_both_read_the_same_rows(tmp_path):
    sparse = with_control(tmp_path)
    dense = control_of(sparse)
    assert [each.name for each in dense.stages] == ["first", "pretrain"]
    for index, each in enumerate(dense.stages):
        place = [other.name for other in sparse.stages].index(each.name)
        assert data_order(dense, index) == data_order(sparse, place)
    assert data_order(dense, 0).starts != (0.0, 0.0)
    tokenizers = [fresh_tokenizer(each, ROOT).get_vocab() for each in (sparse, dense)]
    assert tokenizers[0] == tokenizers[1]


def test_the_report_names_start_sparse_and_control(done):
    out, report = done
    ends = []
    for place in (out, out / "control"):
        rows = json.loads((place / "pretrain" / "model" / "stage.json").read_text())["evaluations"]
        ends += [rows[0]["eval_loss"], rows[-1]["eval_loss"]]
    start, sparse, dense, control = ends
    told = next(line for line in report.to_text().splitlines() if line.startswith("pretrain held out"))
    assert f"loss {start:.4g} -> {sparse:.4g}, of the dense control {dense:.4g} -> {control:.4g}" in told
    assert f"(apart {start - dense:+.4f} -> {sparse - control:+.4f})" in told
    assert "control/pretrain: 5 steps" in report.to_text()
    assert report.model == str(out / "pretrain" / "model")


def test_the_weights_that_were_kept_are_compared():
    rows = [{"step": step, "eval_loss": loss} for step, loss in ((0, 4.0), (2, 3.0), (4, 3.5))]
    kept = {"evaluations": rows, "weights_of_step": 2}
    told = compare_control(kept, {**kept, "weights_of_step": 4})
    assert "loss 4 -> 3, of the dense control 4 -> 3.5 (apart +0.0000 -> -0.5000)" in told
    assert compare_control(kept, {}) == ""


@pytest.mark.parametrize(
    "stop_at",
    [
        pytest.param("pretrain 2/", marks=pytest.mark.slow),
        pytest.param("control: first 2/", marks=pytest.mark.slow),
        "control: pretrain 3/",
    ],
)
def test_a_stopped_run_goes_on_to_the_same_control(done, tmp_path, stop_at):
    with pytest.raises(Interrupted):
        run(tmp_path / "run", "with control", stop_at)
    run(tmp_path / "run", "with control", resume=True)
    for name in ("pretrain", "control/first", "control/pretrain"):
        assert same_weights(done[0] / name, tmp_path / "run" / name)


@pytest.mark.slow
def test_a_finished_run_gets_its_control_later(done, tmp_path):
    run(tmp_path / "run", "with control", control=False)
    assert not (tmp_path / "run" / "control").exists()
    run(tmp_path / "run", "with control", resume=True)
    assert same_weights(done[0] / "control" / "pretrain", tmp_path / "run" / "control" / "pretrain")


def test_a_dry_run_counts_time_and_disk_of_the_control(tmp_path):
    machine = {"devices": 1, "memory": 80}
    read = with_control(tmp_path, machine=machine)
    start = read_start(read, None)
    both = forecast_recipe(read, start, ROOT)
    assert [each.name for each in both.stages[3:]] == ["control/first", "control/pretrain"]
    alone = forecast_recipe(control_of(read), dense_start(start), ROOT)
    for found, own in zip(both.stages[3:], alone.stages, strict=True):
        assert found.disk == both.stages[2].disk + own.disk
        assert found.hours == own.hours
        assert found.trained == own.trained < both.stages[2].trained
    assert "control/pretrain (pretrain): 5 steps" in both.to_text()


@pytest.mark.parametrize(
    ("stages", "changes", "says"),
    [
        ((LAST,), {"sparse_attention": None}, "the model is trained dense already"),
        ((ALIGN,), {}, "no stage trains dense weights for the next token"),
        ((stage(),), {}, "nothing is measured on held-out documents in pretrain; set eval_every"),
        (({**LAST, "name": "control"},), {}, "a stage has the name of its folder"),
        (({**ALIGN, "rope": {"type": "linear", "factor": 2}}, LAST), {}, "align sets rope, but the control"),
        (({**LAST, "keep_best": "loss", "patience": 2},), {}, "patience ends pretrain at a step of its own"),
    ],
)
def test_a_recipe_without_a_fair_control_is_refused(stages, changes, says, tmp_path):
    read = with_control(tmp_path / "run", *stages, **changes)
    with pytest.raises(ConfigError, match=says):
        forecast_recipe(read, read_start(read, None), ROOT)
    assert not (tmp_path / "run").exists()
