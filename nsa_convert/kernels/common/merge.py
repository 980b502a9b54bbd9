"""Joining attention outputs: the exact union over disjoint key sets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
