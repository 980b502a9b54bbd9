"""Training that is killed, interrupted or has no room: the last good state stays usable (TR)."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nsa_convert.checkpoint.staging import exclusive
from nsa_convert.errors import MachineError, UsageError
from nsa_convert.training.run import trainer
from nsa_convert.training.run.checkpoints import COMPLETE
from tests.faults.runs import ROOT, call, checkpoint, goes_on, train, write_tiny
from tests.training.recipes import RUNS, losses, recipe_values, run, stage

SLOW = pytest.mark.slow

KILLER = """
import os, signal, sys, json
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
from nsa_convert.training.run import trainer
from nsa_convert.training.recipe.schema import recipe_from_dict
from nsa_convert.training.run.runner import train_recipe
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
def test_tr01_killed_while_saving_leaves_the_checkpoint_before(whole, tmp_path, place, at):
    out = tmp_path / "run"
    method, stages = RUNS["dense"]
    code = KILLER.format(root=str(ROOT), place=place, at=at)
    values = json.dumps(recipe_values(out, method, *stages))
    done = subprocess.run([sys.executable, "-c", code, values], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in (out / "pretrain").glob("checkpoint-*")] == ["checkpoint-2"]
    goes_on(out, whole)
    assert not (out / "pretrain" / ".saving").exists()


def test_tr01_killed_after_the_last_step(whole, tmp_path, monkeypatch):
    """A checkpoint of the last step is all there is: nothing is trained a step too far."""
    out = tmp_path / "run"

    def killed(*args):
        raise KeyboardInterrupt

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr("nsa_convert.training.run.runner.finish_stage", killed)
            with pytest.raises(KeyboardInterrupt):
                train(out, None, stage(save_every=1), resume=out.exists())
    assert checkpoint(out, 5).is_dir()
    assert not checkpoint(out, 6).exists()
    goes_on(out, whole)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_tr02_a_signal_saves_and_exits(tmp_path, monkeypatch, number, status):
    said = []

    def tell(line):
        said.append(line)
        if line.startswith("pretrain 2/"):
            os.kill(os.getpid(), number)

    monkeypatch.setattr("nsa_convert.cli.training.say", tell)
    path = write_tiny(tmp_path, None, stage(tokens=64 * 4000, save_every=0))
    done = call("train", path)
    assert done.code == status
    assert f"go on with: nsa-convert train {path} --resume" in done.err
    assert "a signal came: saving after this step (once more to stop at once)" in said
    assert (checkpoint(tmp_path / "run", 3) / COMPLETE).is_file()


@pytest.mark.slow
def test_tr02_the_signal_of_another_process(tmp_path):
    path = write_tiny(tmp_path, None, stage(tokens=64 * 4000, save_every=0))
    command = [sys.executable, "-m", "nsa_convert.cli", "train", str(path)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    for line in process.stderr:
        if "pretrain 2/" in line:
            process.send_signal(signal.SIGTERM)
            break
    said = process.stderr.read()
    assert process.wait(timeout=600) == 143, said
    assert list((tmp_path / "run" / "pretrain").glob("checkpoint-*/complete.json"))


def test_tr03_a_second_ctrl_c_while_saving(whole, tmp_path, monkeypatch):
    path = write_tiny(tmp_path, None, stage())

    def tell(line):
        if line.startswith("pretrain 3/"):
            os.kill(os.getpid(), signal.SIGINT)

    sealed, calls = trainer.seal, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        sealed(*args)

    monkeypatch.setattr("nsa_convert.cli.training.say", tell)
    monkeypatch.setattr(trainer, "seal", interrupted)
    done = call("train", path)
    monkeypatch.undo()
    assert (done.code, "interrupted" in done.err) == (130, True)
    out = tmp_path / "run"
    assert [p.name for p in (out / "pretrain").glob("checkpoint-*")] == ["checkpoint-2"]
    goes_on(out, whole)


def test_tr04_no_space_for_a_checkpoint(whole, tmp_path, monkeypatch):
    out, save, calls = tmp_path / "run", torch.save, []

    def full(value, place, *args, **kwargs):
        calls.append(place)
        if "checkpoint-4" in str(place):
            Path(place).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(place))
        return save(value, place, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(MachineError) as caught:
        run(out, "dense")
    monkeypatch.undo()
    assert (caught.value.code, caught.value.exit_status) == ("TR04", 5)
    message = caught.value.message
    assert "checkpoint-4 of stage pretrain could not be written: writing failed: No space left" in message
    assert "it needs about 0.10 MB" in message
    assert "checkpoint-2 is whole" in message
    assert [p.name for p in (out / "pretrain").iterdir()] == ["checkpoint-2"]
    goes_on(out, whole)


LIMIT = """
import json, resource, signal, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from nsa_convert.errors import MachineError
from nsa_convert.training.recipe.schema import recipe_from_dict
from nsa_convert.training.run.runner import train_recipe
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
try:
    train_recipe(recipe_from_dict(json.loads(sys.argv[1])), None, base=Path("."))
except MachineError as error:
    print(error.code, error.message)
    sys.exit(error.exit_status)
"""


@pytest.mark.slow
def test_tr04_a_limit_on_file_sizes(tmp_path):
    method, stages = RUNS["dense"]
    values = json.dumps(recipe_values(tmp_path / "run", method, *stages))
    command = [sys.executable, "-c", LIMIT.format(root=str(ROOT)), values]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 5, done.stderr
    assert "TR04 checkpoint-2" in done.stdout
    assert "there is none before it" in done.stdout
    assert list((tmp_path / "run" / "pretrain").iterdir()) == []


def test_tr14_two_processes_in_one_folder(stopped, whole):
    with exclusive(stopped):
        says = f"another process is writing {stopped}: process {os.getpid()} on "
        with pytest.raises(UsageError) as caught:
            run(stopped, "dense", resume=True)
        assert (caught.value.code, caught.value.exit_status) == ("SV16", 2)
        assert says in caught.value.message
    (stopped / ".nsa-lock").write_text("process 99999999 on elsewhere")  # left by one that died
    goes_on(stopped, whole)
    assert not (stopped / ".nsa-lock").exists()


def test_tr15_a_place_that_is_taken_or_cannot_be_written(stopped, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="holds a run already") as taken:
        run(stopped, "dense")
    assert (taken.value.code, taken.value.exit_status) == ("TR15", 2)
    assert "--resume goes on with it" in taken.value.hint
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("x")
    with pytest.raises(UsageError, match="exists and holds something else"):
        run(other, "dense")

    def denied(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(MachineError, match="Permission denied") as closed:
        run(tmp_path / "closed", "dense")
    assert (closed.value.code, closed.value.exit_status) == ("SV15", 5)


def test_tr22_killed_while_old_checkpoints_are_removed(whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    rmtree = shutil.rmtree

    def killed(path, *args, **kwargs):
        if "checkpoint-2" in str(path) and ".saving" not in str(path):
            (Path(path) / "scheduler.pt").unlink()
            raise KeyboardInterrupt  # the process ends here
        rmtree(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("nsa_convert.training.run.checkpoints.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            train(out, None, stage(keep=1))
    assert (checkpoint(out, 4) / COMPLETE).is_file(), "the newest was there before an old one went"
    assert not (checkpoint(out, 2) / COMPLETE).exists(), "what is half removed does not count as whole"
    train(out, None, stage(keep=1), resume=True)
    assert losses(out) == losses(whole)
