"""Kernels that score blocks by the attention their compressed cells get, without storing scores of cells."""

from __future__ import annotations

import triton
import triton.language as tl

from nsa_convert.kernels.common.toolchain import Config, declare, dot
from nsa_convert.kernels.interval.triton_forward import (
    FAR,
    load_intervals,
    load_rows,
    partial_tile,
    partial_tiles,
    sees,
    tile_range,
)

TYPES = {
    **dict.fromkeys(("q", "ck"), "*T"),
    **dict.fromkeys(("lse", "score"), "*fp32"),
    **dict.fromkeys(("lo", "hi", "own"), "*i32"),
    **dict.fromkeys(("TQ", "HQ", "G", "begin", "end", "C", "parts", "steps", "overlap"), "i32"),
    "scale": "fp32",
}

CASES = (
    {"D": 128, "BD": 128, "UPCAST": False},
    {"D": 160, "BD": 256, "UPCAST": False, "row": 512, "dtype": "fp16"},
    {"D": 256, "BD": 256, "UPCAST": False, "row": 512},
    {"D": 64, "BD": 64, "UPCAST": False, "row": 128},
    {"D": 128, "BD": 128, "UPCAST": False, "row": 512, "dtype": "fp32"},
    {"D": 256, "BD": 256, "UPCAST": False, "row": 1024, "dtype": "fp32"},
)
"""Shapes that the ahead-of-time test compiles; second-order scores have twice the head dim."""


@triton.jit
def lse_step(
    b_q, b_m, b_l, ck, i_n, end, b_lo, b_hi, s_kt, scale2, D: tl.constexpr, BD: tl.constexpr,
    BN: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add the cells ``i_n .. i_n + BN - 1`` to a running sum of exponentials."""
    o_n = i_n + tl.arange(0, BN)
    b_k = load_rows(ck, o_n, s_kt, o_n < end, D, BD, MASKED)

    b_s = dot(b_q, tl.trans(b_k), UPCAST) * scale2  # [BM, BN]
    if MASKED:
        m_s = sees(o_n[None, :], b_lo[:, None], b_hi[:, None], b_lo[:, None], 0, False)
        b_s = tl.where(m_s, b_s, float("-inf"))

    b_max = tl.maximum(b_m, tl.max(b_s, 1))
    safe = tl.where(b_max == float("-inf"), 0.0, b_max) if MASKED else b_max
    return b_max, b_l * tl.exp2(b_m - safe) + tl.sum(tl.exp2(b_s - safe[:, None]), 1)


@declare(
    types=TYPES,
    configs=(
        Config(sizes={"BM": 64, "BN": 64}, num_warps=4, num_stages=3, max_row=256),
        Config(sizes={"BM": 128, "BN": 64}, num_warps=8, num_stages=3, max_row=256),
        Config(sizes={"BM": 64, "BN": 32}, num_warps=8, num_stages=2, min_row=256, max_row=512),
        Config(sizes={"BM": 16, "BN": 32}, num_warps=4, num_stages=1, min_row=512),
    ),
    key=("D",),
    cases=CASES,
)
def cell_lse(
    q, ck, lse, lo, hi, s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_lb, s_lt, s_lh, s_ib, scale, TQ, HQ, G,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Store the lse of a tile of queries of one head over the cells they see."""
    i_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    i_b = (tl.program_id(1) // HQ).to(tl.int64)
    i_h = (tl.program_id(1) % HQ).to(tl.int64)

    o_m = i_m + tl.arange(0, BM)
    m_m = o_m < TQ

    ck += i_b * s_kb + (i_h // G) * s_kh

    b_lo, b_hi, _ = load_intervals(lo + i_b * s_ib, hi + i_b * s_ib, lo, o_m, m_m, False)
    begin, full, cut, end = tile_range(b_lo, b_hi, m_m, BN)

    b_q = load_rows(q + i_b * s_qb + i_h * s_qh, o_m, s_qt, m_m, D, BD, True)
    scale2 = scale * 1.4426950408889634
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)

    for i in range(partial_tiles(begin, begin, begin, full, cut, end, BN)):
        i_n, stop = partial_tile(i, begin, begin, begin, full, cut, end, BN)
        b_m, b_l = lse_step(b_q, b_m, b_l, ck, i_n, stop, b_lo, b_hi, s_kt, scale2, D, BD, BN, True, UPCAST)
    for i_n in range(full, cut, BN):
        b_m, b_l = lse_step(b_q, b_m, b_l, ck, i_n, end, b_lo, b_hi, s_kt, scale2, D, BD, BN, False, UPCAST)

    b_lse = tl.where(b_l == 0, float("-inf"), (b_m + tl.log2(b_l)) * 0.6931471805599453)
    tl.store(lse + i_b * s_lb + i_h * s_lh + o_m.to(tl.int64) * s_lt, b_lse, mask=m_m)


@triton.jit
def load_query(q, lse, i_q, o_m, m_m, s_qt, s_qh, s_lt, s_lh, D: tl.constexpr, BD: tl.constexpr):
    """Return the rows of query head ``i_q`` and their lse in the log2 domain."""
    b_q = load_rows(q + i_q * s_qh, o_m, s_qt, m_m, D, BD, True)
    b_lse = tl.load(lse + i_q * s_lh + o_m.to(tl.int64) * s_lt, mask=m_m, other=0.0)
    return b_q, b_lse * 1.4426950408889634


@triton.jit
def load_cells(ck, i, o_b, first, C, steps, overlap, s_kt, D: tl.constexpr, BD: tl.constexpr):
    """Return the i-th cell that overlaps each block: its keys and its number, FAR before the document."""
    o_c = o_b * steps + (1 - overlap + i)
    b_k = load_rows(ck, first + o_c, s_kt, (o_c >= 0) & (first + o_c < C), D, BD, True)
    return b_k, tl.where(o_c >= 0, first + o_c, FAR)


@triton.jit
def probability(b_q, b_lse2, b_k, o_c, b_hi, m_m, scale, UPCAST: tl.constexpr):
    """Return ``exp(s - lse) [BM, BB]``, 0 for cells a query does not see.

    A given lse may lie below a score: the exponent is bounded so that a group's sum stays finite.
    """
    b_s = dot(b_q, tl.trans(b_k), UPCAST) * (scale * 1.4426950408889634)
    m_s = (o_c[None, :] < b_hi[:, None]) & m_m[:, None]
    return tl.where(m_s, tl.exp2(tl.minimum(b_s - b_lse2[:, None], 115.0)), 0.0)


@declare(
    types=TYPES,
    configs=(
        Config(sizes={"BM": 64, "BB": 64}, num_warps=8, num_stages=2, max_row=256),
        Config(sizes={"BM": 128, "BB": 64}, num_warps=8, num_stages=2, max_row=256),
        Config(sizes={"BM": 64, "BB": 32}, num_warps=8, num_stages=2, min_row=256, max_row=512),
        Config(sizes={"BM": 16, "BB": 32}, num_warps=4, num_stages=1, min_row=512),
    ),
    key=("D", "MAXIMUM"),
    cases=(*({**case, "MAXIMUM": False} for case in CASES), {**CASES[0], "MAXIMUM": True}),
)
def block_score(
    q, ck, lse, score, lo, hi, own, s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_lb, s_lt, s_lh, s_ib, s_jb,
    s_sb, s_st, s_sh, scale, begin, end, HQ, G, C, parts, steps, overlap,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BB: tl.constexpr, MAXIMUM: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Store the scores of a tile of blocks for a tile of the queries ``begin .. end - 1``, of one key head.

    Block j overlaps the cells ``j * steps + 1 - overlap + i`` with ``i < parts``, the i-th one in
    ``min(i + 1, parts - i, steps, overlap)`` strides. Blocks after the last query's own are left out. A sum
    keeps the queries of a head on chip while it walks the cells; a maximum has to sum over the heads first.
    """
    H = HQ // G
    i_b = (tl.program_id(2) // H).to(tl.int64)
    i_h = (tl.program_id(2) % H).to(tl.int64)

    o_m = begin + tl.program_id(0) * BM + tl.arange(0, BM)
    o_b = tl.program_id(1) * BB + tl.arange(0, BB)
    m_m = o_m < end

    b_own = tl.load(own + i_b * s_jb + o_m, mask=m_m, other=-1)
    if tl.max(b_own, 0) >= tl.program_id(1) * BB:
        b_lo, b_hi, _ = load_intervals(lo + i_b * s_ib, hi + i_b * s_ib, lo, o_m, m_m, False)

        q += i_b * s_qb
        ck += i_b * s_kb + i_h * s_kh
        lse += i_b * s_lb

        b_score = tl.zeros([BM, BB], tl.float32)
        first = tl.min(b_lo, 0)
        while first < FAR:  # once for each document of the tile, nearly always one
            m_d = m_m & (b_lo == first)

            if MAXIMUM:
                for i in range(parts):
                    b_k, o_c = load_cells(ck, i, o_b, first, C, steps, overlap, s_kt, D, BD)
                    b_part = tl.zeros([BM, BB], tl.float32)
                    for i_g in range(G):
                        b_q, b_lse2 = load_query(
                            q, lse, i_h * G + i_g, o_m, m_d, s_qt, s_qh, s_lt, s_lh, D, BD
                        )
                        b_part += probability(b_q, b_lse2, b_k, o_c, b_hi, m_d, scale, UPCAST)
                    b_score = tl.maximum(b_score, b_part)
            else:
                for i_g in range(G):
                    b_q, b_lse2 = load_query(q, lse, i_h * G + i_g, o_m, m_d, s_qt, s_qh, s_lt, s_lh, D, BD)
                    for i in range(parts):
                        b_k, o_c = load_cells(ck, i, o_b, first, C, steps, overlap, s_kt, D, BD)
                        weight = tl.minimum(tl.minimum(i + 1, parts - i), tl.minimum(steps, overlap))
                        b_score += probability(b_q, b_lse2, b_k, o_c, b_hi, m_d, scale, UPCAST) * weight

            first = tl.min(tl.where(b_lo > first, b_lo, FAR), 0)

        p_score = score + i_b * s_sb + i_h * s_sh + (o_m - begin).to(tl.int64)[:, None] * s_st + o_b[None, :]
        tl.store(p_score, b_score, mask=m_m[:, None] & (o_b[None, :] <= b_own[:, None]))
