"""The optimizer, its parameter groups and the learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from nsa_convert.methods.parts.gates import BranchGate
from nsa_convert.training.recipe.schema import Stage

GATE_WIDTH = 64
"""Hidden size of the models that the published rates of new weights were found on (docs/recovery.md).

AdamW moves every weight by about its rate, so that the logit of a gate moves by the rate times the sum of its
inputs: the rate of a matrix goes with one over the number of its inputs (arXiv 2203.03466, table 8).
"""


class MasterAdamW(torch.optim.AdamW):
    """AdamW that updates weights of half precision in float32.

    A bfloat16 weight has 8 significant bits: at a learning rate of 2e-5 most updates are less than half a
    unit of its last place and would be rounded away. So the state of such a weight holds, beside both
    moments, a float32 copy (``master``) that takes every update; the weight is that copy, rounded. Weights of
    other dtypes are updated as :class:`torch.optim.AdamW` does.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step; return what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        """Update one weight from its gradient."""
        state = self.state[p]
        wide = _state_dtype(p)
        half = p.dtype != wide
        if "step" not in state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(p, dtype=wide)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=wide)
        # A state of plain AdamW has no master: it begins at the weight.
        if half and "master" not in state:
            state["master"] = p.detach().to(wide)

        weight = state["master"] if half else p
        first, second = group["betas"]
        adamw(
            [weight],
            [p.grad.to(weight.dtype)],  # type: ignore[union-attr]
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            amsgrad=False,
            beta1=first,
            beta2=second,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if half:
            p.copy_(weight)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; moments and masters stay in float32, where torch would round them to the weight's."""
        super().load_state_dict(state_dict)

        # torch numbers the weights over all groups, in their order.
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        weights = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, weights, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if name != "step" and isinstance(value, Tensor) and value.is_floating_point():
                    self.state[p][name] = value.to(device=p.device, dtype=_state_dtype(p), copy=True)


def _state_dtype(p: Tensor) -> torch.dtype:
    """Return the dtype of the state of a weight: at least float32."""
    return torch.promote_types(p.dtype, torch.float32)


def parameter_groups(model: nn.Module, stage: Stage) -> list[dict[str, Any]]:
    """Return the optimizer's groups: dense matrices, dense vectors, new weights and gates at their own rates.

    Weight decay applies to dense matrices only. Empty groups are left out.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    gates = {id(m.weight): m.weight.shape[1] for m in model.modules() if isinstance(m, BranchGate)}

    # Weights that conversion added live in the `sparse` module of a layer.
    new = [p for name, p in named if ".sparse." in name and id(p) not in gates]
    gate = [p for name, p in named if id(p) in gates]
    old = [p for name, p in named if ".sparse." not in name]

    lr_new = stage.lr if stage.lr_new is None else stage.lr_new
    lr_gate = stage.lr_gate
    if lr_gate is None:
        lr_gate = lr_new * min(1.0, GATE_WIDTH / max(gates.values(), default=1))

    groups = [
        {"params": [p for p in old if p.dim() > 1], "lr": stage.lr, "weight_decay": stage.weight_decay},
        {"params": [p for p in old if p.dim() < 2], "lr": stage.lr, "weight_decay": 0.0},
        {"params": new, "lr": lr_new, "weight_decay": 0.0},
        {"params": gate, "lr": lr_gate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def rate(stage: Stage, step: int) -> float:
    """Return the learning rate of optimizer step ``step`` (from 0), as a share of the peak."""
    # Warm-up: linear, from above 0 to the peak.
    warmup = math.ceil(stage.warmup * stage.steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)

    # Decay: from the peak to `min_lr`, linear or along half a cosine.
    done = min(1.0, (step - warmup) / max(1, stage.steps - warmup))
    if stage.schedule == "constant":
        return 1.0
    fall = done if stage.schedule == "linear" else (1 - math.cos(math.pi * done)) / 2
    return 1 - (1 - stage.min_lr) * fall
