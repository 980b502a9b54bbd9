"""`micro_batch: 0` takes as many rows as fit, and changes no number of the run."""

from __future__ import annotations

import dataclasses

import pytest
import yaml
from click.testing import CliRunner

from nsa_convert.cli import main
from nsa_convert.training.run import runner
from nsa_convert.training.run.forecast import empty_model, weight_sizes
from nsa_convert.training.run.micro_batches import fit_micro_batches
from nsa_convert.training.run.models import read_start
from nsa_convert.training.run.needs import device_memory
from nsa_convert.training.run.parallel import Parallel
from tests.training.recipes import NSA, SSA, losses, recipe, recipe_values, stage
from tests.training.recipes import ROOT as BASE

ROWS = 4
OPEN = {"micro_batch": 0, "batch_tokens": 32 * ROWS, "tokens": 32 * ROWS * 3}


def memory(read, rows, parallel):
    """Return the bytes that a device needs with so many rows at a time."""
    start, one = read_start(read, None), dataclasses.replace(read.stages[0], micro_batch=rows)
    shapes = {name: p.numel() for name, p in empty_model(start).named_parameters()}
    return device_memory(read, one, start, weight_sizes(one, read, start, shapes), parallel)


@pytest.mark.parametrize(
    ("method", "checkpointing"),
    [
        (None, True),
        pytest.param(NSA, False, marks=pytest.mark.slow),
        pytest.param(SSA, True, marks=pytest.mark.slow),
    ],
    ids=["dense", "nsa", "ssa"],
)
def test_the_most_rows_that_fit_are_taken(method, checkpointing, tmp_path):
    read = recipe(tmp_path, method, stage(**OPEN, checkpointing=checkpointing))
    start = read_start(read, None)
    needs = {rows: memory(read, rows, Parallel()) for rows in (1, 2, 4)}
    assert list(needs.values()) == sorted(needs.values())

    for rows, need in needs.items():
        chosen = fit_micro_batches(read, start, Parallel(), need / 0.9 + 1)
        assert chosen.stages[0].micro_batch == rows
        less = fit_micro_batches(read, start, Parallel(), need / 0.9 - 1).stages[0].micro_batch
        assert less == max([n for n in needs if n < rows], default=1)

    # Two processes with rows of their own take half a step each.
    two = fit_micro_batches(read, start, Parallel(processes=2), 1e12)
    assert two.stages[0].micro_batch == 2


def test_processes_that_share_a_row_take_one(tmp_path):
    read = recipe(tmp_path, SSA, stage(**OPEN), context=2)
    parallel = Parallel(processes=2, context=2)
    assert fit_micro_batches(read, read_start(read, None), parallel, 1e12).stages[0].micro_batch == 1


def test_a_device_without_room_for_one_row_is_told_of(tmp_path):
    said: list[str] = []
    read = recipe(tmp_path, NSA, stage(**OPEN))
    chosen = fit_micro_batches(read, read_start(read, None), Parallel(), 1000, said.append)
    assert chosen.stages[0].micro_batch == 1
    assert said[0].startswith("warning: pretrain: one row takes about ")


@pytest.mark.slow
def test_a_run_and_its_resume_find_their_rows_and_give_the_same_numbers(tmp_path, monkeypatch):
    def run(name, limit, rows=0, **how):
        monkeypatch.setattr(runner, "device_bytes", lambda: limit)
        read = recipe(tmp_path / name, NSA, stage(**{**OPEN, "micro_batch": rows}, save_every=2))
        runner.train_recipe(read, None, base=BASE, **how)
        kept = yaml.safe_load((tmp_path / name / runner.RUN_FILE).read_text())
        return kept["stages"][0]["micro_batch"], losses(tmp_path / name)

    one = run("one", 1e12, rows=1)
    most = run("most", 1e12)
    assert (one[0], most[0]) == (1, ROWS)
    assert [x[2] for x in most[1]] == pytest.approx([x[2] for x in one[1]], rel=1e-3)

    # Finished already; what a resumed run finds room for is no other recipe.
    assert run("most", 1000, resume=True)[0] == 1


def test_a_dry_run_finds_the_rows_of_the_machine_it_is_meant_for(tmp_path):
    values = recipe_values(tmp_path / "out", NSA, stage(**OPEN), machine={"devices": 1, "memory": 80})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    run = CliRunner().invoke(main, ["train", str(path), "--dry-run", "--json"])
    assert run.exit_code == 0, run.output
    assert f"pretrain: micro_batch {ROWS}" in run.stderr

    # A recipe that cannot run says so, as it does with rows of its own choice.
    values["stages"][0]["seq_len"] = 128
    values["stages"][0] |= {"batch_tokens": 128 * ROWS, "tokens": 128 * ROWS}
    path.write_text(yaml.safe_dump(values))
    run = CliRunner().invoke(main, ["train", str(path), "--dry-run", "--json"])
    assert run.exit_code == 3
    assert "beyond the model's 64 positions" in run.output
