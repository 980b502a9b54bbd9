"""Attention that each key has received: column sums of the probabilities, without a T x T tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsa_convert.kernels.attention import dense_attention
from nsa_convert.kernels.common.backend import choose_backend
from nsa_convert.kernels.common.segments import is_decode, segments
from nsa_convert.patterns import SequenceLayout

SCORES = 1 << 22
"""Scores computed at once."""

MOST_ROWS = 128
"""Queries of one head whose scores are computed at once; larger tiles are not faster."""


def attend_and_sum(
    q: Tensor, k: Tensor, v: Tensor, *, layout: SequenceLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend densely, and add up the probabilities each key received.

    On the torch backend a prompt computes its scores once for both. Kernels keep no probabilities, and a
    gradient needs an op that has one: then :func:`column_sums` computes the scores again.

    Args:
        q: ``[B, TQ, HQ, D]``.
        k: ``[B, TK, H, D]``.
        v: ``[B, TK, H, D]``.
        layout: Position of the queries, padding and packing; the offset is an int.
        scale: Factor on the scores.

    Returns:
        ``(o [B, TQ, HQ, D], sums [B, TK, HQ])``; the sums without gradient, at least float32.
    """
    tracked = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if tracked or is_decode(layout, q, k, v) or choose_backend(q, v.shape[-1]) != "torch":
        o = dense_attention(q, k, v, layout=layout, scale=scale)
        return o, column_sums(q, k, layout=layout, scale=scale)

    # Head by head, so that the scores of one head are all that is held.
    group = q.shape[2] // k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    o = torch.zeros_like(q)
    sums = q.new_zeros(q.shape[0], q.shape[2], k.shape[1], dtype=wide)
    for part in segments(layout, q.shape[0], q.shape[1], k.shape[1]):
        own = slice(*part.queries)
        seen = slice(*part.keys)
        for head in range(q.shape[2]):
            keys, values = (x[part.row, seen, head // group].to(wide) for x in (k, v))
            queries = q[part.row, own, head].to(wide) * scale
            out, received = _attend_head(queries, keys, values, part.offset)
            o[part.row, own, head] = out
            sums[part.row, head, seen] = received

    return o, sums.transpose(1, 2)


def _attend_head(q: Tensor, k: Tensor, v: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """Attend causally with ``q [T, D]`` at positions ``offset ..`` to ``k, v [L, D]``; ``(o, sums [L])``.

    The buffers are kept from tile to tile: fresh memory of this size costs as much as a pass over it.
    """
    rows = max(1, min(MOST_ROWS, SCORES // len(k)))
    out = q.new_empty(len(q), v.shape[1])
    sums = k.new_zeros(len(k))
    scores, shares = q.new_empty(2, rows * len(k))

    for begin in range(0, len(q), rows):
        # A tile of queries and all keys up to its last one.
        count = min(rows, len(q) - begin)
        length = offset + begin + count
        s, p = (x[: count * length].view(count, length) for x in (scores, shares))

        # Scores; among the tile's own keys, those behind a query are in its future.
        torch.mm(q[begin : begin + count], k[:length].T, out=s)
        future = torch.ones(count, count, dtype=torch.bool, device=q.device).triu_(1)
        s[:, length - count :].masked_fill_(future, -torch.inf)

        # Probabilities, their sums over the queries, and the output.
        torch.softmax(s, -1, out=p)
        sums[:length] += p.sum(0)
        torch.mm(p, v[:length], out=out[begin : begin + count])

    return out, sums


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
    batch, num_queries, heads, _ = q.shape
    bounded = window is not None or layout.start is not None or layout.cu_seqlens is not None
    kv_heads = k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    sums = q.new_zeros(batch, k.shape[1], heads, dtype=wide)
    starts = layout.row_starts(num_queries, q.device)  # [B or 1, TQ]
    offset: Any = layout.offset

    # Some queries at a time.
    width = max(1, SCORES // (batch * heads * k.shape[1]))
    for begin in range(0, num_queries, width):
        # Their scores, with the keys from the start of the first one's window to the last query.
        end = min(begin + width, num_queries)
        last = offset + end
        first = 0 if window is None else max(0, offset + begin - window + 1)
        own = (q[:, begin:end].to(wide) * scale).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
        keys = k[:, first:last].to(wide).permute(0, 2, 3, 1)  # [B, H, D, L]
        scores = (own.flatten(2, 3) @ keys).unflatten(2, (-1, end - begin))  # [B, H, G, n, L]

        # Mask what a query does not see.
        queries = torch.arange(begin, end, device=q.device)[:, None] + offset
        # Only the last keys can lie in a query's future; the others are masked where rows or windows begin.
        cut = 0 if bounded else last - first - (end - begin)
        slots = torch.arange(first + cut, last, device=q.device)
        visible = (slots <= queries) & (slots >= starts[:, begin:end, None])  # [B or 1, n, L]
        if window is not None:
            visible = visible & (slots > queries - window)
        scores[..., cut:].masked_fill_(~visible[:, None, None], -torch.inf)

        # Probabilities: over the visible keys, or by the given normaliser.
        if lse is None:
            p = scores.softmax(-1)
            p = p.nan_to_num_(0.0) if bounded else p  # a query in padding sees nothing
        else:
            norm = lse[:, begin:end].to(wide).transpose(1, 2).unflatten(1, (kv_heads, -1))[..., None]
            p = scores.sub_(norm.masked_fill(norm == -torch.inf, 0.0)).exp_()

        sums[:, first:last] += p.sum(3).flatten(1, 2).transpose(1, 2)

    return sums
