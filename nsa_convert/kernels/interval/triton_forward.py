"""Forward kernel of interval attention: flash attention whose queries each see a run of keys, and sinks."""

from __future__ import annotations

import triton
import triton.language as tl

from nsa_convert.kernels.common.toolchain import Config, declare, dot, finite, finite_rows

FAR = tl.constexpr(1 << 30)
"""Key slot that no query sees."""

TYPES = {
    **dict.fromkeys(("q", "k", "v", "o", "do", "dq", "dk", "dv"), "*T"),
    **dict.fromkeys(("lse", "dlse", "delta"), "*fp32"),
    **dict.fromkeys(("lo", "hi", "first", "bounds"), "*i32"),
    **dict.fromkeys(("TQ", "TK", "HQ", "G", "num_sinks", "num_bounds", "parts"), "i32"),
    "scale": "fp32",
}
"""Types of the arguments of all interval kernels."""

CASES = (
    {"D": 128, "BD": 128, "HAS_SINKS": False, "UPCAST": False},
    {"D": 80, "BD": 128, "HAS_SINKS": True, "UPCAST": False, "dtype": "fp16"},
    {"D": 64, "BD": 64, "HAS_SINKS": False, "UPCAST": False, "row": 128},
    {"D": 96, "BD": 128, "HAS_SINKS": False, "UPCAST": False},
    {"D": 256, "BD": 256, "HAS_SINKS": False, "UPCAST": False, "row": 512},
    {"D": 128, "BD": 128, "HAS_SINKS": False, "UPCAST": False, "row": 512, "dtype": "fp32"},
    {"D": 256, "BD": 256, "HAS_SINKS": False, "UPCAST": False, "row": 1024, "dtype": "fp32"},
)
"""Shapes that the ahead-of-time test compiles."""


@triton.jit
def load_rows(p, o_t, s_t, m_t, D: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr):
    """Load rows ``o_t [N]`` of a ``[T, D]`` matrix into ``[N, BD]``; 0 where masked and beyond D."""
    o_d = tl.arange(0, BD)
    p_rows = p + o_t.to(tl.int64)[:, None] * s_t + o_d[None, :]

    if MASKED:
        rows = tl.load(p_rows, mask=m_t[:, None] & (o_d < D)[None, :], other=0.0)
    elif D == BD:
        rows = tl.load(p_rows)
    else:
        rows = tl.load(p_rows, mask=(o_d < D)[None, :], other=0.0)
    return rows


@triton.jit
def sees(o_n, b_lo, b_hi, b_first, num_sinks, HAS_SINKS: tl.constexpr):
    """Return which of the keys ``o_n`` each query sees; the arguments broadcast."""
    m = o_n >= b_lo
    if HAS_SINKS:
        m = m | ((o_n >= b_first) & (o_n < b_first + num_sinks))
    return m & (o_n < b_hi)


@triton.jit
def load_intervals(lo, hi, first, o_m, m_m, HAS_SINKS: tl.constexpr):
    """Return lo, hi and first of the queries; queries outside of the call see nothing."""
    b_lo = tl.load(lo + o_m, mask=m_m, other=FAR)
    b_hi = tl.load(hi + o_m, mask=m_m, other=0)
    b_first = tl.load(first + o_m, mask=m_m, other=FAR) if HAS_SINKS else b_lo
    return b_lo, b_hi, b_first


@triton.jit
def tile_range(b_lo, b_hi, m_m, BN: tl.constexpr):
    """Return the bounds ``(begin, full, cut, end)`` of the keys of a tile of queries.

    Every query sees all keys of ``[full, cut)``; sinks apart, no query sees a key outside ``[begin, end)``.
    The first three differ by whole tiles of BN keys.
    """
    begin = tl.min(b_lo, 0)
    end = tl.maximum(begin, tl.max(b_hi, 0))

    # Every query's run has begun at the largest lo, rounded up to a whole tile ...
    latest = tl.minimum(tl.max(tl.where(m_m, b_lo, 0), 0), end)
    full = begin + tl.cdiv(latest - begin, BN) * BN

    # ... and none has ended before the smallest hi, rounded down.
    seen_by_all = tl.min(tl.where(m_m, b_hi, FAR), 0)
    cut = full + tl.maximum(seen_by_all - full, 0) // BN * BN
    return begin, full, cut, end


@triton.jit
def sink_range(b_first, num_sinks, begin, HAS_SINKS: tl.constexpr):
    """Return the sinks before the band of a tile; only the document of its first query can have any."""
    if HAS_SINKS:
        sink = tl.min(b_first, 0)
        sink_end = tl.maximum(sink, tl.minimum(sink + num_sinks, begin))
    else:
        sink = begin
        sink_end = begin
    return sink, sink_end


@triton.jit
def partial_tiles(sink, sink_end, begin, full, cut, end, BN: tl.constexpr):
    """Return how many tiles of keys need a mask: sinks, the left and the right edge of the band."""
    return tl.cdiv(sink_end - sink, BN) + (full - begin) // BN + tl.cdiv(tl.maximum(end - cut, 0), BN)


@triton.jit
def partial_tile(i, sink, sink_end, begin, full, cut, end, BN: tl.constexpr):
    """Return the first key of the i-th tile that needs a mask, and where its keys end."""
    sinks = tl.cdiv(sink_end - sink, BN)
    edge = sinks + (full - begin) // BN
    i_n = tl.where(i < edge, begin + (i - sinks) * BN, cut + (i - edge) * BN)
    return tl.where(i < sinks, sink + i * BN, i_n), tl.where(i < sinks, sink_end, end)


@triton.jit
def attend_step(
    b_q, b_m, b_l, b_o, k, v, i_n, end, b_lo, b_hi, b_first, num_sinks, s_kt, s_vt, scale2,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, HAS_SINKS: tl.constexpr, MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Add the keys ``i_n .. i_n + BN - 1`` (below ``end``) to a running softmax."""
    o_n = i_n + tl.arange(0, BN)
    m_n = o_n < end

    b_k = load_rows(k, o_n, s_kt, m_n, D, BD, MASKED)
    b_v = load_rows(v, o_n, s_vt, m_n, D, BD, MASKED)

    b_s = dot(b_q, tl.trans(b_k), UPCAST) * scale2  # [BM, BN]

    if MASKED:
        m_s = sees(o_n[None, :], b_lo[:, None], b_hi[:, None], b_first[:, None], num_sinks, HAS_SINKS)
        m_s = m_s & m_n[None, :]
        # A value that is not finite must not reach the queries that do not see it: 0 * NaN is NaN.
        b_s = tl.where(finite_rows(b_v)[None, :], b_s, float("nan"))
        b_v = finite(b_v)
        b_s = tl.where(m_s, b_s, float("-inf"))

    # Rescale the running sums to the new maximum; -inf - -inf would be NaN in a row that saw no key yet.
    b_max = tl.maximum(b_m, tl.max(b_s, 1))
    safe = tl.where(b_max == float("-inf"), 0.0, b_max) if MASKED else b_max
    b_p = tl.exp2(b_s - safe[:, None])
    shrink = tl.exp2(b_m - safe)

    b_l = b_l * shrink + tl.sum(b_p, 1)
    b_o = b_o * shrink[:, None] + dot(b_p.to(b_v.dtype), b_v, UPCAST)
    return b_max, b_l, b_o


@declare(
    types=TYPES,
    configs=(
        Config(sizes={"BM": 64, "BN": 64}, num_warps=8, num_stages=2, max_row=256),
        Config(sizes={"BM": 128, "BN": 64}, num_warps=8, num_stages=3, max_row=256),
        Config(sizes={"BM": 64, "BN": 32}, num_warps=8, num_stages=2, min_row=256, max_row=512),
        Config(sizes={"BM": 32, "BN": 16}, num_warps=8, num_stages=1, min_row=512),
    ),
    key=("D", "HAS_SINKS"),
    cases=CASES,
)
def interval_forward(
    q, k, v, o, lse, lo, hi, first,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_ob, s_ot, s_oh, s_lb, s_lt, s_lh, s_ib,
    scale, num_sinks, TQ, HQ, G,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, HAS_SINKS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Store o and lse of a tile of queries of one head."""
    # The last tiles see the most keys: they start first.
    i_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    i_b = (tl.program_id(1) // HQ).to(tl.int64)
    i_h = (tl.program_id(1) % HQ).to(tl.int64)

    o_m = i_m + tl.arange(0, BM)
    m_m = o_m < TQ

    # The batch row and head of this program
    q += i_b * s_qb + i_h * s_qh
    k += i_b * s_kb + (i_h // G) * s_kh
    v += i_b * s_vb + (i_h // G) * s_vh

    # Which keys the tile walks
    b_lo, b_hi, b_first = load_intervals(
        lo + i_b * s_ib, hi + i_b * s_ib, first + i_b * s_ib, o_m, m_m, HAS_SINKS
    )
    begin, full, cut, end = tile_range(b_lo, b_hi, m_m, BN)
    sink, sink_end = sink_range(b_first, num_sinks, begin, HAS_SINKS)

    b_q = load_rows(q, o_m, s_qt, m_m, D, BD, True)
    scale2 = scale * 1.4426950408889634
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, BD], tl.float32)

    # Tiles of keys that need a mask, then those that every query sees
    for i in range(partial_tiles(sink, sink_end, begin, full, cut, end, BN)):
        i_n, stop = partial_tile(i, sink, sink_end, begin, full, cut, end, BN)
        b_m, b_l, b_o = attend_step(
            b_q, b_m, b_l, b_o, k, v, i_n, stop, b_lo, b_hi, b_first, num_sinks, s_kt, s_vt, scale2,
            D, BD, BN, HAS_SINKS, True, UPCAST,
        )  # fmt: skip
    for i_n in range(full, cut, BN):
        b_m, b_l, b_o = attend_step(
            b_q, b_m, b_l, b_o, k, v, i_n, end, b_lo, b_hi, b_first, num_sinks, s_kt, s_vt, scale2,
            D, BD, BN, HAS_SINKS, False, UPCAST,
        )  # fmt: skip

    # A query without keys gets o = 0 and lse = -inf.
    blind = b_l == 0
    b_o = b_o / tl.where(blind, 1.0, b_l)[:, None]
    b_lse = tl.where(blind, float("-inf"), (b_m + tl.log2(b_l)) * 0.6931471805599453)

    o_d = tl.arange(0, BD)
    p_o = o + i_b * s_ob + i_h * s_oh + o_m.to(tl.int64)[:, None] * s_ot + o_d[None, :]
    tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_m[:, None] & (o_d < D)[None, :])
    tl.store(lse + i_b * s_lb + i_h * s_lh + o_m.to(tl.int64) * s_lt, b_lse, mask=m_m)
