"""Numbers of a run that go wrong, and things below it that fail: stopped, told, resumable (TR)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from triton.compiler.errors import CompilationError

from nsa_convert.errors import BackendError, CheckFailedError, MachineError, NsaConvertError
from nsa_convert.methods.parts.gates import BranchGate
from nsa_convert.training.run import trainer
from nsa_convert.training.run.alarms import Watch
from nsa_convert.training.run.checkpoints import COMPLETE
from nsa_convert.training.run.resume import Allow
from nsa_convert.training.run.runner import train_recipe
from tests.faults.runs import ROOT, checkpoint, goes_on, train
from tests.training.recipes import ALIGN, NSA, losses, recipe, run, same_weights, stage


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_tr09_nan_stops_before_the_weights(whole, tmp_path, monkeypatch, where):
    out = tmp_path / "run"
    place = (trainer.StageTrainer, "compute_loss") if where == "loss" else (trainer.Trainer, "_get_grad_norm")
    original = getattr(*place)

    def spoil(self, *args, **kwargs):
        return original(self, *args, **kwargs) * (math.nan if self.state.global_step == 3 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(*place, spoil)
        with pytest.raises(CheckFailedError, match="in step 4; nothing was updated") as caught:
            run(out, "dense")
    assert (caught.value.code, caught.value.exit_status) == ("TR09", 4)
    note = json.loads(Path(caught.value.where).read_text())
    assert note["step"] == 3
    assert len(note["batch"]["input_ids"][0]) == 32
    goes_on(out, whole)


def test_tr10_a_loss_that_left_for_the_level_of_a_guess(tmp_path):
    """A model that learned first, then gets a learning rate of ten: finite, and worse than a guess."""
    train(tmp_path / "first", None, stage(tokens=64 * 40, lr=1e-2, log_every=10, save_every=0))
    model = tmp_path / "first" / "pretrain" / "model"
    wild = {"tokens": 64 * 12, "lr": 10.0, "warmup": 0.0, "schedule": "constant", "save_every": 1, "keep": 2}

    def wild_run(out, **changes):
        said = []
        values = recipe(out, None, stage(**wild), model=str(model), **changes)
        train_recipe(values, model, base=ROOT, say=said.append)
        return said

    with pytest.raises(CheckFailedError, match="the run diverged or does not learn") as caught:
        wild_run(tmp_path / "stop")
    assert (caught.value.code, caught.value.exit_status) == ("TR10", 4)
    assert "--set alarms=warn" in caught.value.hint
    rows = losses(tmp_path / "stop")
    assert all(math.isfinite(loss) for *_, loss in rows)
    assert len(rows) < 12
    kept = {path.name for path in (tmp_path / "stop" / "pretrain").glob("checkpoint-*")}
    assert "checkpoint-1" in kept, "while the loss looks bad no old checkpoint is removed"
    assert any("warning [TR10]" in line for line in wild_run(tmp_path / "warn", alarms="warn"))


@pytest.mark.parametrize(
    ("values", "at"),
    [
        ([2.0, 2.1, 5.4, 5.4, 5.4, 5.4], 5),  # flat at ln V
        ([2.0, 5.4, 2.2, 5.4, 5.4, 2.1], None),  # never for long
        ([5.5] * 300, 103),  # never learned anything
        ([5.5 - i / 300 for i in range(300)], None),  # slowly, but it learns
        ([5.6, 9.0, 9.0, 9.0], 4),  # worse than a guess
    ],
)
def test_tr10_what_counts_as_divergence(values, at):
    watch = Watch(vocab=250, steps=len(values), warmup=1)
    found = [step for step, x in enumerate(values, 1) for _ in watch.alarms(step, {"cross_entropy": x})]
    assert found[:1] == ([] if at is None else [at])


def test_tr11_out_of_memory(whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    compute = trainer.StageTrainer.compute_loss

    def hungry(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(trainer.StageTrainer, "compute_loss", hungry)
    with pytest.raises(MachineError) as caught:
        run(out, "dense")
    monkeypatch.undo()
    assert (caught.value.code, caught.value.exit_status) == ("TR11", 5)
    assert "rows of 32 tokens, 1 at a time, without checkpointing" in caught.value.message
    assert "--resume with --set stages.pretrain.checkpointing=true; or in another out" in caught.value.hint
    goes_on(out, whole)


def test_tr11_the_advice_can_be_followed(stopped, whole):
    """Fewer rows at a time and recomputation go on with the same run, to rounding."""
    stages = [stage(checkpointing=True, micro_batch=2)]
    train(stopped, None, *stages, resume=True)
    for (*_, got), (*_, want) in zip(losses(stopped), losses(whole), strict=True):
        assert abs(got - want) < 1e-5


def test_tr16_gates_that_shut_raise_an_alarm(tmp_path, monkeypatch):
    start = BranchGate.initial_values

    def shut(self):
        return {name: x - 20 if name == "bias" else x for name, x in start(self).items()}

    monkeypatch.setattr(BranchGate, "initial_values", shut)
    method = {**NSA, "gate": "sigmoid"}
    with pytest.raises(CheckFailedError, match="in one layer no gate is open further than") as caught:
        train(tmp_path / "stop", method, stage())
    assert (caught.value.code, caught.value.exit_status) == ("TR16", 4)
    row = json.loads((tmp_path / "stop" / "log.jsonl").read_text().splitlines()[-1])
    assert row["gate_selected"] < 1e-6
    said = []
    train(tmp_path / "warn", method, stage(), alarms="warn", say=said.append)
    assert sum("warning [TR16]" in line for line in said) == 1


def test_tr17_frozen_weights_do_not_move(tmp_path, monkeypatch):
    train(tmp_path / "first", NSA, ALIGN)
    first = tmp_path / "first" / "align" / "model"
    second = {**ALIGN, "name": "second", "tokens": 64}
    train(tmp_path / "both", NSA, ALIGN, second)
    before, after = (
        load_file(folder / "model.safetensors") for folder in (first, tmp_path / "both" / "second" / "model")
    )
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved
    assert all(".self_attn.sparse." in key for key in moved)
    compute = trainer.StageTrainer.compute_loss

    def tamper(self, model, *args, **kwargs):
        model.model.norm.weight.data[[0, 1]] += torch.tensor([0.5, -0.5])  # the sum stays the same
        return compute(self, model, *args, **kwargs)

    monkeypatch.setattr(trainer.StageTrainer, "compute_loss", tamper)
    with pytest.raises(NsaConvertError, match="a weight that is not trained changed") as caught:
        train(tmp_path / "third", NSA, ALIGN)
    assert (caught.value.code, caught.value.exit_status) == ("TR17", 1)
    assert not (tmp_path / "third" / "align" / "model").exists()


def test_tr18_a_service_that_fails_does_not_end_the_run(whole, tmp_path, monkeypatch):
    from transformers import TrainerCallback

    class Curves(TrainerCallback):
        def on_log(self, *args, **kwargs):
            raise ConnectionError("the service is down")

    Curves.__module__ = "transformers.integrations.curves"
    defaults = "transformers.trainer.DEFAULT_CALLBACKS"
    monkeypatch.setattr(defaults, [*trainer.Trainer.__init__.__globals__["DEFAULT_CALLBACKS"], Curves])
    said = []
    run(tmp_path / "run", "dense", say=said.append)
    told = [line for line in said if "TR18" in line]
    assert told == [
        "warning [TR18]: Curves.on_log failed (ConnectionError: the service is down); training goes on"
    ]
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["error"] for row in rows if "error" in row] == [
        "Curves.on_log: ConnectionError: the service is down"
    ]
    assert same_weights(tmp_path / "run" / "pretrain", whole / "pretrain")


def test_tr19_the_same_seed_and_the_same_batch_in_pieces(whole, tmp_path):
    run(tmp_path / "again", "dense")
    assert losses(tmp_path / "again") == losses(whole)
    assert same_weights(tmp_path / "again" / "pretrain", whole / "pretrain")
    for name, rows in (("one", 1), ("four", 4)):
        train(tmp_path / name, NSA, stage(micro_batch=rows, batch_tokens=128, tokens=128 * 2))
    one, four = (losses(tmp_path / name) for name in ("one", "four"))
    assert max(abs(a[2] - b[2]) for a, b in zip(one, four, strict=True)) < 1e-6


def test_tr20_a_kernel_that_does_not_compile(whole, tmp_path, monkeypatch):
    compute = trainer.StageTrainer.compute_loss

    def broken(self, *args, **kwargs):
        from nsa_convert.kernels.common.backend import current_backend

        if self.state.global_step == 3 and current_backend() != "torch":
            raise CompilationError(None, None, "unsupported instruction")
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(trainer.StageTrainer, "compute_loss", broken)
    out = tmp_path / "run"
    with pytest.raises(BackendError) as caught:
        run(out, "dense")
    assert (caught.value.code, caught.value.exit_status) == ("TR20", 5)
    assert "unsupported instruction" in caught.value.message
    assert "--allow-eager-fallback" in caught.value.hint
    assert (checkpoint(out, 2) / COMPLETE).is_file()
    said = []
    allow = Allow(eager_fallback=True)
    run(tmp_path / "other", "dense", say=said.append, allow=allow)
    assert sum("warning [TR20]" in line for line in said) == 1
    assert same_weights(tmp_path / "other" / "pretrain", whole / "pretrain")
    goes_on(out, whole, allow=allow)
