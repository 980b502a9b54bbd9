"""Kernels that score blocks by the attention their compressed cells get, without storing scores of cells."""

from __future__ import annotations

import triton
import triton.language as tl

from nsa_convert.kernels.common.toolchain import Config, declare
from nsa_convert.kernels.common.triton_flash import LOG2E, dot, head_rows, load_rows, softmax_lse, weigh
from nsa_convert.kernels.interval.triton_forward import (
    FAR,
    Sizes,
    key_band,
    load_runs,
    partial_tile,
    partial_tiles,
    sees,
)

TYPES = {
    **dict.fromkeys(("q", "ck"), "*T"),
    **dict.fromkeys(("lse", "score"), "*fp32"),
    **dict.fromkeys(("lo", "hi", "own"), "*i32"),
    **dict.fromkeys(("TQ", "HQ", "G", "begin", "end", "C", "parts", "steps", "overlap"), "i32"),
    **dict.fromkeys(("s_ib", "s_jb"), "i32"),
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
def lse_step(top, total, b_q, ck, i_n, end, runs, scale2, MASKED: tl.constexpr, S: tl.constexpr):
    """Add the cells ``i_n .. i_n + BN - 1`` (below ``end``) to a running sum of exponentials."""
    o_n = i_n + tl.arange(0, S.BN)
    m_n = o_n < end
    b_k = load_rows(ck, o_n, m_n, S.D, S.BD, MASKED)

    b_s = dot(b_q, tl.trans(b_k), S.UPCAST) * scale2  # [BM, BN]
    if MASKED:
        b_s = tl.where(sees(o_n, m_n, runs, False), b_s, float("-inf"))
    top, total, _, _ = weigh(top, total, b_s, 1, MASKED)
    return top, total


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
    q, ck, lse, lo, hi, s_q, s_k, s_l, s_ib, scale, TQ, HQ, G,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Store the lse of a tile of queries of one head over the cells they see."""
    S: tl.constexpr = Sizes(D, BD, BN, False, UPCAST)

    i_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    i_b = (tl.program_id(1) // HQ).to(tl.int64)
    i_h = (tl.program_id(1) % HQ).to(tl.int64)

    o_m = i_m + tl.arange(0, BM)
    m_m = o_m < TQ

    ck = head_rows(ck, s_k, i_b, i_h // G)

    runs = load_runs(lo + i_b * s_ib, hi + i_b * s_ib, lo, o_m, m_m, 0, False)
    band = key_band(runs, m_m, BN, False)

    b_q = load_rows(head_rows(q, s_q, i_b, i_h), o_m, m_m, D, BD, True)
    scale2 = scale * LOG2E
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)

    for i in range(partial_tiles(band, BN)):
        i_n, stop = partial_tile(i, band, BN)
        top, total = lse_step(top, total, b_q, ck, i_n, stop, runs, scale2, True, S)
    for i_n in range(band.full, band.cut, BN):
        top, total = lse_step(top, total, b_q, ck, i_n, band.end, runs, scale2, False, S)

    p_lse = lse + i_b * s_l[0] + i_h * s_l[2] + o_m.to(tl.int64) * s_l[1]
    tl.store(p_lse, softmax_lse(top, total), mask=m_m)


@triton.jit
def load_query(q, lse, o_m, m_m, D: tl.constexpr, BD: tl.constexpr):
    """Return rows of a query head and their lse in the log2 domain."""
    b_lse = tl.load(lse.first + o_m.to(tl.int64) * lse.step, mask=m_m, other=0.0)
    return load_rows(q, o_m, m_m, D, BD, True), b_lse * LOG2E


@triton.jit
def stride_weight(i, parts, steps, overlap):
    """Return in how many strides the i-th cell overlaps its block."""
    return tl.minimum(tl.minimum(i + 1, parts - i), tl.minimum(steps, overlap))


@triton.jit
def load_cells(ck, i, o_b, first, C, steps, overlap, D: tl.constexpr, BD: tl.constexpr):
    """Return the i-th cell that overlaps each block: its keys and its number, FAR before the document."""
    o_c = o_b * steps + (1 - overlap + i)
    b_k = load_rows(ck, first + o_c, (o_c >= 0) & (first + o_c < C), D, BD, True)
    return b_k, tl.where(o_c >= 0, first + o_c, FAR)


@triton.jit
def probability(b_q, b_lse2, b_k, o_c, b_hi, m_m, scale, UPCAST: tl.constexpr):
    """Return ``exp(s - lse) [BM, BB]``, 0 for cells a query does not see.

    A given lse may lie below a score: the exponent is bounded so that a group's sum stays finite.
    """
    b_s = dot(b_q, tl.trans(b_k), UPCAST) * (scale * LOG2E)
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
    q, ck, lse, score, lo, hi, own, s_q, s_k, s_l, s_ib, s_jb, s_s, scale, begin, end, HQ, G, C, parts, steps,
    overlap,
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

    ck = head_rows(ck, s_k, i_b, i_h)
    b_own = tl.load(own + i_b * s_jb + o_m, mask=m_m, other=-1)
    if tl.max(b_own, 0) >= tl.program_id(1) * BB:
        runs = load_runs(lo + i_b * s_ib, hi + i_b * s_ib, lo, o_m, m_m, 0, False)

        b_score = tl.zeros([BM, BB], tl.float32)
        first = tl.min(runs.lo, 0)
        while first < FAR:  # once for each document of the tile, nearly always one
            m_d = m_m & (runs.lo == first)

            if MAXIMUM:
                for i in range(parts):
                    b_k, o_c = load_cells(ck, i, o_b, first, C, steps, overlap, D, BD)
                    b_part = tl.zeros([BM, BB], tl.float32)
                    for i_g in range(G):
                        i_q = i_h * G + i_g
                        rows = head_rows(q, s_q, i_b, i_q)
                        b_q, b_lse2 = load_query(rows, head_rows(lse, s_l, i_b, i_q), o_m, m_d, D, BD)
                        b_part += probability(b_q, b_lse2, b_k, o_c, runs.hi, m_d, scale, UPCAST)
                    b_score = tl.maximum(b_score, b_part)
            else:
                for i_g in range(G):
                    i_q = i_h * G + i_g
                    rows = head_rows(q, s_q, i_b, i_q)
                    b_q, b_lse2 = load_query(rows, head_rows(lse, s_l, i_b, i_q), o_m, m_d, D, BD)
                    for i in range(parts):
                        b_k, o_c = load_cells(ck, i, o_b, first, C, steps, overlap, D, BD)
                        b_p = probability(b_q, b_lse2, b_k, o_c, runs.hi, m_d, scale, UPCAST)
                        b_score += b_p * stride_weight(i, parts, steps, overlap)

            first = tl.min(tl.where(runs.lo > first, runs.lo, FAR), 0)

        o_t = (o_m - begin).to(tl.int64)
        p_score = score + i_b * s_s[0] + i_h * s_s[2] + o_t[:, None] * s_s[1] + o_b[None, :]
        tl.store(p_score, b_score, mask=m_m[:, None] & (o_b[None, :] <= b_own[:, None]))
