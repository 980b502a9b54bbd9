"""Attention through a dense mask, exactly as the formula: every fast path is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_convert.kernels.common.checks import accumulate_dtype
from nsa_convert.patterns import Pattern, SequenceLayout


def masked_softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend under a mask.

    Args:
        q: ``[B, TQ, HQ, D]``.
        k: ``[B, TK, H, D]``.
        v: ``[B, TK, H, DV]``.
        mask: bool, broadcasts to ``[B, HQ, TQ, TK]``.
        scale: Factor on the scores.

    Returns:
        ``(o [B, TQ, HQ, DV], lse [B, TQ, HQ], p [B, HQ, TQ, TK])``; a query without keys gets o = 0,
        lse = -inf, p = 0.
    """
    dtype = accumulate_dtype(q.dtype)
    group = q.shape[2] // k.shape[2]
    keys, values = (x.to(dtype).repeat_interleave(group, 2) for x in (k, v))

    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(dtype), keys) * scale
    scores = scores.masked_fill(~mask, -torch.inf)

    # Where a query sees nothing, 0 in place of -inf makes its probabilities exp(-inf) = 0, not NaN.
    lse = scores.logsumexp(-1)
    p = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    o = torch.einsum("bhqk,bkhd->bqhd", p, values)
    return o.to(q.dtype), lse.transpose(1, 2), p


def attend_dense(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, scale: float) -> Tensor:
    """See :func:`nsa_convert.kernels.attention.dense_attention`."""
    mask = layout.visible(q.shape[1], k.shape[1], q.device)[:, None]
    return masked_softmax_attention(q, k, v, mask, scale)[0]


def attend_pattern(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, layout: SequenceLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """See :func:`nsa_convert.kernels.attention.sparse_attention`."""
    mask = pattern.to_dense_mask(q.shape[1], k.shape[1], q.shape[2], layout, device=q.device)
    o, lse, _ = masked_softmax_attention(q, k, v, mask, scale)
    return o, lse
