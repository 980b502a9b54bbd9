"""Index scores in chunks of queries, and the best tokens or blocks of each query, with exact ties."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from nsa_convert.kernels.common.checks import accumulate_dtype
from nsa_convert.kernels.common.products import score_product
from nsa_convert.kernels.common.segments import DECODE_QUERIES, segments
from nsa_convert.patterns import BlockTopK, SequenceLayout

CHUNK_BYTES = 1 << 26
"""Scores held at once."""
_LOW = 0xFFFFFFFF
_HIDDEN = -2139095041  # _ordered(-inf)


def choose(
    lists: Callable[..., Tensor], rows: tuple[Tensor, ...], k: Tensor, layout: SequenceLayout
) -> Tensor:
    """Call ``lists`` on chunks of queries, each with the keys of its own document.

    Args:
        lists: ``(*rows, k, ages, size)`` of a chunk -> ``[B, heads, W, S]``; ``ages [B or 1, W]`` counts the
            keys a query sees, ``size`` bounds them.
        rows: Tensors ``[B, TQ, ...]``, queries first.
        k: ``[B, TK, HK, D]``.
        layout: Position of the queries, padding and packing.

    Returns:
        ``[B, heads, TQ, S]`` int32, padded with -1.
    """
    with torch.no_grad():
        if layout.cu_seqlens is not None:
            parts = [
                choose(
                    lists,
                    tuple(x[:, slice(*part.queries)] for x in rows),
                    k[:, slice(*part.keys)],
                    SequenceLayout(offset=part.offset),
                )
                for part in segments(layout, 1, rows[0].shape[1], k.shape[1])
            ]
            return _join(parts)

        if layout.start is not None:  # slot 0 becomes the first real token of every row
            slots = layout.start[:, None] + torch.arange(k.shape[1], device=k.device)
            batch = torch.arange(k.shape[0], device=k.device)[:, None]
            k = k[batch, slots.clamp(max=k.shape[1] - 1)]

        num_queries = rows[0].shape[1]
        ages = layout.ages(num_queries, k.device)

        # With an offset in a tensor all queries form one chunk: its value may not be read.
        fixed = not isinstance(layout.offset, Tensor)
        width = num_queries if not fixed else _chunk(rows[0], k)

        parts = []
        for begin in range(0, num_queries, width):
            end = min(begin + width, num_queries)
            seen = min(k.shape[1], layout.offset + end) if fixed else k.shape[1]

            chunk = tuple(x[:, begin:end] for x in rows)
            parts.append(lists(*chunk, k[:, :seen], ages[:, begin:end], seen).int())
        return _join(parts)


def best_tokens(
    q: Tensor, k: Tensor, weights: Tensor, ages: Tensor, size: int, forced: tuple[int, int], scale: float
) -> Tensor:
    """Return the tokens with the largest ``sum_j w_j relu(scale q_j k)``, ``[B, 1, W, size]``."""
    s = _products(q, k, scale).relu_()  # [B, HI, W, N]
    score = torch.einsum("bhwn,bwh->bwn", s, weights.to(s.dtype))

    # Forced tokens score +inf, later ones -inf.
    token = torch.arange(score.shape[-1], device=score.device)
    own = ages[..., None] - 1  # [B or 1, W, 1]
    score = score.masked_fill((token < forced[0]) | (token > own - forced[1]), torch.inf)
    return _best(score.masked_fill_(token > own, -torch.inf), size)[:, None]


def blocks_of_best_tokens(
    q: Tensor, k: Tensor, ages: Tensor, rule: BlockTopK, num_blocks: int, scale: float
) -> Tensor:
    """Return the blocks whose best visible token has the largest product, ``[B, HI, W, S]``."""
    s = _products(q, k, scale)
    own = ages[:, None, :, None] - 1  # [B or 1, 1, W, 1]
    s = s.masked_fill_(torch.arange(s.shape[-1], device=s.device) > own, -torch.inf)

    # The best token of each block
    s = pad(s, (0, num_blocks * rule.block_size - s.shape[-1]), value=-torch.inf)
    score = s.unflatten(-1, (num_blocks, rule.block_size)).amax(-1)

    # Forced blocks score +inf, later ones -inf.
    block, last = torch.arange(num_blocks, device=s.device), own.div(rule.block_size, rounding_mode="floor")
    forced = (block < rule.num_sink_blocks) | (block > last - rule.num_local_blocks)
    score = score.masked_fill_(forced, torch.inf).masked_fill_(block > last, -torch.inf)
    return _best(score, min(rule.num_blocks, num_blocks))


def _products(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return ``scale q k`` ``[B, HI, W, N]`` in float32 or float64."""
    dtype = accumulate_dtype(q.dtype)

    if q.shape[1] <= DECODE_QUERIES:
        rows = q.unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4)  # [B, HK, g, W, D]
        s = score_product(rows.flatten(2, 3), k.transpose(1, 2), scale)
        return s.unflatten(2, rows.shape[2:4]).flatten(1, 2)

    rows = q.to(dtype).mul(scale).unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4)  # [B, HK, g, W, D]
    s = torch.matmul(rows.flatten(2, 3), k.to(dtype).permute(0, 2, 3, 1))
    return s.unflatten(2, rows.shape[2:4]).flatten(1, 2)


def _best(score: Tensor, size: int) -> Tensor:
    """Return the ``size`` largest of the last dim, ascending by index, -1 for -inf; ties go to the lower."""
    count = score.shape[-1]
    if score.dtype == torch.float32:
        # Bits of a float as an integer of the same order; the index below them settles ties.
        bits = score.view(torch.int32)
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        index = _LOW - torch.arange(count, device=score.device)
        key = ordered.long().bitwise_left_shift(32).bitwise_or(index)
        kept = key.topk(size, -1, sorted=False).values
        kept = torch.where(kept >> 32 == _HIDDEN, count, _LOW - kept.bitwise_and(_LOW))
    else:
        order = score.sort(dim=-1, descending=True, stable=True)
        kept = order.indices[..., :size].masked_fill(order.values[..., :size] == -torch.inf, count)

    kept = kept.sort(-1).values
    return kept.masked_fill_(kept == count, -1)


def _chunk(q: Tensor, k: Tensor) -> int:
    row_bytes = q.shape[0] * k.shape[1] * (4 * q.shape[2] + 24)
    return min(1024, max(16, CHUNK_BYTES // max(row_bytes, 1)))


def _join(parts: list[Tensor]) -> Tensor:
    size = max(part.shape[-1] for part in parts)
    return torch.cat([pad(part, (0, size - part.shape[-1]), value=-1) for part in parts], 2)
