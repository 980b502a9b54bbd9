"""`--set measure=true` times the step that the run takes, in its trainer, with all that belongs to it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from nsa_convert.cli import main
from nsa_convert.training.recipe.library import known_recipes
from nsa_convert.training.recipe.schema import read_recipe
from nsa_convert.training.run import timing
from nsa_convert.training.run.forecast import forecast_recipe
from nsa_convert.training.run.models import read_start
from nsa_convert.training.run.trainer import StageTrainer
from tests.training.recipes import NSA, ROOT, recipe, stage

STAGES = [
    stage("align", kind="align", train="new"),
    stage("long", kind="extend", seq_len=64, tokens=640, rope={"type": "linear", "factor": 2}),
    stage("adapt", train="lora", checkpointing=True, teacher_kl=1.0),
]


def seen_by(read: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[dict[str, Any]]]:
    """Measure a recipe; return its forecast, and what each of the micro-batches met."""
    seen: list[dict[str, Any]] = []
    compute = StageTrainer.compute_loss

    def watched(self: StageTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(
            {
                "shape": tuple(inputs["input_ids"].shape),
                "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "weights": torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]),
                "recomputes": any(getattr(m, "gradient_checkpointing", False) for m in model.modules()),
                "positions": model.config.max_position_embeddings,
            }
        )
        # Autocast is on inside of the model alone.
        layer = next(m for m in model.modules() if isinstance(m, torch.nn.Linear))
        note = lambda *_: seen[-1].update(autocast=torch.is_autocast_enabled("cpu"))  # noqa: E731
        with layer.register_forward_pre_hook(note):
            return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "compute_loss", watched)
    start = read_start(read, None)
    forecast = forecast_recipe(read, start, ROOT)
    return timing.measure_stages(read, start, ROOT, forecast), seen


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16"])
def test_the_measured_step_is_that_of_the_stage(precision, tmp_path, monkeypatch):
    out = tmp_path / "out"
    read = dataclasses.replace(recipe(out, NSA, *STAGES), precision=precision)
    measured, seen = seen_by(read, monkeypatch)

    # Two micro-batches of each stage, the second with other weights: the optimizer has stepped between them.
    assert [one["shape"] for one in seen] == [(1, 32)] * 2 + [(1, 64)] * 2 + [(1, 32)] * 2
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert not torch.equal(first["weights"], second["weights"])
    assert all(one["autocast"] == (precision != "fp32") for one in seen)
    assert [one["recomputes"] for one in seen[::2]] == [False, False, True]

    # What is trained, and the RoPE that a stage before has set.
    assert [one["trained"] for one in seen[::2]] == [one.trained for one in measured.stages]
    assert [one["positions"] for one in seen[::2]] == [64, 128, 128]

    assert all(one.seconds_per_step > 0 for one in measured.stages)
    assert not out.exists()


def test_passes_count_for_each_micro_batch_and_the_optimizer_once(tmp_path, monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(timing, "_now", lambda: float(next(ticks)))
    read = recipe(tmp_path / "out", None, stage(batch_tokens=64))
    measured, _ = seen_by(read, monkeypatch)

    # By a clock that ticks when it is read: 1 for the passes, and 3 - 1 for the step around them.
    assert measured.stages[0].seconds_per_step == 2 * 1 + 2


@pytest.mark.parametrize("name", ["tiny/sft", pytest.param("tiny/nsa", marks=pytest.mark.slow)])
def test_the_command_says_the_time_of_every_stage(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(main, ["train", name, "--dry-run", "--set", "measure=true", "--json"])
    assert run.exit_code == 0, run.output
    stages = json.loads(run.stdout)["stages"]
    assert [one["name"] for one in stages] == [one.name for one in read_recipe(known_recipes()[name]).stages]
    assert all(one["seconds_per_step"] > 0 for one in stages)
    assert not list(tmp_path.iterdir())


def test_a_control_is_measured_too(tmp_path, monkeypatch):
    held_out = {"data": [{"kind": "reference", "hold_out": 0.1}], "eval_every": 2}
    read = recipe(tmp_path / "out", NSA, STAGES[0], stage(**held_out), control=True)
    measured, seen = seen_by(read, monkeypatch)
    assert len(measured.stages) == 3
    assert all(one.seconds_per_step > 0 for one in measured.stages)
    assert [one["trained"] for one in seen[::2]] == [one.trained for one in measured.stages]
