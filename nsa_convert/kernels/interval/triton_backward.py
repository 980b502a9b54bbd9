"""Backward kernels of interval attention: dq over the keys of a query tile, dk and dv over its readers."""

from __future__ import annotations

import triton
import triton.language as tl

from nsa_convert.kernels.common.toolchain import Config, declare, dot, finite, finite_rows
from nsa_convert.kernels.interval.triton_forward import (
    CASES,
    TYPES,
    load_intervals,
    load_rows,
    partial_tile,
    partial_tiles,
    sees,
    sink_range,
    tile_range,
)

GRANULE = 16
"""Keys between two entries of ``bounds``; key tiles are multiples of it."""

KEY_CASES = tuple(
    {n: x for n, x in case.items() if n != "HAS_SINKS"} | {"GRANULE": GRANULE} for case in CASES
)


@triton.jit
def query_step(
    b_dq, b_q, b_do, b_lse2, b_delta, k, v, i_n, end, b_lo, b_hi, b_first, num_sinks, s_kt, s_vt, scale2,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, HAS_SINKS: tl.constexpr, MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Add what the keys ``i_n .. i_n + BN - 1`` (below ``end``) give to dq."""
    o_n = i_n + tl.arange(0, BN)
    m_n = o_n < end

    b_k = load_rows(k, o_n, s_kt, m_n, D, BD, MASKED)
    b_v = load_rows(v, o_n, s_vt, m_n, D, BD, MASKED)

    b_s = dot(b_q, tl.trans(b_k), UPCAST) * scale2 - b_lse2[:, None]  # [BM, BN]

    if MASKED:
        m_s = sees(o_n[None, :], b_lo[:, None], b_hi[:, None], b_first[:, None], num_sinks, HAS_SINKS)
        b_s = tl.where(m_s & m_n[None, :], b_s, float("-inf"))
        b_k = finite(b_k)
        b_v = finite(b_v)

    # ds = p * (dp - delta)
    b_ds = tl.exp2(b_s) * (dot(b_do, tl.trans(b_v), UPCAST) - b_delta[:, None])
    return b_dq + dot(b_ds.to(b_k.dtype), b_k, UPCAST)


@declare(
    types=TYPES,
    configs=(
        Config(sizes={"BM": 64, "BN": 64}, num_warps=8, num_stages=2, max_row=256),
        Config(sizes={"BM": 128, "BN": 32}, num_warps=8, num_stages=2, max_row=256),
        Config(sizes={"BM": 64, "BN": 32}, num_warps=8, num_stages=1, min_row=256, max_row=512),
        Config(sizes={"BM": 16, "BN": 16}, num_warps=8, num_stages=1, min_row=512),
    ),
    key=("D", "HAS_SINKS"),
    cases=CASES,
)
def interval_backward_q(
    q, k, v, do, lse, delta, dq, lo, hi, first,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_gb, s_gt, s_gh, s_db, s_dt, s_dh,
    s_lb, s_lt, s_lh, s_ib,
    scale, num_sinks, TQ, HQ, G,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, HAS_SINKS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Store dq of a tile of queries of one head."""
    i_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    i_b = (tl.program_id(1) // HQ).to(tl.int64)
    i_h = (tl.program_id(1) % HQ).to(tl.int64)

    o_m = i_m + tl.arange(0, BM)
    m_m = o_m < TQ

    k += i_b * s_kb + (i_h // G) * s_kh
    v += i_b * s_vb + (i_h // G) * s_vh

    # Which keys the tile walks, as in the forward
    b_lo, b_hi, b_first = load_intervals(
        lo + i_b * s_ib, hi + i_b * s_ib, first + i_b * s_ib, o_m, m_m, HAS_SINKS
    )
    begin, full, cut, end = tile_range(b_lo, b_hi, m_m, BN)
    sink, sink_end = sink_range(b_first, num_sinks, begin, HAS_SINKS)

    # Rows of q and do; probabilities come from the saved lse, +inf gives p = 0.
    b_q = load_rows(q + i_b * s_qb + i_h * s_qh, o_m, s_qt, m_m, D, BD, True)
    b_do = load_rows(do + i_b * s_gb + i_h * s_gh, o_m, s_gt, m_m, D, BD, True)
    p_l = i_b * s_lb + i_h * s_lh + o_m.to(tl.int64) * s_lt
    b_lse = tl.load(lse + p_l, mask=m_m, other=float("-inf"))
    b_lse2 = tl.where(b_lse == float("-inf"), float("inf"), b_lse * 1.4426950408889634)
    # A query without keys has no gradient, whatever its lse is used for.
    b_delta = tl.load(delta + p_l, mask=m_m & (b_lse > float("-inf")), other=0.0)

    scale2 = scale * 1.4426950408889634
    b_dq = tl.zeros([BM, BD], tl.float32)

    for i in range(partial_tiles(sink, sink_end, begin, full, cut, end, BN)):
        i_n, stop = partial_tile(i, sink, sink_end, begin, full, cut, end, BN)
        b_dq = query_step(
            b_dq, b_q, b_do, b_lse2, b_delta, k, v, i_n, stop, b_lo, b_hi, b_first, num_sinks,
            s_kt, s_vt, scale2, D, BD, BN, HAS_SINKS, True, UPCAST,
        )  # fmt: skip
    for i_n in range(full, cut, BN):
        b_dq = query_step(
            b_dq, b_q, b_do, b_lse2, b_delta, k, v, i_n, end, b_lo, b_hi, b_first, num_sinks,
            s_kt, s_vt, scale2, D, BD, BN, HAS_SINKS, False, UPCAST,
        )  # fmt: skip

    o_d = tl.arange(0, BD)
    p_dq = dq + i_b * s_db + i_h * s_dh + o_m.to(tl.int64)[:, None] * s_dt + o_d[None, :]
    tl.store(p_dq, (b_dq * scale).to(dq.dtype.element_ty), mask=m_m[:, None] & (o_d < D)[None, :])


@triton.jit
def key_step(
    b_dk, b_dv, b_k, b_v, q, do, lse, delta, lo, hi, i_m, end, o_n, s_qt, s_gt, s_lt, scale2,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add what the queries ``i_m .. i_m + BM - 1`` (below ``end``) of one head give to dk and dv."""
    o_m = i_m + tl.arange(0, BM)
    m_m = o_m < end

    if MASKED:
        b_lo, b_hi, _ = load_intervals(lo, hi, lo, o_m, m_m, False)
        m_m = m_m & (b_lo < b_hi)  # padding may hold anything

    b_q = load_rows(q, o_m, s_qt, m_m, D, BD, MASKED)
    b_do = load_rows(do, o_m, s_gt, m_m, D, BD, MASKED)
    if MASKED:
        b_lse2 = tl.load(lse + o_m.to(tl.int64) * s_lt, mask=m_m, other=float("inf")) * 1.4426950408889634
        b_delta = tl.load(delta + o_m.to(tl.int64) * s_lt, mask=m_m, other=0.0)
    else:
        b_lse2 = tl.load(lse + o_m.to(tl.int64) * s_lt) * 1.4426950408889634
        b_delta = tl.load(delta + o_m.to(tl.int64) * s_lt)

    b_s = dot(b_k, tl.trans(b_q), UPCAST) * scale2 - b_lse2[None, :]  # [BN, BM]
    b_dp = dot(b_v, tl.trans(b_do), UPCAST) - b_delta[None, :]
    if MASKED:
        # A query that is not finite must not reach the keys it does not see.
        m_s = sees(o_n[:, None], b_lo[None, :], b_hi[None, :], b_lo[None, :], 0, False)
        good = finite_rows(b_q) & finite_rows(b_do)
        b_q = finite(b_q)
        b_do = finite(b_do)
        b_s = tl.where(m_s, tl.where(good[None, :], b_s, float("nan")), float("-inf"))
        b_dp = tl.where(m_s, b_dp, 0.0)

    b_p = tl.exp2(b_s)
    b_ds = b_p * b_dp
    b_dv += dot(b_p.to(b_do.dtype), b_do, UPCAST)
    b_dk += dot(b_ds.to(b_q.dtype), b_q, UPCAST)
    return b_dk, b_dv


@declare(
    types=TYPES,
    configs=(
        Config(sizes={"BM": 32, "BN": 64}, num_warps=8, num_stages=2, max_row=256),
        Config(sizes={"BM": 64, "BN": 64}, num_warps=8, num_stages=1, max_row=256),
        Config(sizes={"BM": 32, "BN": 32}, num_warps=8, num_stages=2, min_row=256, max_row=512),
        Config(sizes={"BM": 16, "BN": 16}, num_warps=4, num_stages=1, min_row=512),
    ),
    key=("D",),
    cases=KEY_CASES,
)
def interval_backward_kv(
    q, k, v, do, lse, delta, dk, dv, lo, hi, bounds,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_gb, s_gt, s_gh, s_db, s_dt, s_dh,
    s_lb, s_lt, s_lh, s_ib, s_bb, s_pb,
    scale, num_bounds, parts, TK, HQ, G,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr,
    GRANULE: tl.constexpr,
):  # fmt: skip
    """Store dk and dv of a tile of keys: the sum over the query heads of its group, one after another.

    Sinks are runs of keys of their own, with other lo and hi. The queries are split into ``parts`` runs of
    equal length; each has its own dk and dv, ``s_pb`` apart.
    """
    # The first keys are seen by the most queries: they start first.
    i_n = tl.program_id(0) * BN
    i_b = (tl.program_id(1) // (HQ // G)).to(tl.int64)
    i_h = (tl.program_id(1) % (HQ // G)).to(tl.int64)
    o_n = i_n + tl.arange(0, BN)
    m_n = o_n < TK

    b_k = finite(load_rows(k + i_b * s_kb + i_h * s_kh, o_n, s_kt, m_n, D, BD, True))
    b_v = finite(load_rows(v + i_b * s_vb + i_h * s_vh, o_n, s_vt, m_n, D, BD, True))

    bounds += i_b * s_bb
    left = i_n // GRANULE
    right = tl.minimum(left + BN // GRANULE, num_bounds - 1)
    # The tile is seen by the queries of [begin, end), and by those of [full, cut) as a whole.
    begin = tl.load(bounds + left)
    full = tl.load(bounds + num_bounds + right)
    cut = tl.load(bounds + 2 * num_bounds + left)
    end = tl.load(bounds + 3 * num_bounds + right)

    # Round to whole tiles of BM queries, counted from ``begin``.
    end = tl.maximum(begin, end)
    full = begin + tl.cdiv(tl.minimum(full, end) - begin, BM) * BM
    cut = full + tl.maximum(tl.minimum(cut, end) - full, 0) // BM * BM

    lo += i_b * s_ib
    hi += i_b * s_ib
    scale2 = scale * 1.4426950408889634
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)

    # The first query head of the group
    q += i_b * s_qb + i_h * G * s_qh
    do += i_b * s_gb + i_h * G * s_gh
    lse += i_b * s_lb + i_h * G * s_lh
    delta += i_b * s_lb + i_h * G * s_lh

    # Tiles of queries that need a mask, of all heads one after another; this program takes its part of them.
    edge = (full - begin) // BM
    i_p = tl.program_id(2)
    tiles = edge + tl.cdiv(tl.maximum(end - cut, 0), BM)
    for i in range(G * tiles * i_p // parts, G * tiles * (i_p + 1) // parts):
        i_g = (i // tiles).to(tl.int64)
        i_t = i % tiles
        i_m = tl.where(i_t < edge, begin + i_t * BM, cut + (i_t - edge) * BM)
        b_dk, b_dv = key_step(
            b_dk, b_dv, b_k, b_v, q + i_g * s_qh, do + i_g * s_gh, lse + i_g * s_lh, delta + i_g * s_lh,
            lo, hi, i_m, end, o_n, s_qt, s_gt, s_lt, scale2, D, BD, BM, True, UPCAST,
        )  # fmt: skip

    # Tiles of queries that see every key of the tile
    tiles = (cut - full) // BM
    for i in range(G * tiles * i_p // parts, G * tiles * (i_p + 1) // parts):
        i_g = (i // tiles).to(tl.int64)
        i_m = full + i % tiles * BM
        b_dk, b_dv = key_step(
            b_dk, b_dv, b_k, b_v, q + i_g * s_qh, do + i_g * s_gh, lse + i_g * s_lh, delta + i_g * s_lh,
            lo, hi, i_m, end, o_n, s_qt, s_gt, s_lt, scale2, D, BD, BM, False, UPCAST,
        )  # fmt: skip

    o_d = tl.arange(0, BD)
    m_nd = m_n[:, None] & (o_d < D)[None, :]
    p_d = i_p.to(tl.int64) * s_pb + i_b * s_db + i_h * s_dh + o_n.to(tl.int64)[:, None] * s_dt + o_d[None, :]
    tl.store(dk + p_d, (b_dk * scale).to(dk.dtype.element_ty), mask=m_nd)
    tl.store(dv + p_d, b_dv.to(dv.dtype.element_ty), mask=m_nd)


@declare(
    types=TYPES,
    configs=(Config(sizes={"BM": 32}),),
    cases=tuple({"D": d, "BD": bd} for d, bd in ((128, 128), (64, 64), (80, 128), (256, 256))),
)
def output_delta(
    o, do, dlse, delta, s_ob, s_ot, s_oh, s_gb, s_gt, s_gh, s_eb, s_et, s_eh, s_lb, s_lt, s_lh, TQ, HQ,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Store ``rowsum(o * do) - dlse``."""
    i_b = (tl.program_id(1) // HQ).to(tl.int64)
    i_h = (tl.program_id(1) % HQ).to(tl.int64)
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    m_m = o_m < TQ

    b_o = load_rows(o + i_b * s_ob + i_h * s_oh, o_m, s_ot, m_m, D, BD, True).to(tl.float32)
    b_do = load_rows(do + i_b * s_gb + i_h * s_gh, o_m, s_gt, m_m, D, BD, True).to(tl.float32)

    o_t = o_m.to(tl.int64)
    b_dlse = tl.load(dlse + i_b * s_eb + i_h * s_eh + o_t * s_et, mask=m_m, other=0.0)
    tl.store(delta + i_b * s_lb + i_h * s_lh + o_t * s_lt, tl.sum(b_o * b_do, 1) - b_dlse, mask=m_m)
