"""Forward of attention to selected blocks: a tile of queries walks the union of its blocks once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_convert.kernels.common.toolchain import Config, all_finite, declare
from nsa_convert.kernels.union.triton_plan import Plan
from nsa_convert.kernels.union.triton_steps import (
    CASES,
    CLEANING,
    GEOMETRY,
    LARGE,
    SMALL,
    add_step,
    load_heads,
    load_keys,
    load_tile,
    load_tile_rows,
    row_bytes,
    seen_by,
    step_keys,
    tile_arguments,
    two_halves,
    union_arguments,
)


@triton.jit
def walk_output(
    b_m, b_l, b_o, q, k, v, begin, end, blocks, members, first, count, slot, start, from_w, i_p, TK, scale,
    s_qt, s_qh, s_kt, s_vt,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, R: tl.constexpr, W: tl.constexpr, BS: tl.constexpr,
    BN: tl.constexpr, PARTS: tl.constexpr, JOIN: tl.constexpr, HALVES: tl.constexpr, UPCAST: tl.constexpr,
    CLEAN: tl.constexpr,
):  # fmt: skip
    """Add the blocks ``begin .. end - 1`` to the running softmax of BM rows."""
    o_q, o_hq, m_m, o_w = load_tile_rows(first, count, i_p, from_w, BM, R, W, HALVES)
    b_q = load_heads(q, o_q, o_hq, m_m, s_qt, s_qh, D, DP)  # [BM, DP]

    for j in range(begin * PARTS, end * PARTS, JOIN):
        o_k, m_k, bits = step_keys(j, end, blocks, members, start, TK, BS, BN, PARTS, JOIN)

        b_k = load_keys(k, o_k, m_k, s_kt, D, DP)
        b_v = load_keys(v, o_k, m_k, s_vt, D, DP)

        visible = seen_by(bits, o_k, m_k, o_w, slot, JOIN)
        b_m, b_l, b_o = add_step(b_q, b_m, b_l, b_o, b_k, b_v, visible, scale, UPCAST, CLEAN)
    return b_m, b_l, b_o


@triton.jit
def store_output(
    b_m, b_l, b_o, o, lse, first_row, first, count, from_w, i_p, HQ,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    HALVES: tl.constexpr,
):  # fmt: skip
    """Store o and lse of BM rows."""
    o_q, o_hq, m_m, _ = load_tile_rows(first, count, i_p, from_w, BM, R, W, HALVES)
    blind = b_l == 0.0
    b_l = tl.where(blind, 1.0, b_l)

    o_d = tl.arange(0, DP)
    row = (first_row + o_q) * HQ + o_hq
    p_o = o + row[:, None] * D + o_d[None, :]
    tl.store(p_o, (b_o / b_l[:, None]).to(o.dtype.element_ty), mask=m_m[:, None] & (o_d < D)[None, :])

    LN2: tl.constexpr = 0.6931471805599453
    tl.store(lse + row, tl.where(blind, float("-inf"), (b_m + tl.log2(b_l)) * LN2), mask=m_m)


@triton.jit
def attend_tile(
    q, k, v, o, lse, begin, own, own2, end, blocks, members, first, count, slot, start, i_p, first_row, TK,
    HQ, scale, s_qt, s_qh, s_kt, s_vt,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, R: tl.constexpr, W: tl.constexpr, BS: tl.constexpr,
    BN: tl.constexpr, PARTS: tl.constexpr, JOIN: tl.constexpr, HALVES: tl.constexpr, UPCAST: tl.constexpr,
    CLEAN: tl.constexpr,
):  # fmt: skip
    """Attend with a tile, store the result and return whether it is finite."""
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, DP], tl.float32)

    # The blocks that both halves of the tile's queries list, or any of its queries
    b_m, b_l, b_o = walk_output(
        b_m, b_l, b_o, q, k, v, begin, own, blocks, members, first, count, slot, start, 0, i_p, TK, scale,
        s_qt, s_qh, s_kt, s_vt, D, DP, BM, R, W, BS, BN, PARTS, JOIN, HALVES, UPCAST, CLEAN,
    )  # fmt: skip

    if HALVES == 1:
        good = all_finite(b_o)
        store_output(b_m, b_l, b_o, o, lse, first_row, first, count, 0, i_p, HQ, D, DP, BM, R, W, 1)
    else:
        b_m, b_m2 = two_halves(b_m)
        b_l, b_l2 = two_halves(b_l)
        b_o, b_o2 = two_halves(b_o)

        # The blocks that only the first half lists, then those of the second
        b_m, b_l, b_o = walk_output(
            b_m, b_l, b_o, q, k, v, own, own2, blocks, members, first, count, slot, start, 0, i_p, TK, scale,
            s_qt, s_qh, s_kt, s_vt, D, DP, BM // 2, R, W // 2, BS, BN, PARTS, JOIN, 1, UPCAST, CLEAN,
        )  # fmt: skip
        b_m2, b_l2, b_o2 = walk_output(
            b_m2, b_l2, b_o2, q, k, v, own2, end, blocks, members, first, count, slot, start, W // 2, i_p, TK,
            scale, s_qt, s_qh, s_kt, s_vt, D, DP, BM // 2, R, W // 2, BS, BN, PARTS, JOIN, 1, UPCAST, CLEAN,
        )  # fmt: skip

        good = all_finite(b_o) & all_finite(b_o2)
        store_output(b_m, b_l, b_o, o, lse, first_row, first, count, 0, i_p, HQ, D, DP, BM // 2, R, W // 2, 1)
        store_output(
            b_m2, b_l2, b_o2, o, lse, first_row, first, count, W // 2, i_p, HQ, D, DP, BM // 2, R, W // 2, 1
        )
    return good


@declare(
    types={**GEOMETRY, "q": "*T", "k": "*T", "v": "*T", "o": "*T", "lse": "*fp32"},
    configs=(
        Config(num_warps=8, num_stages=2, max_row=256, only=LARGE),
        Config(num_warps=8, num_stages=3, max_row=256, only=LARGE),
        Config(num_warps=4, num_stages=2, max_row=256, only=SMALL),
        Config(num_warps=4, num_stages=3, max_row=256, only=SMALL),
        Config(num_warps=8, num_stages=1, min_row=256),
        *CLEANING,
    ),
    key=("DP", "BM", "BN", "R", "HALVES"),
    cases=CASES,
)
def attend_forward(
    q, k, v, o, lse, broken, tiles, bounds, groups, blocks, members, scale, TQ, TK, HQ, HS,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, R: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
    BS: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, JOIN: tl.constexpr, HALVES: tl.constexpr,
    UPCAST: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """Store o and lse of one tile of queries and R heads.

    Programs: (tiles, HQ / R, B); row r of a half is query r // R of it, head r % R. With two halves, all rows
    walk the blocks that both list, then each half those that it alone lists. A second launch with CLEAN walks
    the tiles again whose output is not finite: values that are not finite then reach only the queries that
    see them.
    """
    i_t = tl.program_id(0)
    i_p = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    first, count, slot, start, begin, own, own2, end = load_tile(
        tiles, bounds, groups, i_t, i_p, i_b, tl.num_programs(0), HQ, HS, R, HALVES
    )

    i_h = ((i_p * R) // G).to(tl.int64)
    q += i_b * s_qb
    k += i_b * s_kb + i_h * s_kh
    v += i_b * s_vb + i_h * s_vh

    p_broken = broken + (i_b * tl.num_programs(1) + i_p) * tl.num_programs(0) + i_t

    if not CLEAN:
        good = attend_tile(
            q, k, v, o, lse, begin, own, own2, end, blocks, members, first, count, slot, start, i_p, i_b * TQ,
            TK, HQ, scale, s_qt, s_qh, s_kt, s_vt, D, DP, BM, R, W, BS, BN, PARTS, JOIN, HALVES, UPCAST,
            False,
        )  # fmt: skip
        tl.store(p_broken, 1 - good.to(tl.int32))
    elif tl.load(p_broken) != 0:
        attend_tile(
            q, k, v, o, lse, begin, own, own2, end, blocks, members, first, count, slot, start, i_p, i_b * TQ,
            TK, HQ, scale, s_qt, s_qh, s_kt, s_vt, D, DP, BM, R, W, BS, BN, PARTS, JOIN, HALVES, UPCAST, True,
        )  # fmt: skip


def forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """Return ``(o [B, TQ, HQ, D], lse [B, TQ, HQ] float32)``; every query is in a tile.

    Args:
        q: ``[B, TQ, HQ, D]``, the last dim contiguous, as in k and v.
        k: ``[B, TK, H, D]``.
        v: ``[B, TK, H, D]``.
        plan: Tiles and blocks.
        scale: Factor on the scores.
    """
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    grid = (plan.tiles.shape[1], q.shape[2] // plan.readers, q.shape[0])
    broken = torch.empty(grid, dtype=torch.int32, device=q.device)

    # The second launch walks the tiles again whose output is not finite.
    for clean in (False, True):
        attend_forward.launch(
            grid, q, row_bytes(q), q=q, k=k, v=v, o=o, lse=lse, broken=broken, CLEAN=clean,
            s_vb=v.stride(0), s_vt=v.stride(1), s_vh=v.stride(2),
            **tile_arguments(q, k, plan, scale), **union_arguments(q, plan),
        )  # fmt: skip
    return o, lse
