"""The choice of blocks from compressed keys: cell lse, block scores, and the best blocks of each query."""

from __future__ import annotations

import dataclasses

import torch
import triton
from torch import Tensor

from nsa_convert.kernels.common.custom_ops import new_name
from nsa_convert.kernels.common.segments import DECODE_QUERIES
from nsa_convert.kernels.common.toolchain import padded_dim, rows_contiguous, strides, upcast
from nsa_convert.kernels.compressed.cells import CellGrid
from nsa_convert.kernels.compressed.triton_decode import decode_score
from nsa_convert.kernels.compressed.triton_scores import block_score, cell_lse
from nsa_convert.kernels.compressed.triton_topk import best_blocks
from nsa_convert.kernels.gather.triton_backend import attend_runs
from nsa_convert.kernels.interval.triton_backend import Intervals, key_row, new_lse
from nsa_convert.patterns import BlockTopK, SequenceLayout

SCORE_BYTES = 24 << 20
"""Scores that exist at once; they stay in the second-level cache of a large GPU."""

PIECE = 2048
"""Blocks of one query that are held in registers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellLayout:
    """What each query sees of the compressed cells.

    Attributes:
        cells: Which cells it sees, as :func:`interval_attention` takes them.
        age: ``[B or 1, TQ]`` int64, keys of its document up to the query, itself included; 0 in the
            padding.
        longest: Upper bound of ``age`` that is known without reading the device.
    """

    cells: Intervals
    age: Tensor
    longest: int


def cell_layout(
    layout: SequenceLayout, grid: CellGrid, num_queries: int, num_cells: int, device: torch.device
) -> CellLayout:
    """Return the :class:`CellLayout` of TQ queries over ``num_cells`` cells."""
    age = layout.ages(num_queries, device)

    if layout.cu_seqlens is not None:
        lo = grid.first_cells(layout)[layout.document_of(num_queries, device)][None]
        longest = layout.longest(num_queries)
    else:
        lo = torch.zeros_like(age)
        if isinstance(layout.offset, Tensor):
            longest = num_cells * grid.stride + grid.width - 1  # what these cells can cover
        else:
            longest = layout.offset + num_queries

    hi = (lo + grid.complete(age)).clamp(max=num_cells)
    lo, hi = (x.to(torch.int32).contiguous() for x in (lo, hi))
    return CellLayout(cells=Intervals(lo=lo, hi=hi), age=age, longest=max(1, longest))


def choose_blocks_on_device(
    q: Tensor, ck: Tensor, lse: Tensor | None, at: CellLayout, grid: CellGrid, rule: BlockTopK, scale: float,
    growing: bool,
) -> Tensor:  # fmt: skip
    """Return the best blocks of each query.

    Args:
        q: ``[B, TQ, HQ, D]``.
        ck: ``[B, C, H, D]``.
        lse: ``[B, TQ, HQ]`` float32 to normalise with; over the cells each query sees when it is None.
        at: What each query sees.
        grid: Cell sizes.
        rule: How to choose.
        scale: Factor on the scores.
        growing: Whether query i sees at most ``at.longest - TQ + i + 1`` keys.

    Returns:
        ``[B, H, TQ, S]`` int32, ascending, -1 at the end, with S = min(num_blocks, blocks of ``at.longest``).
    """
    num_blocks = -(-at.longest // rule.block_size)
    own = (at.age - 1).div(rule.block_size, rounding_mode="floor").to(torch.int32).contiguous()

    size = min(rule.num_blocks, num_blocks)

    # Every block fits: the lists follow from the positions alone.
    if size == num_blocks:
        block = torch.arange(num_blocks, dtype=torch.int32, device=q.device)
        lists = block.where(block <= own[..., None], -1)  # [B or 1, TQ, S]
        return lists[:, None].expand(q.shape[0], ck.shape[2], -1, -1)

    q = q.detach()
    ck = ck.detach()
    if lse is None and q.shape[1] <= DECODE_QUERIES:
        lse = attend_runs(q, ck, None, at.cells, ck.shape[1], scale)[1]
    elif lse is None:
        lse = _cell_lse(q, ck, at.cells.lo, at.cells.hi, scale)

    return _choose_blocks(
        q, ck, lse.detach(), at.cells.lo, at.cells.hi, own, grid.width // grid.stride,
        rule.block_size // grid.stride, rule.block_size, num_blocks, size, rule.num_sink_blocks,
        rule.num_local_blocks, rule.reduce == "max", at.longest if growing else 0, scale,
    )  # fmt: skip


@torch.library.custom_op(new_name("cell_lse"), mutates_args=())
def _cell_lse(q: Tensor, ck: Tensor, lo: Tensor, hi: Tensor, scale: float) -> Tensor:
    q, ck = rows_contiguous(q, ck)
    batch, num_queries, num_heads, dim = q.shape

    lse = new_lse(q)

    cell_lse.launch(
        lambda c: (triton.cdiv(num_queries, c["BM"]), batch * num_heads),
        q,
        key_row(q),
        **strides(q=q, k=ck, l=lse),
        q=q,
        ck=ck,
        lse=lse,
        lo=lo,
        hi=hi,
        s_ib=lo.stride(0) if lo.shape[0] > 1 else 0,
        scale=scale,
        TQ=num_queries,
        HQ=num_heads,
        G=num_heads // ck.shape[2],
        D=dim,
        BD=padded_dim(dim),
        UPCAST=upcast(q.dtype),
    )
    return lse


@_cell_lse.register_fake
def _(q, ck, lo, hi, scale):
    return new_lse(q)


@torch.library.custom_op(new_name("choose_blocks"), mutates_args=())
def _choose_blocks(
    q: Tensor, ck: Tensor, lse: Tensor, lo: Tensor, hi: Tensor, own: Tensor, overlap: int, steps: int,
    block_size: int, num_blocks: int, size: int, num_sinks: int, num_locals: int, maximum: bool,
    longest: int, scale: float,
) -> Tensor:  # fmt: skip
    q, ck = rows_contiguous(q, ck)
    batch = q.shape[0]
    num_queries = q.shape[1]
    num_kv_heads = ck.shape[2]

    indices = torch.empty(batch, num_kv_heads, num_queries, size, dtype=torch.int32, device=q.device)

    # Score as many queries at a time as fit SCORE_BYTES.
    rows = min(num_queries, max(16, SCORE_BYTES // (4 * batch * num_kv_heads * num_blocks) // 16 * 16))
    room = torch.empty(batch * num_kv_heads * rows * num_blocks, dtype=torch.float32, device=q.device)

    for begin in range(0, num_queries, max(rows, 1)):
        end = min(begin + rows, num_queries)
        width = num_blocks if not longest else -(-(longest - num_queries + end) // block_size)

        score = room[: batch * num_kv_heads * (end - begin) * width]
        score = score.view(batch, num_kv_heads, end - begin, width)

        _score(q, ck, lse, score, lo, hi, own, begin, end, overlap, steps, maximum, scale)
        launch_topk(score, own, indices, begin, end, num_sinks, num_locals)
    return indices


def _score(
    q: Tensor, ck: Tensor, lse: Tensor, score: Tensor, lo: Tensor, hi: Tensor, own: Tensor, begin: int,
    end: int, overlap: int, steps: int, maximum: bool, scale: float,
) -> None:  # fmt: skip
    """Write the scores ``[B, H, end - begin, NB]`` of the queries ``begin .. end - 1``."""
    num_heads = q.shape[2]
    num_kv_heads = ck.shape[2]
    dim = q.shape[3]
    group = num_heads // num_kv_heads
    programs = q.shape[0] * num_kv_heads

    shared = {
        **strides(q=q, k=ck, l=lse, s=score.transpose(1, 2)),
        "q": q,
        "ck": ck,
        "lse": lse,
        "score": score,
        "lo": lo,
        "hi": hi,
        "own": own,
        "s_ib": lo.stride(0) if lo.shape[0] > 1 else 0,
        "s_jb": own.stride(0) if own.shape[0] > 1 else 0,
        "scale": scale,
        "HQ": num_heads,
        "parts": steps + overlap - 1,
        "steps": steps,
        "overlap": overlap,
        "D": dim,
        "BD": padded_dim(dim),
        "MAXIMUM": maximum,
        "UPCAST": upcast(q.dtype),
    }

    if q.shape[1] <= DECODE_QUERIES:
        decode_score.launch(
            lambda c: (q.shape[1], triton.cdiv(score.shape[3], c["BB"]), programs),
            q,
            key_row(q),
            **shared,
            GROUP=group,
            GN=max(8, triton.next_power_of_2(group)),
        )
        return

    block_score.launch(
        lambda c: (triton.cdiv(end - begin, c["BM"]), triton.cdiv(score.shape[3], c["BB"]), programs),
        q,
        key_row(q),
        **shared,
        begin=begin,
        end=end,
        G=group,
        C=ck.shape[1],
    )


@_choose_blocks.register_fake
def _(q, ck, lse, lo, hi, own, overlap, steps, block_size, num_blocks, size, num_sinks, num_locals, maximum,
      longest, scale):  # fmt: skip
    return torch.empty(q.shape[0], ck.shape[2], q.shape[1], size, dtype=torch.int32, device=q.device)


def launch_topk(
    score: Tensor, own: Tensor, indices: Tensor, begin: int, end: int, num_sinks: int, num_locals: int
) -> None:
    """Write the best blocks of the queries ``begin .. end - 1``.

    Args:
        score: ``[B, H, end - begin, NB]`` float32, not negative; read up to the own block of a query.
        own: ``[B or 1, TQ]`` int32, block of each query; negative when it sees nothing.
        indices: ``[B, H, TQ, S]`` int32, written.
        begin: First query.
        end: One after the last query.
        num_sinks: First blocks that are always chosen.
        num_locals: Last blocks that are always chosen.
    """
    batch, num_kv_heads, rows, num_blocks = score.shape

    piece = min(PIECE, max(16, triton.next_power_of_2(num_blocks)))

    best_blocks.launch(
        lambda c: (triton.cdiv(rows, c["BQ"]), batch * num_kv_heads),
        score,
        max(1, piece // 8),
        **strides(s=score.transpose(1, 2), o=indices.transpose(1, 2)),
        score=score,
        own=own,
        indices=indices,
        s_jb=own.stride(0) if own.shape[0] > 1 else 0,
        begin=begin,
        end=end,
        H=num_kv_heads,
        size=indices.shape[3],
        num_blocks=num_blocks,
        num_sinks=num_sinks,
        num_locals=num_locals,
        BN=piece,
        BS=triton.next_power_of_2(indices.shape[3]),
        ONE_PIECE=piece >= num_blocks,
    )
