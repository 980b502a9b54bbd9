"""Attention to listed blocks that skips values of negligible weight (arXiv 2502.18137, second stage).

A flash kernel walks a tile of queries through its blocks and keeps the running maximum of the scores. Where
the largest new score of every row lies far below that maximum, the probabilities are tiny, and their product
with the values is skipped. The denominator of the softmax still counts them, so their share of the output is
lost, not redistributed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_convert.kernels.attention.reference import masked_softmax_attention
from nsa_convert.kernels.common.backend import choose_backend, kernel_function
from nsa_convert.kernels.common.checks import accumulate_dtype, check_qkv, default_scale
from nsa_convert.patterns import DENSE_LAYOUT, BlockSelection, SequenceLayout

RUN = 64
"""Keys that are left out together, at most: a block, or a part of a large one."""

LEAST_ROWS = 16


def skipping_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockSelection, *, value_skip: float,
    layout: SequenceLayout = DENSE_LAYOUT, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend as :func:`nsa_convert.kernels.sparse_attention`, but skip values of negligible weight.

    A tile is a run of :func:`tile_rows` queries of one list and one query head. It takes its blocks in
    ascending order, larger ones in parts of 64 keys. With m the maximum of a row's scores over the keys
    before such a run of keys and s that over the run itself, the values of the run are left out when
    ``s - max(m, s) < value_skip`` in every row of the tile. lse counts all keys. No gradient.

    The queries of a tile decide together: what a query gets may depend on later ones, and a value that is not
    finite may reach all of them. Backends compute scores with different rounding, so that they may disagree
    about a run of keys that lies exactly at the limit.

    Args:
        q: ``[B, TQ, HQ, D]``.
        k: ``[B, TK, H, D]``.
        v: ``[B, TK, H, D]``.
        pattern: Lists of blocks; its ``query_block`` is a multiple of 16.
        value_skip: Natural log of the largest probability, over that of the best key so far, that is left
            out; negative, ``-inf`` leaves nothing out.
        layout: Position of the queries; neither padding nor packing.
        scale: Factor on the scores; D ** -0.5 by default.

    Returns:
        ``(o [B, TQ, HQ, D], lse [B, TQ, HQ])`` as of ``sparse_attention``.

    Raises:
        ValueError: Shapes, dtypes or devices do not agree, ``value_skip`` is not negative, the lists are of
            fewer queries than a tile, or the batch is padded or packed.
    """
    check_qkv(q, k, v)
    if not value_skip < 0:
        raise ValueError(f"value_skip must be negative, got {value_skip}")

    if layout.start is not None or layout.cu_seqlens is not None:
        raise ValueError("values are left out in plain sequences only: take padding and packing apart first")

    rows = tile_rows(pattern.query_block)
    scale = default_scale(q, scale)

    backend = choose_backend(q, v.shape[-1])
    if backend == "triton":
        run = kernel_function("union.triton_skipping", "attend_kept_blocks")
        return run(q, k, v, pattern, layout, scale, value_skip, rows)
    return (_reference if backend == "reference" else _gathered)(
        q, k, v, pattern, layout, scale, value_skip, rows
    )


def tile_rows(query_block: int) -> int:
    """Return the queries of a tile: the largest power of two up to 64 that divides ``query_block``.

    Raises:
        ValueError: It is less than 16.
    """
    rows = next(n for n in (64, 32, 16, 1) if query_block % n == 0)
    if rows < LEAST_ROWS:
        raise ValueError(f"lists of {query_block} queries: values are left out for a multiple of 16 queries")
    return rows


def kept_runs(largest: Tensor, value_skip: float) -> Tensor:
    """Return which values of a tile are kept, ``[..., 1, R]``.

    Args:
        largest: ``[..., rows, R]`` largest score of each row in each run of keys, -inf where it sees none.
        value_skip: See :func:`skipping_attention`.
    """
    below = largest - largest.cummax(-1).values
    below = below.masked_fill(largest == -torch.inf, -torch.inf)
    return below.amax(-2, keepdim=True) >= value_skip


def _reference(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockSelection, layout: SequenceLayout, scale: float,
    value_skip: float, rows: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend with all scores in one tensor."""
    num_queries = q.shape[1]
    num_keys = k.shape[1]
    group = q.shape[2] // k.shape[2]
    mask = pattern.to_dense_mask(num_queries, num_keys, q.shape[2], layout, device=q.device)
    _, lse, p = masked_softmax_attention(q, k, v, mask, scale)

    scores = p.log() + lse.transpose(1, 2)[..., None]  # up to rounding; -inf where masked
    token = torch.arange(num_keys, device=q.device)

    # Number of the run of keys that each token belongs to
    parts = -(-pattern.block_size // RUN)
    run_of = token // pattern.block_size * parts + token % pattern.block_size // RUN

    # Largest score of each row in each run
    largest = scores.new_full((*scores.shape[:3], int(run_of[-1]) + 1), -torch.inf)
    largest.scatter_reduce_(3, run_of.expand_as(scores), scores.nan_to_num(nan=-torch.inf), "amax")

    # The rows of a tile decide together which runs they keep.
    tiles = torch.nn.functional.pad(largest, (0, 0, 0, -num_queries % rows), value=-torch.inf)
    kept = kept_runs(tiles.unflatten(2, (-1, rows)), value_skip).expand(-1, -1, -1, rows, -1)
    kept = kept.flatten(2, 3)[:, :, :num_queries, run_of]

    values = v.to(p.dtype).repeat_interleave(group, 2)
    return torch.einsum("bhqk,bkhd->bqhd", p * kept, values).to(q.dtype), lse


def _gathered(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockSelection, layout: SequenceLayout, scale: float,
    value_skip: float, rows: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend tile by tile to the gathered blocks of its list."""
    batch, num_queries, num_heads, _ = q.shape
    dtype = accumulate_dtype(q.dtype)
    group = num_heads // k.shape[2]
    indices = pattern.block_indices.repeat_interleave(num_heads // pattern.block_indices.shape[1], 1)

    o = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=dtype)

    inside, width = _inside(pattern.block_size, q.device)
    row = torch.arange(batch, device=q.device)[:, None, None]
    head = torch.arange(num_heads, device=q.device)[:, None] // group

    for first in range(0, num_queries, rows):
        part = slice(first, min(first + rows, num_queries))

        position = torch.arange(part.start, part.stop, device=q.device)[:, None] + layout.offset
        last = int(position[-1]) // pattern.block_size
        blocks = indices[:, :, first // pattern.query_block].long()  # [B, HQ, S]
        blocks = blocks.masked_fill((blocks < 0) | (blocks > last), last + 1).sort(-1).values

        # Slots of the gathered keys; whole runs of a block that is no multiple of a run hold spare ones.
        slots = (blocks[..., None] * pattern.block_size + inside).flatten(2)  # [B, HQ, L]
        real = (inside < pattern.block_size).expand(*blocks.shape, -1).flatten(2) & (slots < k.shape[1])
        real &= (blocks <= last).repeat_interleave(len(inside), -1)

        where = row, slots.clamp(max=k.shape[1] - 1), head
        keys, values = k[where].to(dtype), v[where].to(dtype)  # [B, HQ, L, D]

        scores = q[:, part].to(dtype).transpose(1, 2) @ keys.transpose(2, 3) * scale
        visible = real[:, :, None] & (slots[:, :, None] <= position)
        scores = scores.masked_fill(~visible, -torch.inf)

        kept = kept_runs(scores.unflatten(-1, (-1, width)).amax(-1), value_skip)

        tile_lse = scores.logsumexp(-1)
        p = torch.exp(scores - tile_lse.masked_fill(tile_lse == -torch.inf, 0.0)[..., None])
        p = p * kept.repeat_interleave(width, -1)

        values = values.masked_fill(~visible.any(2)[..., None], 0.0)
        o[:, part] = (p @ values).transpose(1, 2).to(q.dtype)
        lse[:, part] = tile_lse.transpose(1, 2)
    return o, lse


def _inside(block_size: int, device: torch.device) -> tuple[Tensor, int]:
    """Return the offsets of a block's keys, padded to whole runs of keys, and the length of a run."""
    width = min(RUN, block_size)
    return torch.arange(-(-block_size // width) * width, device=device), width
