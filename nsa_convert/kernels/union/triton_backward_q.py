"""Backward of attention to selected blocks, part 1: the row terms and the gradient of the queries."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_convert.kernels.common.toolchain import Config, all_finite, declare, padded_dim
from nsa_convert.kernels.union.triton_plan import Plan
from nsa_convert.kernels.union.triton_steps import (
    CASES,
    CLEANING,
    GEOMETRY,
    LARGE,
    SMALL,
    gradient_rows,
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


@declare(
    types={"o": "*T", "do": "*T", "lse": "*fp32", "dlse": "*fp32", "base": "*fp32", "delta": "*fp32",
           "rows": "i32", "TQ": "i32", "HQ": "i32"},
    configs=(Config(num_warps=4, num_stages=1),),
    cases=({"D": 128, "DP": 128, "BM": 32},),
)  # fmt: skip
def row_terms(
    o, do, lse, dlse, base, delta, rows, TQ, HQ, s_db, s_dt, s_dh,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Write ``delta = rowsum(o * do) - dlse`` and the base of exponents ``lse * log2(e)``.

    A row that sees no key gets the base +inf, so that its probabilities come out as 0. With
    ds = p * (dp - delta), delta holds the gradients through o and lse alike.
    """
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, DP)
    m_m = o_m < rows
    m_md = m_m[:, None] & (o_d < D)[None, :]

    i_h = o_m % HQ
    o_bt = o_m // HQ
    p_do = do + (o_bt // TQ * s_db + o_bt % TQ * s_dt + i_h * s_dh)[:, None] + o_d[None, :]

    b_do = tl.load(p_do, mask=m_md, other=0.0).to(tl.float32)
    b_o = tl.load(o + o_m[:, None] * D + o_d[None, :], mask=m_md, other=0.0).to(tl.float32)
    b_dlse = tl.load(dlse + o_m, mask=m_m, other=0.0)
    b_lse = tl.load(lse + o_m, mask=m_m, other=0.0)

    unseen = b_lse == float("-inf")
    tl.store(delta + o_m, tl.where(unseen, 0.0, tl.sum(b_o * b_do, 1) - b_dlse), mask=m_m)

    LOG2: tl.constexpr = 1.4426950408889634
    tl.store(base + o_m, tl.where(unseen, float("inf"), b_lse * LOG2), mask=m_m)


@triton.jit
def walk_gradient(
    b_dq, q, do, base, delta, k, v, begin, end, blocks, members, first, count, slot, start, from_w, i_p,
    first_row, TK, HQ, scale, s_qt, s_qh, s_dt, s_dh, s_kt, s_vt,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, R: tl.constexpr, W: tl.constexpr, BS: tl.constexpr,
    BN: tl.constexpr, PARTS: tl.constexpr, JOIN: tl.constexpr, HALVES: tl.constexpr, UPCAST: tl.constexpr,
    CLEAN: tl.constexpr,
):  # fmt: skip
    """Add what the blocks ``begin .. end - 1`` give to dq of BM rows, in the order of the forward."""
    o_q, o_hq, m_m, o_w = load_tile_rows(first, count, i_p, from_w, BM, R, W, HALVES)

    b_q = load_heads(q, o_q, o_hq, m_m, s_qt, s_qh, D, DP)
    b_do = load_heads(do, o_q, o_hq, m_m, s_dt, s_dh, D, DP)

    row = (first_row + o_q) * HQ + o_hq
    b_base = tl.load(base + row, mask=m_m, other=float("inf"))
    b_delta = tl.load(delta + row, mask=m_m, other=0.0)

    for j in range(begin * PARTS, end * PARTS, JOIN):
        o_k, m_k, bits = step_keys(j, end, blocks, members, start, TK, BS, BN, PARTS, JOIN)

        b_k = load_keys(k, o_k, m_k, s_kt, D, DP)
        b_v = load_keys(v, o_k, m_k, s_vt, D, DP)

        visible = seen_by(bits, o_k, m_k, o_w, slot, JOIN)
        b_dq = gradient_rows(b_dq, b_q, b_do, b_base, b_delta, b_k, b_v, visible, scale, UPCAST, CLEAN)
    return b_dq


@triton.jit
def store_gradient(
    b_dq, dq, first_row, first, count, from_w, i_p, HQ, scale, D: tl.constexpr, DP: tl.constexpr,
    BM: tl.constexpr, R: tl.constexpr, W: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Store dq of BM rows."""
    o_q, o_hq, m_m, _ = load_tile_rows(first, count, i_p, from_w, BM, R, W, HALVES)
    LN2: tl.constexpr = 0.6931471805599453  # scale holds log2(e)
    o_d = tl.arange(0, DP)
    p_dq = dq + ((first_row + o_q) * HQ + o_hq)[:, None] * D + o_d[None, :]
    b_dq = (b_dq * (scale * LN2)).to(dq.dtype.element_ty)
    tl.store(p_dq, b_dq, mask=m_m[:, None] & (o_d < D)[None, :])


@triton.jit
def gradient_of_tile(
    q, do, base, delta, dq, k, v, begin, own, own2, end, blocks, members, first, count, slot, start, i_p,
    first_row, TK, HQ, scale, s_qt, s_qh, s_dt, s_dh, s_kt, s_vt,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, R: tl.constexpr, W: tl.constexpr, BS: tl.constexpr,
    BN: tl.constexpr, PARTS: tl.constexpr, JOIN: tl.constexpr, HALVES: tl.constexpr, UPCAST: tl.constexpr,
    CLEAN: tl.constexpr,
):  # fmt: skip
    """Compute and store dq of a tile, and return whether it is finite."""
    b_dq = tl.zeros([BM, DP], tl.float32)

    b_dq = walk_gradient(
        b_dq, q, do, base, delta, k, v, begin, own, blocks, members, first, count, slot, start, 0, i_p,
        first_row, TK, HQ, scale, s_qt, s_qh, s_dt, s_dh, s_kt, s_vt, D, DP, BM, R, W, BS, BN, PARTS, JOIN,
        HALVES, UPCAST, CLEAN,
    )  # fmt: skip

    if HALVES == 1:
        good = all_finite(b_dq)
        store_gradient(b_dq, dq, first_row, first, count, 0, i_p, HQ, scale, D, DP, BM, R, W, 1)
    else:
        b_dq, b_dq2 = two_halves(b_dq)
        b_dq = walk_gradient(
            b_dq, q, do, base, delta, k, v, own, own2, blocks, members, first, count, slot, start, 0, i_p,
            first_row, TK, HQ, scale, s_qt, s_qh, s_dt, s_dh, s_kt, s_vt, D, DP, BM // 2, R, W // 2, BS, BN,
            PARTS, JOIN, 1, UPCAST, CLEAN,
        )  # fmt: skip
        b_dq2 = walk_gradient(
            b_dq2, q, do, base, delta, k, v, own2, end, blocks, members, first, count, slot, start, W // 2,
            i_p, first_row, TK, HQ, scale, s_qt, s_qh, s_dt, s_dh, s_kt, s_vt, D, DP, BM // 2, R, W // 2, BS,
            BN, PARTS, JOIN, 1, UPCAST, CLEAN,
        )  # fmt: skip

        good = all_finite(b_dq) & all_finite(b_dq2)
        store_gradient(b_dq, dq, first_row, first, count, 0, i_p, HQ, scale, D, DP, BM // 2, R, W // 2, 1)
        store_gradient(
            b_dq2, dq, first_row, first, count, W // 2, i_p, HQ, scale, D, DP, BM // 2, R, W // 2, 1
        )
    return good


@declare(
    types={**GEOMETRY, "q": "*T", "k": "*T", "v": "*T", "do": "*T", "base": "*fp32", "delta": "*fp32",
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
    q, k, v, do, base, delta, dq, broken, tiles, bounds, groups, blocks, members, scale, TQ, TK, HQ, HS,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_db, s_dt, s_dh,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, R: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
    BS: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, JOIN: tl.constexpr, HALVES: tl.constexpr,
    UPCAST: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """Store dq of one tile and R heads, in the order of the forward. Programs: (tiles, HQ / R, B)."""
    i_t = tl.program_id(0)
    i_p = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    first, count, slot, start, begin, own, own2, end = load_tile(
        tiles, bounds, groups, i_t, i_p, i_b, tl.num_programs(0), HQ, HS, R, HALVES
    )

    i_h = ((i_p * R) // G).to(tl.int64)
    q += i_b * s_qb
    do += i_b * s_db
    k += i_b * s_kb + i_h * s_kh
    v += i_b * s_vb + i_h * s_vh

    p_broken = broken + (i_b * tl.num_programs(1) + i_p) * tl.num_programs(0) + i_t

    if not CLEAN:
        good = gradient_of_tile(
            q, do, base, delta, dq, k, v, begin, own, own2, end, blocks, members, first, count, slot, start,
            i_p, i_b * TQ, TK, HQ, scale, s_qt, s_qh, s_dt, s_dh, s_kt, s_vt, D, DP, BM, R, W, BS, BN, PARTS,
            JOIN, HALVES, UPCAST, False,
        )  # fmt: skip
        tl.store(p_broken, 1 - good.to(tl.int32))
    elif tl.load(p_broken) != 0:  # as in the forward
        gradient_of_tile(
            q, do, base, delta, dq, k, v, begin, own, own2, end, blocks, members, first, count, slot, start,
            i_p, i_b * TQ, TK, HQ, scale, s_qt, s_qh, s_dt, s_dh, s_kt, s_vt, D, DP, BM, R, W, BS, BN, PARTS,
            JOIN, HALVES, UPCAST, True,
        )  # fmt: skip


def row_sums(o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(delta, base)``, both ``[B, TQ, HQ]`` float32; see :func:`row_terms`.

    Args:
        o: ``[B, TQ, HQ, D]``, contiguous.
        lse: ``[B, TQ, HQ]`` float32, contiguous.
        do: ``[B, TQ, HQ, D]``, the last dim contiguous.
        dlse: ``[B, TQ, HQ]`` float32, contiguous.
    """
    delta, base = torch.empty(2, *lse.shape, dtype=torch.float32, device=lse.device)

    rows = lse.numel()
    row_terms.launch(
        (-(-rows // 32),), o, row_bytes(o),
        o=o, do=do, lse=lse, dlse=dlse, base=base, delta=delta, rows=rows, TQ=o.shape[1], HQ=o.shape[2],
        s_db=do.stride(0), s_dt=do.stride(1), s_dh=do.stride(2),
        D=o.shape[3], DP=padded_dim(o.shape[3]), BM=32,
    )  # fmt: skip
    return delta, base


def backward_q(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, delta: Tensor, base: Tensor, plan: Plan, scale: float
) -> Tensor:
    """Return dq ``[B, TQ, HQ, D]`` in the dtype of q."""
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grid = (plan.tiles.shape[1], q.shape[2] // plan.readers, q.shape[0])
    broken = torch.empty(grid, dtype=torch.int32, device=q.device)

    for clean in (False, True):
        attend_backward_q.launch(
            grid, q, row_bytes(q), q=q, k=k, v=v, do=do, base=base, delta=delta, dq=dq, broken=broken,
            CLEAN=clean, s_vb=v.stride(0), s_vt=v.stride(1), s_vh=v.stride(2),
            s_db=do.stride(0), s_dt=do.stride(1), s_dh=do.stride(2),
            **tile_arguments(q, k, plan, scale), **union_arguments(q, plan),
        )  # fmt: skip
    return dq
