"""Forward kernel of interval attention: flash attention whose queries each see a run of keys, and sinks."""

from __future__ import annotations

from collections import namedtuple

import triton
import triton.language as tl

from nsa_convert.kernels.common.toolchain import Config, declare
from nsa_convert.kernels.common.triton_flash import (
    LOG2E,
    attend,
    head_rows,
    load_rows,
    new_softmax,
    softmax_divisor,
    softmax_lse,
    store_rows,
)

FAR = tl.constexpr(1 << 30)
"""Key slot that no query sees."""

TYPES = {
    **dict.fromkeys(("q", "k", "v", "o", "do", "dq", "dk", "dv"), "*T"),
    **dict.fromkeys(("lse", "dlse", "delta"), "*fp32"),
    **dict.fromkeys(("lo", "hi", "first", "bounds"), "*i32"),
    **dict.fromkeys(("TQ", "TK", "HQ", "G", "num_sinks", "num_bounds", "parts"), "i32"),
    **dict.fromkeys(("s_ib", "s_bb", "s_pb"), "i32"),
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


Sizes = namedtuple("Sizes", ("D", "BD", "BN", "HAS_SINKS", "UPCAST"))
"""Constants of a kernel over intervals: head dim, the same padded, keys of a step, and what it serves."""


Runs = namedtuple("Runs", ("lo", "hi", "first", "num_sinks"))
"""What the queries of a tile see: the keys ``[lo, hi)`` and ``[first, first + num_sinks)`` of each."""


Band = namedtuple("Band", ("sink", "sink_end", "begin", "full", "cut", "end"))
"""The keys that a tile of queries walks.

Every query sees all keys of ``[full, cut)``; no query sees a key outside of ``[begin, end)`` and of the
sinks before it, ``[sink, sink_end)``. ``begin``, ``full`` and ``cut`` differ by whole tiles of keys.
"""


@triton.jit
def load_runs(lo, hi, first, o_m, m_m, num_sinks, HAS_SINKS: tl.constexpr):
    """Return the :class:`Runs` of the queries ``o_m``; those outside of the call see nothing."""
    b_lo = tl.load(lo + o_m, mask=m_m, other=FAR)
    b_hi = tl.load(hi + o_m, mask=m_m, other=0)
    b_first = tl.load(first + o_m, mask=m_m, other=FAR) if HAS_SINKS else b_lo
    return Runs(b_lo, b_hi, b_first, num_sinks)


@triton.jit
def sees(o_n, m_n, runs, HAS_SINKS: tl.constexpr):
    """Return which keys ``o_n`` of a partial tile each query sees, ``[M, N]``; ``m_n`` are those in it."""
    m = o_n[None, :] >= runs.lo[:, None]
    if HAS_SINKS:
        b_first = runs.first[:, None]
        m = m | ((o_n[None, :] >= b_first) & (o_n[None, :] < b_first + runs.num_sinks))
        m = m & m_n[None, :]  # without sinks a partial tile ends where the runs do
    return m & (o_n[None, :] < runs.hi[:, None])


@triton.jit
def key_band(runs, m_m, BN: tl.constexpr, HAS_SINKS: tl.constexpr):
    """Return the :class:`Band` of a tile of queries; BN keys are a tile of keys."""
    begin = tl.min(runs.lo, 0)
    end = tl.maximum(begin, tl.max(runs.hi, 0))

    # Every query's run has begun at the largest lo, rounded up to a whole tile ...
    latest = tl.minimum(tl.max(tl.where(m_m, runs.lo, 0), 0), end)
    full = begin + tl.cdiv(latest - begin, BN) * BN

    # ... and none has ended before the smallest hi, rounded down.
    seen_by_all = tl.min(tl.where(m_m, runs.hi, FAR), 0)
    cut = full + tl.maximum(seen_by_all - full, 0) // BN * BN

    # Only the document of the first query can have sinks before the band.
    sink = begin
    sink_end = begin
    if HAS_SINKS:
        sink = tl.min(runs.first, 0)
        sink_end = tl.maximum(sink, tl.minimum(sink + runs.num_sinks, begin))
    return Band(sink, sink_end, begin, full, cut, end)


@triton.jit
def partial_tiles(band, BN: tl.constexpr):
    """Return how many tiles of keys need a mask: sinks, the left and the right edge of the band."""
    sinks = tl.cdiv(band.sink_end - band.sink, BN)
    return sinks + (band.full - band.begin) // BN + tl.cdiv(tl.maximum(band.end - band.cut, 0), BN)


@triton.jit
def partial_tile(i, band, BN: tl.constexpr):
    """Return the first key of the i-th tile that needs a mask, and where its keys end."""
    sinks = tl.cdiv(band.sink_end - band.sink, BN)
    edge = sinks + (band.full - band.begin) // BN
    i_n = tl.where(i < edge, band.begin + (i - sinks) * BN, band.cut + (i - edge) * BN)
    return tl.where(i < sinks, band.sink + i * BN, i_n), tl.where(i < sinks, band.sink_end, band.end)


@triton.jit
def attend_step(state, b_q, k, v, i_n, end, runs, scale2, MASKED: tl.constexpr, S: tl.constexpr):
    """Add the keys ``i_n .. i_n + BN - 1`` (below ``end``) to a running softmax."""
    o_n = i_n + tl.arange(0, S.BN)
    m_n = o_n < end

    b_k = load_rows(k, o_n, m_n, S.D, S.BD, MASKED)
    b_v = load_rows(v, o_n, m_n, S.D, S.BD, MASKED)
    visible = sees(o_n, m_n, runs, S.HAS_SINKS) if MASKED else None
    return attend(state, b_q, b_k, b_v, visible, scale2, MASKED, MASKED, S.UPCAST)


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
    q, k, v, o, lse, lo, hi, first, s_q, s_k, s_v, s_o, s_l, s_ib, scale, num_sinks, TQ, HQ, G,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, HAS_SINKS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Store o and lse of a tile of queries of one head."""
    S: tl.constexpr = Sizes(D, BD, BN, HAS_SINKS, UPCAST)

    # The last tiles see the most keys: they start first.
    i_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    i_b = (tl.program_id(1) // HQ).to(tl.int64)
    i_h = (tl.program_id(1) % HQ).to(tl.int64)

    o_m = i_m + tl.arange(0, BM)
    m_m = o_m < TQ

    k = head_rows(k, s_k, i_b, i_h // G)
    v = head_rows(v, s_v, i_b, i_h // G)

    # Which keys the tile walks
    o_i = i_b * s_ib
    runs = load_runs(lo + o_i, hi + o_i, first + o_i, o_m, m_m, num_sinks, HAS_SINKS)
    band = key_band(runs, m_m, BN, HAS_SINKS)

    b_q = load_rows(head_rows(q, s_q, i_b, i_h), o_m, m_m, D, BD, True)
    scale2 = scale * LOG2E
    state = new_softmax(BM, BD)

    # Tiles of keys that need a mask, then those that every query sees
    for i in range(partial_tiles(band, BN)):
        i_n, stop = partial_tile(i, band, BN)
        state = attend_step(state, b_q, k, v, i_n, stop, runs, scale2, True, S)
    for i_n in range(band.full, band.cut, BN):
        state = attend_step(state, b_q, k, v, i_n, band.end, runs, scale2, False, S)

    p_lse = lse + i_b * s_l[0] + i_h * s_l[2] + o_m.to(tl.int64) * s_l[1]
    tl.store(p_lse, softmax_lse(state.top, state.total), mask=m_m)

    b_o = state.sums / softmax_divisor(state.total)[:, None]
    store_rows(head_rows(o, s_o, i_b, i_h), o_m, m_m, b_o, D, BD)
