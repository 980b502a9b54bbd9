"""How much attention each key has received: column sums of the probabilities, never a T x T tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_convert.patterns import SequenceLayout

SCORES = 1 << 24
"""Scores computed at once."""


@torch.no_grad()
def column_sums(
    q: Tensor,
    k: Tensor,
    *,
    layout: SequenceLayout,
    scale: float,
    lse: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Return ``sum_i p_ij`` over the queries of a call, scores computed again, some queries at a time.

    Args:
        q: ``[B, TQ, HQ, D]``.
        k: ``[B, TK, H, D]``.
        layout: Position of the queries, padding and packing; the offset is an int.
        scale: Factor on the scores.
        lse: ``[B, TQ, HQ]`` what the probabilities are normalised with; None takes the visible keys.
        window: Keys a query counts, its own included; None for all before it.

    Returns:
        ``[B, TK, HQ]`` without gradient, at least float32.
    """
    batch, num_queries, heads, dim = q.shape
    kv_heads, wide = k.shape[2], torch.promote_types(q.dtype, torch.float32)
    sums = q.new_zeros(batch, k.shape[1], heads, dtype=wide)
    starts = layout.row_starts(num_queries, q.device)  # [B or 1, TQ]
    width = max(1, SCORES // (batch * heads * k.shape[1]))
    for begin in range(0, num_queries, width):
        end = min(begin + width, num_queries)
        last = layout.offset + end
        first = 0 if window is None else max(0, layout.offset + begin - window + 1)
        own = q[:, begin:end].to(wide).reshape(batch, end - begin, kv_heads, -1, dim).permute(0, 2, 3, 1, 4)
        keys = k[:, first:last].to(wide).permute(0, 2, 3, 1)[:, :, None]  # [B, H, 1, D, L]
        scores = (own @ keys) * scale  # [B, H, G, n, L]
        slots, queries = (torch.arange(*x, device=q.device) for x in ((first, last), (begin, end)))
        queries = queries[:, None] + layout.offset
        visible = (slots <= queries) & (slots >= starts[:, begin:end, None])  # [B or 1, n, L]
        if window is not None:
            visible = visible & (slots > queries - window)
        scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
        if lse is None:
            p = scores.softmax(-1).nan_to_num_(0.0)  # a query in padding sees nothing
        else:
            norm = lse[:, begin:end].to(wide).transpose(1, 2).unflatten(1, (kv_heads, -1))[..., None]
            p = torch.exp(scores - norm.masked_fill(norm == -torch.inf, 0.0))
        sums[:, first:last] += p.sum(3).flatten(1, 2).transpose(1, 2)
    return sums
