"""What a training step asks of every layer."""

from __future__ import annotations

import dataclasses
from typing import Literal

from nsa_convert.methods.parts.losses import Total, own

Stream = Literal["ordinary", "sparse", "full", "teacher"]
"""Which output the residual stream carries; see :class:`TrainingMode`."""
CHOICE_LOSSES = ("index_kl", "score_kl")
"""Auxiliary losses that train what chooses keys: no gradient passes through the choice itself."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingMode:
    """What a training step asks of every layer.

    It travels as an argument of the call, so a layer that gradient checkpointing runs a second time does the
    same thing again, and every process of a step agrees.

    Attributes:
        stream: Which output the residual stream carries: ``"ordinary"`` (that of a forward without a training
            mode), ``"sparse"``, ``"full"`` (the method's own dense mode, gates included) or ``"teacher"``
            (dense attention as the dense model has it, no new weight).
        losses: Names of the auxiliary losses wanted, in this order.
        weights: Weight of each in the model's loss, of the sum over the layers; empty where the model only
            reports them.
        cross_entropy: Weight of the next-token loss in the model's loss.
        teacher_kl: Weight of the divergence of the model's logits from those of dense attention.
        draw: Number of the micro-batch; losses on a sample of the queries draw it from this.
        keep_logits: Whether the output holds the logits. Without them the losses on them are computed in
            chunks, so that they are never all in memory.
        total: All-reduce (sum) over the context-parallel group; losses are ratios of such sums.
    """

    stream: Stream = "sparse"
    losses: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    cross_entropy: float = 1.0
    teacher_kl: float = 0.0
    draw: int = 0
    keep_logits: bool = True
    total: Total = own
