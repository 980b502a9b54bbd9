"""Checkpoints of a run that were damaged, changed or made by somebody else (TR)."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nsa_convert.errors import CheckpointError, ConfigError
from nsa_convert.training.run.checkpoints import COMPLETE, seal
from nsa_convert.training.run.resume import Allow
from tests.checkpoints import tree_hash
from tests.faults.runs import checkpoint, copied, goes_on, refuses, train
from tests.training.recipes import run, stage

SLOW = pytest.mark.slow
OPTIMIZER_FILE = "optimizer/shard-00001-model-00001-of-00001.safetensors"


def reseal(folder: Path) -> None:
    """Note the sizes of the files as they are now, as somebody would who wants them taken for whole."""
    facts = json.loads((folder / COMPLETE).read_text())
    seal(folder, {key: value for key, value in facts.items() if key != "files"})


@pytest.mark.parametrize("damage", ["empty", "half", pytest.param("unsealed", marks=SLOW)])
def test_tr05_an_incomplete_checkpoint_is_passed_over(stopped, whole, damage):
    newest = checkpoint(stopped)
    if damage == "empty":
        shutil.rmtree(newest)
        newest.mkdir()
    elif damage == "unsealed":
        (newest / COMPLETE).unlink()
    else:
        for name in (OPTIMIZER_FILE, "scheduler.pt", "model.safetensors"):
            (newest / name).unlink()
    said = goes_on(stopped, whole)
    assert any("warning [TR05]" in line and "checkpoint-4 is passed over" in line for line in said)
    assert "pretrain: going on after step 2" in said


@pytest.mark.parametrize("name", [OPTIMIZER_FILE, "scheduler.pt", "rng_state.pth"])
def test_tr06_a_missing_state_is_refused_unless_asked(stopped, whole, name):
    shutil.rmtree(checkpoint(stopped, 2))
    (checkpoint(stopped) / name).unlink()
    refuses(stopped, CheckpointError, "TR06", f"checkpoint-4: {name} is missing", "--allow-partial-resume")
    said = []
    run(stopped, "dense", resume=True, say=said.append, allow=Allow(partial_resume=True))
    assert any(f"although {name} is missing: this is not the same run" in line for line in said)
    rows = [[json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()] for out in (stopped, whole)]
    assert [row["learning_rate"] for row in rows[0]] == [row["learning_rate"] for row in rows[1]]


@pytest.mark.parametrize(
    "name",
    [
        OPTIMIZER_FILE,
        "model.safetensors",
        *(pytest.param(x, marks=SLOW) for x in ("trainer_state.json", "rng_state.pth", "data_state.json")),
    ],
)
def test_tr07_a_file_cut_off_falls_back_to_the_checkpoint_before(stopped, whole, name):
    path = checkpoint(stopped) / name
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2])
    only = copied(stopped, stopped.with_name("only"))
    shutil.rmtree(checkpoint(only, 2))
    refuses(only, CheckpointError, "TR06", f"{name} has {size // 2} bytes")
    said = goes_on(stopped, whole)
    assert any(f"{name} has {size // 2} bytes instead of {size}" in line for line in said)


@pytest.mark.parametrize(
    "name", [OPTIMIZER_FILE, "trainer_state.json", pytest.param("scheduler.pt", marks=SLOW)]
)
def test_tr07_bytes_of_the_right_number_that_mean_nothing(stopped, whole, name):
    path = checkpoint(stopped) / name
    path.write_bytes(b"\x00" * path.stat().st_size)
    said = goes_on(stopped, whole)
    assert any(f"checkpoint-4 is passed over: {name} cannot be read" in line for line in said)


def test_tr08_nan_in_the_optimizer(stopped):
    path = checkpoint(stopped) / OPTIMIZER_FILE
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
    state = load_file(path)
    state["model.norm.weight.exp_avg_sq"][5] = math.nan
    save_file(state, path, facts)
    reseal(checkpoint(stopped))
    says = "model.norm.weight.exp_avg_sq holds NaN or infinity"
    refuses(stopped, CheckpointError, "TR08", says, "checkpoint-4")


def test_an_optimizer_of_an_earlier_version_is_refused_in_one_line(stopped):
    for step in (2, 4):
        shutil.rmtree(checkpoint(stopped, step) / "optimizer")
        torch.save({"state": {}, "param_groups": []}, checkpoint(stopped, step) / "optimizer.pt")
        reseal(checkpoint(stopped, step))
    says = "checkpoint-4: the optimizer's state is in the form of an earlier version (optimizer.pt)"
    refuses(stopped, CheckpointError, "TR06", says, "--allow-partial-resume")


def test_tr12_another_run(stopped):
    says = "the recipe differs: seed was 0 and is 5; stages[0].lr was 0.001 and is 0.01"
    other = [stage(lr=1e-2)]
    before = tree_hash(stopped)
    with pytest.raises(CheckpointError) as caught:
        train(stopped, None, *other, resume=True, seed=5)
    assert caught.value.code == "TR12"
    assert says in caught.value.message
    assert tree_hash(stopped) == before
    path = checkpoint(stopped) / COMPLETE
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "base": "1" * 16}))
    refuses(stopped, CheckpointError, "TR12", "base is '1111111111111111' there")


class Payload:
    """Pickled code that leaves a mark when it is run."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return os.mkdir, (str(self.sentinel),)


@pytest.mark.parametrize("how", ["pickle", "torch"])
@pytest.mark.parametrize("name", ["rng_state.pth", "scheduler.pt"])
def test_tr13_code_in_a_state_file_is_refused_and_not_run(stopped, tmp_path, name, how):
    sentinel = tmp_path / "sentinel"
    path = checkpoint(stopped) / name
    if how == "pickle":
        path.write_bytes(pickle.dumps(Payload(sentinel)))
    else:
        torch.save({"state": Payload(sentinel)}, path)
    reseal(path.parent)
    error = refuses(stopped, CheckpointError, "TR13", name, "nothing of it was run")
    assert error.exit_status == 3
    assert not sentinel.exists()


def test_the_state_of_a_run_holds_no_pickled_arguments(cut):
    assert list(cut.rglob("training_args.bin")) == []


def test_data_that_changed_are_named(stopped):
    path = checkpoint(stopped) / "data_state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "fingerprint": "0" * 16}))
    refuses(stopped, ConfigError, "DA08", "it was 0000000000000000")
