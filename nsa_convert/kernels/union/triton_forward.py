"""Forward of attention to selected blocks: a tile of queries walks the union of its blocks once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_convert.kernels.common.toolchain import Config, declare, strides
from nsa_convert.kernels.common.triton_flash import (
    Rows,
    Softmax,
    all_finite,
    attend,
    head_rows,
    load_rows,
    new_softmax,
    softmax_divisor,
    softmax_lse,
    store_rows,
)
from nsa_convert.kernels.union.triton_plan import Plan
from nsa_convert.kernels.union.triton_steps import (
    CASES,
    CLEANING,
    GEOMETRY,
    LARGE,
    SMALL,
    Part,
    Row,
    Sizes,
    flag_pointer,
    load_heads,
    load_tile,
    load_tile_rows,
    load_union,
    row_bytes,
    seen_by,
    step_keys,
    tile_arguments,
    two_halves,
    union_arguments,
)


@triton.jit
def walk_output(
    state, q, k, v, tile, union, begin, end, from_w, scale, P: tl.constexpr, S: tl.constexpr
):  # fmt: skip
    """Add the blocks ``begin .. end - 1`` to the running softmax of the rows of a part."""
    o_q, o_hq, m_m, o_w = load_tile_rows(tile, from_w, S.R, P)
    b_q = load_heads(q, o_q, o_hq, m_m, S.D, S.DP)  # [BM, DP]

    for j in range(begin * S.PARTS, end * S.PARTS, S.JOIN):
        o_k, m_k, bits = step_keys(j, end, union, tile, S)

        b_k = load_rows(k, o_k, m_k, S.D, S.DP, True)
        b_v = load_rows(v, o_k, m_k, S.D, S.DP, True)

        visible = seen_by(bits, o_k, m_k, o_w, tile.slot, S.JOIN)
        state = attend(state, b_q, b_k, b_v, visible, scale, True, S.CLEAN, S.UPCAST)
    return state


@triton.jit
def store_output(state, o, lse, tile, from_w, D: tl.constexpr, R: tl.constexpr, P: tl.constexpr):
    """Store o and lse of the rows of a part."""
    o_q, o_hq, m_m, _ = load_tile_rows(tile, from_w, R, P)
    row = (tile.row + o_q) * tile.HQ + o_hq

    # In this order: with the lse before o, attend_forward needs 45 more registers on sm_80, and spills.
    b_o = state.sums / softmax_divisor(state.total)[:, None]
    store_rows(Rows(o, D), row, m_m, b_o, D, state.sums.shape[1])
    tl.store(lse + row, softmax_lse(state.top, state.total), mask=m_m)


@triton.jit
def attend_tile(q, k, v, o, lse, tile, union, scale, P: tl.constexpr, S: tl.constexpr):
    """Attend with a tile, store the result and return whether it is finite."""
    state = new_softmax(P.BM, S.DP)

    # The blocks that both halves of the tile's queries list, or any of its queries
    state = walk_output(state, q, k, v, tile, union, union.begin, union.own, 0, scale, P, S)

    if P.HALVES == 1:
        good = all_finite(state.sums)
        store_output(state, o, lse, tile, 0, S.D, S.R, P)
    else:
        H: tl.constexpr = Part(P.BM // 2, P.W // 2, 1)
        top, top2 = two_halves(state.top)
        total, total2 = two_halves(state.total)
        sums, sums2 = two_halves(state.sums)
        low = Softmax(top, total, sums)
        high = Softmax(top2, total2, sums2)

        # The blocks that only the first half lists, then those of the second
        low = walk_output(low, q, k, v, tile, union, union.own, union.own2, 0, scale, H, S)
        high = walk_output(high, q, k, v, tile, union, union.own2, union.end, P.W // 2, scale, H, S)

        good = all_finite(low.sums) & all_finite(high.sums)
        store_output(low, o, lse, tile, 0, S.D, S.R, H)
        store_output(high, o, lse, tile, P.W // 2, S.D, S.R, H)
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
    q, k, v, o, lse, broken, tiles, bounds, groups, blocks, members, scale, TQ, TK, HQ, HS, s_q, s_k, s_v,
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
    P: tl.constexpr = Part(BM, W, HALVES)
    S: tl.constexpr = Sizes(D, DP, R, BS, BN, PARTS, JOIN, UPCAST, CLEAN)

    tile = load_tile(tiles, TQ, TK, HQ, R)
    union = load_union(blocks, members, bounds, groups, HQ, HS, R, HALVES)

    i_b = tl.program_id(2).to(tl.int64)
    i_h = (tile.head // G).to(tl.int64)
    q = Row(q + i_b * s_q[0], s_q)
    k = head_rows(k, s_k, i_b, i_h)
    v = head_rows(v, s_v, i_b, i_h)

    p_broken = flag_pointer(broken)
    if not CLEAN:
        good = attend_tile(q, k, v, o, lse, tile, union, scale, P, S)
        tl.store(p_broken, 1 - good.to(tl.int32))
    elif tl.load(p_broken) != 0:
        attend_tile(q, k, v, o, lse, tile, union, scale, P, S)


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
            **strides(v=v), **tile_arguments(q, k, plan, scale), **union_arguments(q, plan),
        )  # fmt: skip
    return o, lse
