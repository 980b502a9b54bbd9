"""The optimizer's parameter groups and the learning rate schedule."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from nsa_convert.training.recipe.schema import Stage


def parameter_groups(model: nn.Module, stage: Stage) -> list[dict[str, Any]]:
    """Return the optimizer's groups: dense matrices, dense vectors, and new weights with their own rate.

    Weight decay applies to dense matrices only. Empty groups are left out.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    # Weights that conversion added live in the `sparse` module of a layer.
    new = [p for name, p in named if ".sparse." in name]
    old = [p for name, p in named if ".sparse." not in name]
    lr_new = stage.lr if stage.lr_new is None else stage.lr_new

    groups = [
        {"params": [p for p in old if p.dim() > 1], "lr": stage.lr, "weight_decay": stage.weight_decay},
        {"params": [p for p in old if p.dim() < 2], "lr": stage.lr, "weight_decay": 0.0},
        {"params": new, "lr": lr_new, "weight_decay": 0.0},
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
