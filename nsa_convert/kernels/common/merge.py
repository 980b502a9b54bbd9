"""Joining attention outputs: the exact union over disjoint key sets, and sums with gates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nsa_convert.kernels.common.backend import choose_backend, kernel_function


def merge_lse(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Join attentions over disjoint keys into one softmax over their union.

    ``o = sum_i exp(lse_i - lse) o_i`` with ``lse = logsumexp_i(lse_i)``; a part that saw no key has
    ``lse = -inf`` and drops out.

    Args:
        outputs: Each ``[B, TQ, HQ, D]``.
        lses: Each ``[B, TQ, HQ]``, natural log, float32 or float64.

    Returns:
        ``(o, lse)``: ``[B, TQ, HQ, D]`` in the dtype of the first output, and ``[B, TQ, HQ]``; where no
        part saw a key, o is 0 and lse is -inf.

    Raises:
        ValueError: The lists are empty or of different lengths.
    """
    if not outputs or len(outputs) != len(lses):
        raise ValueError(f"need as many outputs as lses and at least one, got {len(outputs)} and {len(lses)}")
    stacked = torch.stack(list(lses))
    lse = stacked.logsumexp(0)
    weights = torch.exp(stacked - lse.masked_fill(lse == -torch.inf, 0.0))
    o = sum(w[..., None] * part.to(w.dtype) for w, part in zip(weights, outputs, strict=True))
    return o.to(outputs[0].dtype), lse


def gated_sum(outputs: Sequence[Tensor], gates: Tensor) -> Tensor:
    """Return ``sum_i g_i o_i`` (NSA eq. 5).

    Args:
        outputs: n branches, each ``[B, TQ, HQ, D]``, of one dtype.
        gates: ``[B, TQ, HQ, n]``, cast to the dtype of the outputs.

    Returns:
        ``[B, TQ, HQ, D]``. The triton backend sums three branches in float32 and rounds once.

    Raises:
        ValueError: There are not as many gates as branches.
    """
    if gates.shape[-1] != len(outputs):
        raise ValueError(f"need one gate for each branch, got {gates.shape[-1]} and {len(outputs)}")
    gates = gates.to(outputs[0].dtype)
    if len(outputs) == 3 and choose_backend(outputs[0]) == "triton":
        return kernel_function("gates.triton_backend", "gated_sum")(tuple(outputs), gates)
    first, *others = gates.unsqueeze(-2).unbind(-1)  # each [B, TQ, HQ, 1]
    o = outputs[0] * first
    for part, gate in zip(outputs[1:], others, strict=True):
        o = torch.addcmul(o, part, gate)
    return o
