"""How well a compressed cell predicts the attention its tokens get.

A query gives the tokens of a cell the mass ``sum_i exp(s q k_i)``. The papers estimate its logarithm by the
mean key, ``s q mean(k)``: the first cumulant of ``s q k_i`` over the cell. The second one, half the variance,
is what makes a cell with one outstanding token (a needle among noise) score high. Along the coordinates of a
head it is ``1/2 s^2 sum_d q_d^2 var_d(k)``, one more vector per cell, linear in the squared query: so the
kernels score with both as with one key of 2 D numbers.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nsa_convert.methods.parts.base import AttentionInputs, TrainingSpec


def half_variance(windows: Tensor) -> Tensor:
    """Return half the variance of each coordinate over the window.

    Args:
        windows: ``[B, N, l, H, D]``.

    Returns:
        ``[B, N, H, D]`` in the same dtype; no gradient, since block choices have none.
    """
    with torch.no_grad():
        wide = windows if windows.dtype == torch.float64 else windows.float()
        return (0.5 * wide.var(2, unbiased=False)).to(windows.dtype)


def second_order(q: Tensor, scale: float) -> Tensor:
    """Return the query that scores compressed keys and half variances side by side.

    Args:
        q: ``[B, TQ, HQ, D]``.
        scale: Factor on the scores.

    Returns:
        ``[B, TQ, HQ, 2 D]``: its scaled product with a cell's mean and :func:`half_variance` side by side is
        the second-order score.
    """
    wide = q if q.dtype == torch.float64 else q.float()
    return torch.cat([q, (scale * wide.square()).to(q.dtype)], -1)


def scored(x: AttentionInputs, scorer: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the queries ``[B, TQ, HQ, E]`` and the parts of the cell keys whose product scores a cell.

    Args:
        x: With the pool ``"key"``, and ``"half_variance"`` for the second order.
        scorer: ``"first_order"`` or ``"second_order"``.
    """
    if scorer == "first_order":
        return x.q, (x.pooled["key"],)
    return second_order(x.q, x.scale), (x.pooled["key"], x.pooled["half_variance"])


def with_scores(spec: TrainingSpec) -> TrainingSpec:
    """Return how a method is trained whose compressor has weights: with ``score_kl`` in every stage.

    A compressor that learns in one stage alone is left behind by the keys that the next ones move.
    """
    kinds = ("align", "pretrain", "extend", "sft")
    losses = {kind: {**spec.stage_losses.get(kind, {}), "score_kl": 1.0} for kind in kinds}
    return dataclasses.replace(spec, stage_losses=losses)


def for_loss(x: AttentionInputs, cells: str, *, alone: bool) -> AttentionInputs:
    """Return the inputs from which a loss on the scores takes queries and cell keys.

    Args:
        x: Inputs of the layer.
        cells: The pool of cell keys that the loss reads.
        alone: Whether the compressor is to learn alone, so that no gradient reaches the queries.
    """
    q = x.q.detach() if alone else x.q
    return dataclasses.replace(x, q=q, pooled={**x.pooled, "key": x.pooled[cells]})
