"""Callbacks of transformers' Trainer: stop on a signal, and survive what others raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback


class StopOnSignal(TrainerCallback):
    """Saves and ends the stage after the step in which a signal came.

    Args:
        signals: Holds the ``number`` of the signal that came, or 0; gets that of another process too.
    """

    def __init__(self, signals: Any) -> None:
        self.signals = signals

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Agree with the other processes on whether a signal came."""
        number = self.signals.number
        if args.world_size > 1:
            flag = torch.tensor([number], device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            number = self.signals.number = int(flag)
        if number:
            control.should_save = control.should_training_stop = True


def guarded(callback: Any, tell: Callable[[str, Exception], None]) -> Any:
    """Return a callback of someone else (curves, services) whose errors do not end the run.

    Args:
        callback: A TrainerCallback.
        tell: Called with the name of the event and the error, once for each event.
    """

    class Guarded(TrainerCallback):
        """Calls another callback and keeps its errors."""

    told: set[str] = set()

    def make(name: str) -> Callable:
        def event(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            try:
                return getattr(callback, name)(args, state, control, **kwargs)
            except Exception as error:
                # why: a broken service must not cost a run of days; what it raised is told once
                if name not in told:
                    told.add(name)
                    tell(f"{type(callback).__name__}.{name}", error)
                return None

        return event

    for name in dir(TrainerCallback):
        if name.startswith("on_"):
            setattr(Guarded, name, make(name))
    return Guarded()
