"""Callbacks of transformers' Trainer: stop on a signal, and contain the errors of other callbacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


class StopOnSignal(TrainerCallback):
    """Saves a checkpoint and ends the stage after the step in which a signal came.

    Args:
        signals: Has the ``number`` of the signal that came, or 0; also set when another process got one.
    """

    def __init__(self, signals: Any) -> None:
        self.signals = signals

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save and stop if any process received a signal."""
        number = self.signals.number
        # All processes have to stop after the same step, or the others wait for this one for ever.
        if args.world_size > 1:
            flag = torch.tensor([number], device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            number = self.signals.number = int(flag)

        if number:
            control.should_save = control.should_training_stop = True


class EvaluateEvery(TrainerCallback):
    """Asks for an evaluation at the start, every so many steps, and at the end.

    Args:
        steps: Steps between evaluations.
        evaluate: Evaluates at the start, where the Trainer itself has no place for it.
    """

    def __init__(self, steps: int, evaluate: Callable[[], Any]) -> None:
        self.steps = steps
        self.evaluate = evaluate

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Evaluate what the stage starts from; a resumed run has done so before."""
        if state.global_step == 0:
            self.evaluate()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for an evaluation after this step."""
        if state.global_step % self.steps == 0 or state.global_step == state.max_steps:
            control.should_evaluate = True


class Profile(TrainerCallback):
    """Records one optimizer step with torch.profiler, and writes a trace for Perfetto.

    Args:
        step: Number of the step, from 1.
        folder: Receives ``profile-step-N-rank-R.json.gz``.
    """

    def __init__(self, step: int, folder: Path) -> None:
        self.step = step
        self.folder = folder
        self.profiler: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin before the step; operations of all devices, with shapes and memory."""
        if state.global_step + 1 == self.step:
            self.profiler = torch.profiler.profile(record_shapes=True, profile_memory=True)
            self.profiler.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the trace after the step."""
        if self.profiler is not None:
            self.profiler.stop()
            name = f"profile-step-{self.step}-rank-{args.process_index}.json.gz"
            self.profiler.export_chrome_trace(str(self.folder / name))
            self.profiler = None


def guarded(callback: Any, report_error: Callable[[str, Exception], None]) -> Any:
    """Wrap a callback of another library (curves, tracking services): its errors do not end the run.

    Args:
        callback: A TrainerCallback.
        report_error: Called with the name of the event and the error, at the first error of each event.

    Returns:
        A TrainerCallback with every event of the given one.
    """

    class Guarded(TrainerCallback):
        """Calls another callback and catches its errors."""

    told: set[str] = set()

    def make(name: str) -> Callable:
        def event(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            try:
                return getattr(callback, name)(args, state, control, **kwargs)
            except Exception as error:
                # why: a broken service must not cost a run of days; what it raised is told once
                if name not in told:
                    told.add(name)
                    report_error(f"{type(callback).__name__}.{name}", error)
                return None

        return event

    # The Trainer calls events by name: each `on_...` method becomes a guarded one.
    for name in dir(TrainerCallback):
        if name.startswith("on_"):
            setattr(Guarded, name, make(name))

    return Guarded()
