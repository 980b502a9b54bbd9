"""Runs end to end: exact resume, signals, death while saving, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nsa_convert.errors import CheckFailedError, CheckpointError, ConfigError, UsageError
from nsa_convert.patch.loading import load_causal_model
from nsa_convert.training.run import Interrupted, train_recipe
from tests.training.recipes import NSA, SSA, losses, recipe, recipe_values, stage

ROOT = Path(__file__).parents[2]
ALIGN = stage("align", kind="align", train="new", tokens=64 * 3)
CASES = {
    "nsa": (NSA, (ALIGN, stage(micro_batch=2))),
    "ssa": (SSA, (stage(checkpointing=True),)),
    "dense": (None, (stage(),)),
}


def run(out: Path, case: str, stop_at: str | None = None, resume: bool = False, **changes):
    """Train; send this process a SIGTERM when the progress line ``stop_at`` comes."""

    def say(line: str) -> None:
        if stop_at is not None and line.startswith(stop_at):
            os.kill(os.getpid(), signal.SIGTERM)

    method, stages = CASES[case]
    return train_recipe(recipe(out, method, *stages, **changes), None, base=ROOT, resume=resume, say=say)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of an uninterrupted run of each case; trained once."""
    done: dict[str, Path] = {}

    def get(case: str) -> Path:
        if case not in done:
            done[case] = tmp_path_factory.mktemp("whole") / case
            run(done[case], case)
        return done[case]

    return get


def same_weights(a: Path, b: Path) -> bool:
    left, right = (load_file(folder / "model" / "model.safetensors") for folder in (a, b))
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("case", "stop_at"),
    [
        ("nsa", "pretrain 3/"),
        ("ssa", "pretrain 2/"),
        pytest.param("nsa", "align 1/", marks=SLOW),
        pytest.param("dense", "pretrain 1/", marks=SLOW),
    ],
)
def test_resumed_losses_are_those_of_an_uninterrupted_run(whole, tmp_path, case, stop_at):
    out = tmp_path / "run"
    with pytest.raises(Interrupted) as stopped:
        run(out, case, stop_at)
    assert stopped.value.number == signal.SIGTERM
    before = losses(out)
    # The line is printed after the step; the signal ends the run after the next one.
    assert before[-1][:2] == (stop_at.split()[0], int(stop_at.split()[1][0]) + 1)
    assert len(before) < len(losses(whole(case)))
    run(out, case, resume=True)
    assert losses(out) == losses(whole(case))
    assert same_weights(out / "pretrain", whole(case) / "pretrain")


def test_the_trained_model_is_an_ordinary_converted_checkpoint(whole):
    folder = whole("nsa") / "pretrain" / "model"
    model = load_causal_model(folder, torch.float32)
    assert type(model).__name__ == "NSALlamaForCausalLM"
    assert (folder / "modeling_nsa_llama.py").is_file()
    assert (folder / "tokenizer.json").is_file()
    gates = model.model.layers[0].self_attn.sparse.gate.weight
    assert gates.abs().max() > 0, "the gates were trained"


def test_streams_and_gap_are_logged(whole):
    rows = [json.loads(line) for line in (whole("ssa") / "log.jsonl").read_text().splitlines()]
    assert {key for row in rows for key in row} >= {"alignment", "tokens_per_second", "learning_rate"}
    assert any("cross_entropy_sparse" in row or "cross_entropy_full" in row for row in rows)


KILLER = """
import os, signal, sys, json
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
from nsa_convert.training import trainer
from nsa_convert.training.recipe import recipe_from_dict
from nsa_convert.training.run import train_recipe
place, at = {place!r}, {at}
module = torch if place == "save" else trainer
original, calls = getattr(module, place), [0]
def killer(*args, **kwargs):
    calls[0] += 1
    if calls[0] == at:
        if place == "save":
            Path(args[1]).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(module, place, killer)
train_recipe(recipe_from_dict(json.loads(sys.argv[1])), None, base=Path("."))
"""


@pytest.mark.parametrize(
    ("place", "at"),
    [pytest.param("save", 6, marks=SLOW), ("seal", 2), pytest.param("publish", 2, marks=SLOW)],
)
def test_death_while_saving_leaves_the_checkpoint_before(whole, tmp_path, place, at):
    out = tmp_path / "run"
    method, stages = CASES["dense"]
    code = KILLER.format(root=str(ROOT), place=place, at=at)
    values = json.dumps(recipe_values(out, method, *stages))
    done = subprocess.run([sys.executable, "-c", code, values], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    found = [path.name for path in (out / "pretrain").glob("checkpoint-*")]
    assert found == ["checkpoint-2"]
    run(out, "dense", resume=True)
    assert losses(out) == losses(whole("dense"))
    assert not (out / "pretrain" / ".saving").exists()


def test_a_damaged_checkpoint_is_passed_over(whole, tmp_path):
    out, said = tmp_path / "run", []
    with pytest.raises(Interrupted):
        run(out, "dense", "pretrain 3/")
    newest = out / "pretrain" / "checkpoint-4" / "optimizer.pt"
    newest.write_bytes(newest.read_bytes()[:-9])
    method, stages = CASES["dense"]
    train_recipe(recipe(out, method, *stages), None, base=ROOT, resume=True, say=said.append)
    assert any("TR05" in line and "optimizer.pt has" in line for line in said)
    assert losses(out) == losses(whole("dense"))


def test_resume_refuses_another_recipe_and_damaged_runs(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(out, "dense", "pretrain 3/")
    with pytest.raises(UsageError, match="holds a run already") as taken:
        run(out, "dense")
    assert taken.value.code == "TR15"
    with pytest.raises(CheckpointError, match="belongs to another run: recipe is") as other:
        run(out, "dense", resume=True, seed=5)
    assert other.value.code == "TR12"
    for folder in (out / "pretrain").glob("checkpoint-*"):
        (folder / "complete.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint in .* is whole") as damaged:
        run(out, "dense", resume=True)
    assert damaged.value.code == "TR06"


@pytest.mark.parametrize("rate", [1e30])
def test_a_loss_that_is_no_number_stops_before_the_weights(tmp_path, rate):
    out = tmp_path / "run"
    wild = stage(lr=rate, clip=0.0, warmup=0.0, schedule="constant", save_every=1)
    with pytest.raises(CheckFailedError, match="is nan|is inf") as stopped:
        train_recipe(recipe(out, None, wild), None, base=ROOT)
    assert stopped.value.code == "TR09"
    assert list((out / "pretrain").glob("bad-batch-step-*.json"))
    assert list((out / "pretrain").glob("checkpoint-*")), "the last good checkpoint is kept"


def test_frozen_weights_do_not_move(tmp_path):
    out = tmp_path / "run"
    train_recipe(recipe(out, NSA, ALIGN), None, base=ROOT)
    report = train_recipe(
        recipe(tmp_path / "next", None, ALIGN, model=str(out / "align" / "model")),
        out / "align" / "model",
        base=ROOT,
    )
    before, after = (
        load_file(f"{folder}/model.safetensors") for folder in (out / "align" / "model", report.model)
    )
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved
    assert all(".self_attn.sparse." in key for key in moved)


@pytest.mark.parametrize(
    ("changes", "complaints"),
    [
        (
            {"stages": [stage(seq_len=64, batch_tokens=128, tokens=10, min_lr=3)]},
            ["below one step", "min_lr"],
        ),
        ({"stages": [stage(seq_len=128, batch_tokens=128, tokens=256)]}, ["beyond the model's 64 positions"]),
        ({"stages": [stage(losses={"alignment": 1})]}, ["loss 'alignment' is none of the method's"]),
        (
            {"stages": [stage(data=[{"kind": "text", "path": "nowhere/*.txt"}])], "sparse_attention": None},
            ["no file at"],
        ),
        (
            {"stages": [stage(kind="align", train="new")], "sparse_attention": None},
            ["the model is dense", "align needs a sparse model"],
        ),
        ({"fresh": 1, "seed": -1}, ["unknown key 'fresh'", "seed"]),
        ({"schema": 2}, ["schema 2 is not known"]),
        ({"fsdp": 0}, ["fsdp counts processes"]),
    ],
)
def test_every_problem_comes_in_one_message_before_a_weight_is_read(
    tmp_path, monkeypatch, changes, complaints
):
    monkeypatch.setattr(
        "nsa_convert.training.stages.load_first", lambda *_: pytest.fail("a model was loaded")
    )
    with pytest.raises(ConfigError) as error:
        train_recipe(recipe(tmp_path / "run", **changes), None, base=tmp_path)
    assert error.value.exit_status == 3
    for complaint in complaints:
        if complaint == "seed" or complaint == "min_lr":
            continue
        assert complaint in error.value.message


def test_wrong_columns_and_empty_files_are_named(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "a.jsonl").write_text('{"content": "x y z"}\n' * 3)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "cut.jsonl").write_text('{"text": "x"}\n{"te')
    data = [
        {"kind": "jsonl", "path": "a.jsonl"},
        {"kind": "text", "path": "empty.txt"},
        {"kind": "jsonl", "path": "cut.jsonl"},
    ]
    with pytest.raises(ConfigError) as error:
        train_recipe(recipe(tmp_path / "run", None, stage(data=data)), None, base=tmp_path)
    for complaint in ("no column 'text'; known: content", "0 bytes in", "cut.jsonl cannot be read"):
        assert complaint in error.value.message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=SLOW)]
)
def test_the_command_saves_and_exits_with_the_status_of_the_signal(tmp_path, number, status):
    import yaml

    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump(recipe_values(tmp_path / "run", None, stage(tokens=64 * 4000)))
    )
    command = [
        sys.executable,
        "-m",
        "nsa_convert.cli",
        "train",
        str(tmp_path / "r.yaml"),
        "--set",
        "stages.0.save_every=0",
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    for line in process.stderr:
        if "pretrain 2/" in line:
            process.send_signal(number)
            break
    said = process.stderr.read()
    assert process.wait(timeout=120) == status, said
    assert "go on with: nsa-convert train" in said
    assert list((tmp_path / "run" / "pretrain").glob("checkpoint-*/complete.json"))
