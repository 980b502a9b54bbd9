"""Alarms for a run that goes wrong with finite numbers: a diverged loss, gates that close."""

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
FLAT_AFTER = 0.2
"""Share of a stage's steps after which a model must be better than chance."""
FLAT_STEPS = 100
"""Least number of steps after which a model must be better than chance."""
WORSE_THAN_CHANCE = 1.1
"""A loss above this many times ln V after the warm-up is worse than that of a uniform guess."""
SHUT = 0.01
"""Mean absolute value below which a gate counts as closed."""
BRANCHES = {1: ("output",), 3: ("compressed", "selected", "window")}
"""Number of branches of a gate -> their names."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alarm:
    """One sign that a run goes wrong.

    Attributes:
        code: ``TR10`` (divergence) or ``TR16`` (gates).
        message: One sentence.
        hint: What to do.
    """

    code: str
    message: str
    hint: str


class Watch:
    """Follows the log lines of a stage and raises alarms.

    Args:
        vocab: Size of the vocabulary V; the loss of a uniform guess is ln V.
        steps: Optimizer steps of the stage.
        warmup: Warm-up steps among them.
    """

    def __init__(self, vocab: int, steps: int, warmup: int) -> None:
        self.chance = math.log(vocab)
        self.warmup = warmup
        self.flat_after = max(warmup, FLAT_STEPS, math.ceil(FLAT_AFTER * steps))
        self._best: dict[str, float] = {}
        self._bad: dict[str, int] = {}

    @property
    def suspicious(self) -> bool:
        """Whether the last log line looked bad; as long as it is, no old checkpoint is removed."""
        return any(self._bad.values())

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Read the log lines of a resumed run again.

        A count of bad lines is kept below the alarm, so one more bad line raises it again.
        """
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

        # The gate that is open widest in the layer where that is least: below SHUT, a layer adds nothing.
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

        # Lost: half of what was learned is gone. Wrong: worse than a guess. Flat: no better than a guess.
        lost = value > best + max(0.5, LOST_SHARE * (self.chance - best)) and best < self.chance
        wrong = step > self.warmup and value > WORSE_THAN_CHANCE * max(self.chance, best)
        flat = step > self.flat_after and value > self.chance * (1 - FLAT_MARGIN)
        return lost or wrong or flat

    def _count(self, name: str, is_bad: bool) -> bool:
        # Equal, not at least: a lasting fault is reported once.
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
    """Measures the mean gate values over a log interval, with forward hooks on the gates of a model.

    Args:
        model: The model; without gates nothing is measured.
    """

    def __init__(self, model: nn.Module) -> None:
        gates = [module for module in model.modules() if isinstance(module, BranchGate)]

        # One running sum [branches] and one count for each gate.
        self._sums: list[Tensor | None] = [None] * len(gates)
        self._counts = [0] * len(gates)

        for index, gate in enumerate(gates):
            gate.register_forward_hook(self._hook(index))

    def _hook(self, index: int) -> Any:
        def note(gate: nn.Module, args: Any, out: Tensor) -> None:
            # Evaluation passes do not count.
            if gate.training:
                # [B, S, H, branches] -> [branches]
                value = out.detach().abs().float().mean((0, 1, 2))
                before = self._sums[index]
                self._sums[index] = value if before is None else before + value
                self._counts[index] += 1

        return note

    def take(self) -> dict[str, float]:
        """Return the means since the last call, then start a new interval.

        Returns:
            ``gate_<branch>``: mean over the layers with such a gate. ``gate_least_open``: the mean of the
            widest open branch in the layer where that is smallest. Empty when nothing was measured.
        """
        # One row [branches] for each gate that was used.
        rows = [
            (total / count).cpu()
            for total, count in zip(self._sums, self._counts, strict=True)
            if total is not None
        ]
        self._sums = [None] * len(self._sums)
        self._counts = [0] * len(self._counts)
        if not rows:
            return {}

        # Layers may differ in their number of branches: each number has its own means.
        out = {"gate_least_open": float(torch.stack([row.max() for row in rows]).min())}
        for count in sorted({len(row) for row in rows}):
            means = torch.stack([row for row in rows if len(row) == count]).mean(0)
            names = BRANCHES.get(count) or [str(i) for i in range(count)]
            out |= {f"gate_{name}": float(value) for name, value in zip(names, means, strict=True)}
        return out
