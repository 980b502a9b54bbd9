"""Backward of attention to selected blocks, part 1: the gradient of the queries."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_convert.kernels.common.toolchain import Config, declare, strides
from nsa_convert.kernels.common.triton_flash import (
    LN2,
    Rows,
    all_finite,
    grade_queries,
    head_rows,
    load_rows,
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
    Queries,
    Row,
    Sizes,
    flag_pointer,
    load_queries,
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
def walk_gradient(
    b_dq, queries, k, v, tile, union, begin, end, from_w, scale, P: tl.constexpr, S: tl.constexpr
):  # fmt: skip
    """Add what the blocks ``begin .. end - 1`` give to dq of the rows of a part, in the forward's order."""
    o_q, o_hq, m_m, o_w = load_tile_rows(tile, from_w, S.R, P)
    rows = load_queries(queries, (tile.row + o_q) * tile.HQ + o_hq, o_q, o_hq, m_m, S.D, S.DP)

    for j in range(begin * S.PARTS, end * S.PARTS, S.JOIN):
        o_k, m_k, bits = step_keys(j, end, union, tile, S)

        b_k = load_rows(k, o_k, m_k, S.D, S.DP, True)
        b_v = load_rows(v, o_k, m_k, S.D, S.DP, True)

        visible = seen_by(bits, o_k, m_k, o_w, tile.slot, S.JOIN)
        b_dq = grade_queries(b_dq, rows, b_k, b_v, visible, scale, True, S.CLEAN, S.UPCAST)
    return b_dq


@triton.jit
def store_gradient(b_dq, dq, tile, from_w, scale, D: tl.constexpr, R: tl.constexpr, P: tl.constexpr):
    """Store dq of the rows of a part; ``scale`` holds log2(e)."""
    o_q, o_hq, m_m, _ = load_tile_rows(tile, from_w, R, P)
    row = (tile.row + o_q) * tile.HQ + o_hq
    store_rows(Rows(dq, D), row, m_m, b_dq * (scale * LN2), D, b_dq.shape[1])


@triton.jit
def gradient_of_tile(queries, dq, k, v, tile, union, scale, P: tl.constexpr, S: tl.constexpr):
    """Compute and store dq of a tile, and return whether it is finite."""
    b_dq = tl.zeros([P.BM, S.DP], tl.float32)
    b_dq = walk_gradient(b_dq, queries, k, v, tile, union, union.begin, union.own, 0, scale, P, S)

    if P.HALVES == 1:
        good = all_finite(b_dq)
        store_gradient(b_dq, dq, tile, 0, scale, S.D, S.R, P)
    else:
        H: tl.constexpr = Part(P.BM // 2, P.W // 2, 1)
        low, high = two_halves(b_dq)
        low = walk_gradient(low, queries, k, v, tile, union, union.own, union.own2, 0, scale, H, S)
        high = walk_gradient(high, queries, k, v, tile, union, union.own2, union.end, P.W // 2, scale, H, S)

        good = all_finite(low) & all_finite(high)
        store_gradient(low, dq, tile, 0, scale, S.D, S.R, H)
        store_gradient(high, dq, tile, P.W // 2, scale, S.D, S.R, H)
    return good


@declare(
    types={**GEOMETRY, "q": "*T", "k": "*T", "v": "*T", "do": "*T", "lse": "*fp32", "delta": "*fp32",
           "dq": "*T"},
    configs=(
        Config(num_warps=8, num_stages=2, max_row=256, only=LARGE),
        Config(num_warps=4, num_stages=2, max_row=256, only=SMALL),
        Config(num_warps=4, num_stages=1, min_row=256, max_row=512),
        Config(num_warps=8, num_stages=1, min_row=512),
        *CLEANING,
    ),
    key=("DP", "BM", "BN", "R", "HALVES"),
    cases=CASES,
)  # fmt: skip
def attend_backward_q(
    q, k, v, do, lse, delta, dq, broken, tiles, bounds, groups, blocks, members, scale, TQ, TK, HQ, HS,
    s_q, s_k, s_v, s_d,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, R: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
    BS: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, JOIN: tl.constexpr, HALVES: tl.constexpr,
    UPCAST: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """Store dq of one tile and R heads, in the order of the forward. Programs: (tiles, HQ / R, B)."""
    P: tl.constexpr = Part(BM, W, HALVES)
    S: tl.constexpr = Sizes(D, DP, R, BS, BN, PARTS, JOIN, UPCAST, CLEAN)

    tile = load_tile(tiles, TQ, TK, HQ, R)
    union = load_union(blocks, members, bounds, groups, HQ, HS, R, HALVES)

    i_b = tl.program_id(2).to(tl.int64)
    i_h = (tile.head // G).to(tl.int64)
    queries = Queries(Row(q + i_b * s_q[0], s_q), Row(do + i_b * s_d[0], s_d), lse, delta)
    k = head_rows(k, s_k, i_b, i_h)
    v = head_rows(v, s_v, i_b, i_h)

    p_broken = flag_pointer(broken)
    if not CLEAN:
        good = gradient_of_tile(queries, dq, k, v, tile, union, scale, P, S)
        tl.store(p_broken, 1 - good.to(tl.int32))
    elif tl.load(p_broken) != 0:  # as in the forward
        gradient_of_tile(queries, dq, k, v, tile, union, scale, P, S)


def backward_q(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, delta: Tensor, lse: Tensor, plan: Plan, scale: float
) -> Tensor:
    """Return dq ``[B, TQ, HQ, D]`` in the dtype of q."""
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grid = (plan.tiles.shape[1], q.shape[2] // plan.readers, q.shape[0])
    broken = torch.empty(grid, dtype=torch.int32, device=q.device)

    for clean in (False, True):
        attend_backward_q.launch(
            grid, q, row_bytes(q), q=q, k=k, v=v, do=do, lse=lse, delta=delta, dq=dq, broken=broken,
            CLEAN=clean, **strides(v=v, d=do), **tile_arguments(q, k, plan, scale),
            **union_arguments(q, plan),
        )  # fmt: skip
    return dq
