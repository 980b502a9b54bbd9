"""Backward of attention to selected blocks, part 1: the row terms and the gradient of the queries."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from nsa_convert.kernels.selected.triton_forward import (
    CASES,
    GEOMETRY,
    LARGE,
    SMALL,
    key_steps,
    row_bytes,
    step_keys,
    tile_arguments,
)
from nsa_convert.kernels.selected.triton_plan import Plan
from nsa_convert.kernels.toolchain import Config, declare, dot, padded_dim


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
    i_h, o_bt = o_m % HQ, o_m // HQ
    p_do = do + (o_bt // TQ * s_db + o_bt % TQ * s_dt + i_h * s_dh)[:, None] + o_d[None, :]
    b_do = tl.load(p_do, mask=m_md, other=0.0).to(tl.float32)
    b_o = tl.load(o + o_m[:, None] * D + o_d[None, :], mask=m_md, other=0.0).to(tl.float32)
    b_dlse = tl.load(dlse + o_m, mask=m_m, other=0.0)
    b_lse = tl.load(lse + o_m, mask=m_m, other=0.0)
    unseen = b_lse == float("-inf")
    tl.store(delta + o_m, tl.where(unseen, 0.0, tl.sum(b_o * b_do, 1) - b_dlse), mask=m_m)
    LOG2: tl.constexpr = 1.4426950408889634
    tl.store(base + o_m, tl.where(unseen, float("inf"), b_lse * LOG2), mask=m_m)


@declare(
    types={**GEOMETRY, "q": "*T", "k": "*T", "v": "*T", "do": "*T", "base": "*fp32", "delta": "*fp32",
           "dq": "*T"},
    configs=(
        Config(num_warps=8, num_stages=2, max_row=256, only=LARGE),
        Config(num_warps=4, num_stages=2, max_row=256, only=SMALL),
        Config(num_warps=4, num_stages=1, min_row=256, max_row=512),
        Config(num_warps=8, num_stages=1, min_row=512),
    ),
    key=("DP", "BM", "BN", "R"),
    cases=CASES,
)  # fmt: skip
def attend_backward_q(
    q, k, v, do, base, delta, dq, tiles, bounds, blocks, members, scale, TQ, TK, HQ, HS,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_db, s_dt, s_dh,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, R: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
    BS: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, JOIN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write dq of one tile and R heads, along the walk of the forward. Programs: (tiles, HQ / R, B)."""
    i_t, i_p, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    num_tiles = tl.num_programs(0)
    p_tile = tiles + (i_b * num_tiles + i_t) * 8
    first, count, slot, start = (
        tl.load(p_tile), tl.load(p_tile + 1), tl.load(p_tile + 2), tl.load(p_tile + 3)
    )  # fmt: skip
    i_h = ((i_p * R) // G).to(tl.int64)

    o_m, o_d = tl.arange(0, BM), tl.arange(0, DP)
    o_w = o_m // R
    m_m = (o_w < count) & (o_m < W * R)
    o_q = (first + o_w).to(tl.int64)
    o_hq = i_p * R + o_m % R
    m_d = o_d < D
    m_md = m_m[:, None] & m_d[None, :]
    b_q = tl.load(q + i_b * s_qb + (o_q * s_qt + o_hq * s_qh)[:, None] + o_d[None, :], mask=m_md, other=0.0)
    b_do = tl.load(do + i_b * s_db + (o_q * s_dt + o_hq * s_dh)[:, None] + o_d[None, :], mask=m_md, other=0.0)
    row = (i_b * TQ + o_q) * HQ + o_hq
    b_base = tl.load(base + row, mask=m_m, other=float("inf"))
    b_delta = tl.load(delta + row, mask=m_m, other=0.0)
    position = slot + o_w
    o_bit = o_w.to(tl.int64)

    b_dq = tl.zeros([BM, DP], tl.float32)
    k += i_b * s_kb + i_h * s_kh
    v += i_b * s_vb + i_h * s_vh
    i_list = (i_b * HS + i_p * HS // (HQ // R)) * num_tiles + i_t
    begin, end = tl.load(bounds + i_list).to(tl.int32), tl.load(bounds + i_list + 1).to(tl.int32)
    for j in range(begin * PARTS, end * PARTS, JOIN):
        o_k, m_k, listed = step_keys(j, end, blocks, members, start, o_bit, BS, BN, PARTS, JOIN)
        m_k = m_k & (o_k < TK)
        o_k64 = o_k.to(tl.int64)
        m_kd = m_k[:, None] & m_d[None, :]
        b_k = tl.load(k + (o_k64 * s_kt)[:, None] + o_d[None, :], mask=m_kd, other=0.0)  # [BN, DP]
        b_v = tl.load(v + (o_k64 * s_vt)[:, None] + o_d[None, :], mask=m_kd, other=0.0)
        visible = listed & m_k[None, :] & (o_k[None, :] <= position[:, None])
        b_s = tl.where(visible, dot(b_q, tl.trans(b_k), UPCAST) * scale, float("-inf"))  # [BM, BN]
        b_p = tl.exp2(b_s - b_base[:, None])
        b_ds = b_p * (dot(b_do, tl.trans(b_v), UPCAST) - b_delta[:, None])
        b_dq += dot(b_ds.to(b_k.dtype), b_k, UPCAST)

    LN2: tl.constexpr = 0.6931471805599453  # scale holds log2(e)
    p_dq = dq + row[:, None] * D + o_d[None, :]
    tl.store(p_dq, (b_dq * (scale * LN2)).to(dq.dtype.element_ty), mask=m_md)


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
    attend_backward_q.launch(
        (plan.tiles.shape[1], q.shape[2] // plan.readers, q.shape[0]),
        q,
        row_bytes(q),
        q=q, k=k, v=v, do=do, base=base, delta=delta, dq=dq, bounds=plan.bounds, blocks=plan.blocks,
        members=plan.members, HS=plan.lists, s_vb=v.stride(0), s_vt=v.stride(1), s_vh=v.stride(2),
        s_db=do.stride(0), s_dt=do.stride(1), s_dh=do.stride(2),
        **tile_arguments(q, k, plan, scale), **key_steps(plan.block_size, row_bytes(q)),
    )  # fmt: skip
    return dq


