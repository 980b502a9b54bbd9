"""Alarms of a run for what stays finite: a loss that left for the level of a guess, gates that shut."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nsa_convert.methods.parts.gates import BranchGate

PATIENCE = 3
"""Log lines in a row that must look bad before an alarm is raised."""
LOST_SHARE = 0.5
"""Share of what was ever learned, ln V minus the best loss, that a diverged run has lost."""
FLAT_MARGIN = 0.005
"""A loss within this share below ln V has learned nothing."""
FLAT_AFTER, FLAT_STEPS = 0.2, 100
"""Share of a stage's steps, and least steps, after which a model must be better than chance."""
WORSE_THAN_CHANCE = 1.1
"""A loss above this many times ln V after the warm-up is confidently wrong."""
SHUT = 0.01
"""Mean size of a gate that passes nothing on."""
BRANCHES = {1: ("output",), 3: ("compressed", "selected", "window")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alarm:
    """What looks wrong.

    Attributes:
        code: ``TR10`` (divergence) or ``TR16`` (gates).
        message: One sentence.
        hint: What to do.
    """

    code: str
    message: str
    hint: str


class Watch:
    """Follows the log lines of a stage.

    Args:
        vocab: Tokens of the model, whose logarithm is the loss of a guess.
        steps: Optimizer steps of the stage.
        warmup: Those of them that warm up.
    """

    def __init__(self, vocab: int, steps: int, warmup: int) -> None:
        self.chance = math.log(vocab)
        self.warmup = warmup
        self.flat_after = max(warmup, FLAT_STEPS, math.ceil(FLAT_AFTER * steps))
        self._best: dict[str, float] = {}
        self._bad: dict[str, int] = {}

    @property
    def suspicious(self) -> bool:
        """Whether the last line looked bad; old checkpoints are kept while it is so."""
        return any(self._bad.values())

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Catch up with the log lines of a run that goes on; what was bad already is told again soon."""
        for row in rows:
            list(self.alarms(row["step"], row))
        self._bad = {name: min(count, PATIENCE - 1) for name, count in self._bad.items()}

    def alarms(self, step: int, values: Mapping[str, float]) -> Iterator[Alarm]:
        """Yield the alarms of a log line.

        Args:
            step: Optimizer steps done.
            values: Name -> mean since the line before.
        """
        for name, value in values.items():
            if name.startswith("cross_entropy") and self._count(name, self._diverged(name, step, value)):
                yield self._divergence(name, step, value)
        open_least = values.get("gate_least_open")
        if open_least is not None and self._count("gates", open_least < SHUT):
            yield Alarm(
                code="TR16",
                message=f"step {step}: in one layer no gate is open further than {open_least:.2g}, so its "
                "attention gives nothing",
                hint="lower lr_new, or start with gate=signed; its slope does not vanish where it shuts",
            )

    def _diverged(self, name: str, step: int, value: float) -> bool:
        best = self._best[name] = min(value, self._best.get(name, value))
        lost = value > best + max(0.5, LOST_SHARE * (self.chance - best)) and best < self.chance
        wrong = step > self.warmup and value > WORSE_THAN_CHANCE * max(self.chance, best)
        flat = step > self.flat_after and value > self.chance * (1 - FLAT_MARGIN)
        return lost or wrong or flat

    def _count(self, name: str, is_bad: bool) -> bool:
        self._bad[name] = self._bad.get(name, 0) + 1 if is_bad else 0
        return self._bad[name] == PATIENCE

    def _divergence(self, name: str, step: int, value: float) -> Alarm:
        return Alarm(
            code="TR10",
            message=f"step {step}: {name} {value:.3f} was {self._best[name]:.3f} at best, and a guess has "
            f"{self.chance:.3f}: the run diverged or does not learn",
            hint="lower lr and lr_new or lengthen the warm-up, and begin before this step; or --resume with "
            "--set alarms=warn, which goes on all the same",
        )


class GateMeter:
    """Means of the gates over a log interval, from hooks on the gates of a model.

    Args:
        model: The model; without gates nothing is measured.
    """

    def __init__(self, model: nn.Module) -> None:
        gates = [module for module in model.modules() if isinstance(module, BranchGate)]
        self._sums: list[Tensor | None] = [None] * len(gates)
        self._counts = [0] * len(gates)
        for index, gate in enumerate(gates):
            gate.register_forward_hook(self._hook(index))

    def _hook(self, index: int) -> Any:
        def note(gate: nn.Module, args: Any, out: Tensor) -> None:
            if gate.training:
                value = out.detach().abs().float().mean((0, 1, 2))  # [branches]
                before = self._sums[index]
                self._sums[index] = value if before is None else before + value
                self._counts[index] += 1

        return note

    def take(self) -> dict[str, float]:
        """Return ``gate_<branch>``, means over the layers, and ``gate_least_open``; then begin anew.

        The last is the widest open branch of the layer where that is the smallest.
        """
        rows = [
            (total / count).cpu()
            for total, count in zip(self._sums, self._counts, strict=True)
            if total is not None
        ]
        self._sums, self._counts = [None] * len(self._sums), [0] * len(self._counts)
        if not rows:
            return {}
        out = {"gate_least_open": float(torch.stack([row.max() for row in rows]).min())}
        for count in sorted({len(row) for row in rows}):
            means = torch.stack([row for row in rows if len(row) == count]).mean(0)
            names = BRANCHES.get(count) or [str(i) for i in range(count)]
            out |= {f"gate_{name}": float(value) for name, value in zip(names, means, strict=True)}
        return out
