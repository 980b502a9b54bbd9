"""Backward kernels of interval attention: dq over the keys of a query tile, dk and dv over its readers."""

from __future__ import annotations

import triton
import triton.language as tl

from nsa_convert.kernels.common.toolchain import Config, declare
from nsa_convert.kernels.common.triton_flash import (
    LOG2E,
    Graded,
    Rows,
    finite,
    grade_keys,
    grade_queries,
    head_rows,
    load_rows,
    load_terms,
    store_rows,
)
from nsa_convert.kernels.interval.triton_forward import (
    CASES,
    TYPES,
    Sizes,
    key_band,
    load_runs,
    partial_tile,
    partial_tiles,
    sees,
)

GRANULE = 16
"""Keys between two entries of ``bounds``; key tiles are multiples of it."""

KEY_CASES = tuple(
    {n: x for n, x in case.items() if n != "HAS_SINKS"} | {"GRANULE": GRANULE} for case in CASES
)


@triton.jit
def query_step(b_dq, rows, k, v, i_n, end, runs, scale2, MASKED: tl.constexpr, S: tl.constexpr):
    """Add what the keys ``i_n .. i_n + BN - 1`` (below ``end``) give to dq."""
    o_n = i_n + tl.arange(0, S.BN)
    m_n = o_n < end

    b_k = load_rows(k, o_n, m_n, S.D, S.BD, MASKED)
    b_v = load_rows(v, o_n, m_n, S.D, S.BD, MASKED)
    visible = sees(o_n, m_n, runs, S.HAS_SINKS) if MASKED else None
    return grade_queries(b_dq, rows, b_k, b_v, visible, scale2, MASKED, MASKED, S.UPCAST)


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
    q, k, v, do, lse, delta, dq, lo, hi, first, s_q, s_k, s_v, s_g, s_d, s_l, s_ib,
    scale, num_sinks, TQ, HQ, G,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, HAS_SINKS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Store dq of a tile of queries of one head."""
    S: tl.constexpr = Sizes(D, BD, BN, HAS_SINKS, UPCAST)

    i_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    i_b = (tl.program_id(1) // HQ).to(tl.int64)
    i_h = (tl.program_id(1) % HQ).to(tl.int64)

    o_m = i_m + tl.arange(0, BM)
    m_m = o_m < TQ

    k = head_rows(k, s_k, i_b, i_h // G)
    v = head_rows(v, s_v, i_b, i_h // G)

    # Which keys the tile walks, as in the forward
    o_i = i_b * s_ib
    runs = load_runs(lo + o_i, hi + o_i, first + o_i, o_m, m_m, num_sinks, HAS_SINKS)
    band = key_band(runs, m_m, BN, HAS_SINKS)

    b_q = load_rows(head_rows(q, s_q, i_b, i_h), o_m, m_m, D, BD, True)
    b_do = load_rows(head_rows(do, s_g, i_b, i_h), o_m, m_m, D, BD, True)
    o_l = i_b * s_l[0] + i_h * s_l[2] + o_m.to(tl.int64) * s_l[1]
    base, b_delta = load_terms(lse + o_l, delta + o_l, m_m, True)
    rows = Graded(b_q, b_do, base, b_delta)

    scale2 = scale * LOG2E
    b_dq = tl.zeros([BM, BD], tl.float32)

    for i in range(partial_tiles(band, BN)):
        i_n, stop = partial_tile(i, band, BN)
        b_dq = query_step(b_dq, rows, k, v, i_n, stop, runs, scale2, True, S)
    for i_n in range(band.full, band.cut, BN):
        b_dq = query_step(b_dq, rows, k, v, i_n, band.end, runs, scale2, False, S)

    store_rows(head_rows(dq, s_d, i_b, i_h), o_m, m_m, b_dq * scale, D, BD)


@triton.jit
def head_of_group(group, s_q, s_g, s_l, i_g):
    """Return q, do, lse and delta of the i-th head of a group; ``group`` are those of the first."""
    return Graded(
        Rows(group.q + i_g * s_q[2], s_q[1]), Rows(group.do + i_g * s_g[2], s_g[1]),
        Rows(group.base + i_g * s_l[2], s_l[1]), group.delta + i_g * s_l[2],
    )  # fmt: skip


@triton.jit
def key_step(
    grads, b_k, b_v, readers, lo, hi, i_m, end, o_n, scale2, MASKED: tl.constexpr, S: tl.constexpr
):  # fmt: skip
    """Add what the queries ``i_m .. i_m + BM - 1`` (below ``end``) of one head give to dk and dv.

    ``readers`` are q, do, lse and delta of the head; its BN of :class:`Sizes` counts queries.
    """
    o_m = i_m + tl.arange(0, S.BN)
    m_m = o_m < end
    if MASKED:
        runs = load_runs(lo, hi, lo, o_m, m_m, 0, False)
        m_m = m_m & (runs.lo < runs.hi)  # padding may hold anything

    b_q = load_rows(readers.q, o_m, m_m, S.D, S.BD, MASKED)
    b_do = load_rows(readers.do, o_m, m_m, S.D, S.BD, MASKED)

    o_l = o_m.to(tl.int64) * readers.base.step
    base, b_delta = load_terms(readers.base.first + o_l, readers.delta + o_l, m_m, MASKED)
    rows = Graded(b_q, b_do, base, b_delta)

    visible = None
    if MASKED:
        visible = (o_n[:, None] >= runs.lo[None, :]) & (o_n[:, None] < runs.hi[None, :])
    return grade_keys(grads, b_k, b_v, rows, visible, scale2, MASKED, MASKED, S.UPCAST)


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
    q, k, v, do, lse, delta, dk, dv, lo, hi, bounds, s_q, s_k, s_v, s_g, s_d, s_l, s_ib, s_bb, s_pb,
    scale, num_bounds, parts, TK, HQ, G,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr,
    GRANULE: tl.constexpr,
):  # fmt: skip
    """Store dk and dv of a tile of keys: the sum over the query heads of its group, one after another.

    Sinks are runs of keys of their own, with other lo and hi. The queries are split into ``parts`` runs of
    equal length; each has its own dk and dv, ``s_pb`` apart.
    """
    S: tl.constexpr = Sizes(D, BD, BM, False, UPCAST)

    # The first keys are seen by the most queries: they start first.
    i_n = tl.program_id(0) * BN
    i_b = (tl.program_id(1) // (HQ // G)).to(tl.int64)
    i_h = (tl.program_id(1) % (HQ // G)).to(tl.int64)
    o_n = i_n + tl.arange(0, BN)
    m_n = o_n < TK

    b_k = finite(load_rows(head_rows(k, s_k, i_b, i_h), o_n, m_n, D, BD, True))
    b_v = finite(load_rows(head_rows(v, s_v, i_b, i_h), o_n, m_n, D, BD, True))

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
    scale2 = scale * LOG2E
    grads = (tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BD], tl.float32))

    # The first query head of the group
    i_q = i_h * G
    o_l = i_b * s_l[0] + i_q * s_l[2]
    q += i_b * s_q[0] + i_q * s_q[2]
    do += i_b * s_g[0] + i_q * s_g[2]
    group = Graded(q, do, lse + o_l, delta + o_l)

    # Tiles of queries that need a mask, of all heads one after another; this program takes its part of them.
    edge = (full - begin) // BM
    i_p = tl.program_id(2)
    tiles = edge + tl.cdiv(tl.maximum(end - cut, 0), BM)
    for i in range(G * tiles * i_p // parts, G * tiles * (i_p + 1) // parts):
        i_t = i % tiles
        i_m = tl.where(i_t < edge, begin + i_t * BM, cut + (i_t - edge) * BM)
        readers = head_of_group(group, s_q, s_g, s_l, (i // tiles).to(tl.int64))
        grads = key_step(grads, b_k, b_v, readers, lo, hi, i_m, end, o_n, scale2, True, S)

    # Tiles of queries that see every key of the tile
    tiles = (cut - full) // BM
    for i in range(G * tiles * i_p // parts, G * tiles * (i_p + 1) // parts):
        i_m = full + i % tiles * BM
        readers = head_of_group(group, s_q, s_g, s_l, (i // tiles).to(tl.int64))
        grads = key_step(grads, b_k, b_v, readers, lo, hi, i_m, end, o_n, scale2, False, S)

    o_p = i_p.to(tl.int64) * s_pb
    store_rows(head_rows(dk + o_p, s_d, i_b, i_h), o_n, m_n, grads[0] * scale, D, BD)
    store_rows(head_rows(dv + o_p, s_d, i_b, i_h), o_n, m_n, grads[1], D, BD)


@declare(
    types=TYPES,
    configs=(Config(sizes={"BM": 32}),),
    cases=tuple({"D": d, "BD": bd} for d, bd in ((128, 128), (64, 64), (80, 128), (256, 256))),
)
def output_delta(
    o, do, dlse, delta, s_o, s_g, s_e, s_l, TQ, HQ, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """Store ``rowsum(o * do) - dlse``."""
    i_b = (tl.program_id(1) // HQ).to(tl.int64)
    i_h = (tl.program_id(1) % HQ).to(tl.int64)
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    m_m = o_m < TQ

    b_o = load_rows(head_rows(o, s_o, i_b, i_h), o_m, m_m, D, BD, True).to(tl.float32)
    b_do = load_rows(head_rows(do, s_g, i_b, i_h), o_m, m_m, D, BD, True).to(tl.float32)

    o_t = o_m.to(tl.int64)
    b_dlse = tl.load(dlse + i_b * s_e[0] + i_h * s_e[2] + o_t * s_e[1], mask=m_m, other=0.0)
    tl.store(delta + i_b * s_l[0] + i_h * s_l[2] + o_t * s_l[1], tl.sum(b_o * b_do, 1) - b_dlse, mask=m_m)
