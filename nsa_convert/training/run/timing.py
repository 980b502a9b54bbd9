"""The time of a step of each stage, measured in the trainer that will run it."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from nsa_convert.loading import load_tokenizer, quiet
from nsa_convert.notices import silent
from nsa_convert.training.recipe.schema import Recipe, Stage
from nsa_convert.training.run.control import control_of, dense_start
from nsa_convert.training.run.failures import explained
from nsa_convert.training.run.forecast import RecipeForecast
from nsa_convert.training.run.models import Start, fresh_tokenizer, load_first, prepare_model, set_rope
from nsa_convert.training.run.stages import make_trainer

STEPS = 2
"""Steps of one micro-batch each; the first pays for compilation and allocation, the last one counts."""


class StepClock(TrainerCallback):
    """Reads the clock around steps, and around their forward and backward passes.

    Attributes:
        passes: Seconds of forward and backward of the last step.
        rest: Seconds of the last step beside them: clipping, the optimizer, the log.
    """

    passes = 0.0
    rest = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """A step begins."""
        self._begin = _now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step has ended."""
        self.rest = _now() - self._begin - self.passes

    def timed(self, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the forward and backward passes of a trainer, timed."""

        def passes(*args: Any, **kwargs: Any) -> Tensor:
            begin = _now()
            loss = run(*args, **kwargs)
            self.passes = _now() - begin
            return loss

        return passes


def measure_stages(recipe: Recipe, start: Start, base: Path, forecast: RecipeForecast) -> RecipeForecast:
    """Return the forecast with the seconds of an optimizer step of each stage, in one process.

    Every stage runs two steps of one micro-batch in its own trainer: the same rows, losses, autocast,
    checkpointing, adapters and optimizer, on the first model. A step takes the passes of the second one as
    often as it has micro-batches, and once what is not passes.

    Args:
        recipe: The recipe.
        start: The model's config.
        base: Folder that relative data paths start from.
        forecast: Of the recipe.

    Raises:
        MachineError: The memory does not suffice (TR11).
    """
    runs: list[tuple[Recipe, Start]] = [(recipe, start)]
    if recipe.control:
        runs.append((control_of(recipe), dense_start(start)))
    places = [(own, first, index) for own, first in runs for index in range(len(own.stages))]

    stages = []
    for known, (own, first, index) in zip(forecast.stages, places, strict=True):
        seconds = _step_seconds(own, index, first, base)
        stages.append(dataclasses.replace(known, seconds_per_step=seconds))
    return dataclasses.replace(forecast, stages=tuple(stages))


def _step_seconds(recipe: Recipe, index: int, start: Start, base: Path) -> float:
    """Return the seconds of one optimizer step of a stage, as one process takes it."""
    stage = recipe.stages[index]
    clock = StepClock()

    # why: the log of two steps, removed with the folder
    with tempfile.TemporaryDirectory() as folder, explained(stage), quiet():
        short = _shortened(recipe, stage, Path(folder))
        model = load_first(recipe, start)

        # A stage keeps the RoPE that one before it has set.
        scalings = [one.rope for one in recipe.stages[: index + 1] if one.rope is not None]
        if scalings:
            set_rope(model, scalings[-1])

        model = prepare_model(model, short.stages[0])
        tokenizer = fresh_tokenizer(recipe, base) if start.folder is None else load_tokenizer(start.folder)
        trainer = make_trainer(short, 0, model, tokenizer, base, facts={}, say=silent)
        trainer.add_callback(clock)
        trainer.training_step = clock.timed(trainer.training_step)  # type: ignore[method-assign]
        trainer.train()

    turns = stage.rows_per_step // stage.micro_batch
    return turns * clock.passes + clock.rest


def _shortened(recipe: Recipe, stage: Stage, out: Path) -> Recipe:
    """Return a recipe of one stage with steps of one micro-batch, one process, and nothing written."""
    batch = stage.micro_batch * stage.seq_len
    short = dataclasses.replace(
        stage,
        tokens=STEPS * batch,
        batch_tokens=batch,
        save_every=0,
        eval_every=0,
        keep_best=None,
        patience=0,
    )
    return dataclasses.replace(
        recipe,
        stages=(short,),
        out=str(out),
        report_to="none",
        alarms="warn",
        profile=0,
        workers=0,
        fsdp=1,
        tensor=1,
        context=1,
        fsdp_send="float32",
        control=False,
    )


def _now() -> float:
    """Return the time, when the device has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
