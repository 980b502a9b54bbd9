"""The exact choice of the best blocks by bisection on the bits of the scores, without sorting.

Non-negative floats are ordered like their bits, so 31 steps of counting find the S-th largest score of a row.
All blocks with a larger score are chosen, then the first ones with an equal score. A running count gives
each its place, so the list is written in ascending order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa_convert.kernels.common.toolchain import Config, declare

FORCED = tl.constexpr(0x7F800000)
"""Bits of infinity: no score is larger."""


@triton.jit
def load_sort_keys(score, b_own, i_n, m_q, s_st, num_sinks, num_locals, BQ: tl.constexpr, BN: tl.constexpr):
    """Return the sortable scores ``[BQ, BN]`` int32 of the blocks from ``i_n`` on: -1 after the own block."""
    o_n = i_n + tl.arange(0, BN)
    past = (o_n[None, :] <= b_own[:, None]) & m_q[:, None]

    p_score = score + tl.arange(0, BQ).to(tl.int64)[:, None] * s_st + o_n[None, :]
    b_key = tl.load(p_score, mask=past, other=0.0).to(tl.int32, bitcast=True)

    forced = (o_n[None, :] < num_sinks) | (o_n[None, :] > (b_own - num_locals)[:, None])
    # A query that sees a cell that is not finite gets any blocks, but valid ones.
    b_key = tl.where(forced, FORCED, tl.minimum(tl.maximum(b_key, 0), FORCED))
    return tl.where(past, b_key, -1)


@declare(
    types={
        "score": "*fp32",
        "own": "*i32",
        "indices": "*i32",
        **dict.fromkeys(
            ("begin", "end", "H", "size", "num_blocks", "num_sinks", "num_locals", "s_jb"), "i32"
        ),
    },
    # The row of these configurations is an eighth of the length of a piece.
    configs=(
        Config(sizes={"BQ": 16}, num_warps=4, max_row=32),
        Config(sizes={"BQ": 2}, num_warps=4),
        Config(sizes={"BQ": 1}, num_warps=1, max_row=128),
    ),
    key=("BN", "ONE_PIECE"),
    cases=(
        {"BN": 1024, "BS": 16, "ONE_PIECE": True, "row": 128},
        {"BN": 2048, "BS": 16, "ONE_PIECE": False, "row": 256},
        {"BN": 64, "BS": 16, "ONE_PIECE": True, "row": 8},
        {"BN": 2048, "BS": 64, "ONE_PIECE": True, "row": 256},
    ),
)
def best_blocks(
    score, own, indices, s_s, s_jb, s_o, begin, end, H, size, num_blocks, num_sinks, num_locals,
    BQ: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, ONE_PIECE: tl.constexpr,
):  # fmt: skip
    """Store the lists of BQ of the queries ``begin .. end - 1``: ascending, -1 at the end."""
    i_b = (tl.program_id(1) // H).to(tl.int64)
    i_h = (tl.program_id(1) % H).to(tl.int64)
    i_q = tl.program_id(0) * BQ

    o_q = begin + i_q + tl.arange(0, BQ)
    m_q = o_q < end
    b_own = tl.load(own + i_b * s_jb + o_q, mask=m_q, other=-1)

    score += i_b * s_s[0] + i_h * s_s[2] + i_q.to(tl.int64) * s_s[1]
    indices += i_b * s_o[0] + i_h * s_o[2]

    last = tl.minimum(tl.max(b_own, 0) + 1, num_blocks)

    if ONE_PIECE:
        b_key = load_sort_keys(score, b_own, 0, m_q, s_s[1], num_sinks, num_locals, BQ, BN)

    # The largest number that at least ``size`` keys reach is the key of the last one chosen.
    b_bar = tl.zeros([BQ], tl.int32)
    for i in range(31):
        b_try = b_bar | (1 << (30 - i))
        if ONE_PIECE:
            b_count = tl.sum((b_key >= b_try[:, None]).to(tl.int32), 1)
        else:
            b_count = tl.zeros([BQ], tl.int32)
            for i_n in range(0, last, BN):
                b_key = load_sort_keys(score, b_own, i_n, m_q, s_s[1], num_sinks, num_locals, BQ, BN)
                b_count += tl.sum((b_key >= b_try[:, None]).to(tl.int32), 1)
        b_bar = tl.where(b_count >= size, b_try, b_bar)

    # How many keys lie above it: the rest of the list is filled with its equals, first ones first.
    b_above = tl.zeros([BQ], tl.int32)
    for i_n in range(0, last, BN):
        if not ONE_PIECE:
            b_key = load_sort_keys(score, b_own, i_n, m_q, s_s[1], num_sinks, num_locals, BQ, BN)
        b_above += tl.sum((b_key > b_bar[:, None]).to(tl.int32), 1)

    b_equal = tl.zeros([BQ], tl.int32)
    b_taken = tl.zeros([BQ], tl.int32)
    for i_n in range(0, last, BN):
        if not ONE_PIECE:
            b_key = load_sort_keys(score, b_own, i_n, m_q, s_s[1], num_sinks, num_locals, BQ, BN)
        equal = b_key == b_bar[:, None]

        rank = b_equal[:, None] + tl.cumsum(equal.to(tl.int32), 1)
        chosen = (b_key > b_bar[:, None]) | (equal & (rank <= (size - b_above)[:, None]))

        place = b_taken[:, None] + tl.cumsum(chosen.to(tl.int32), 1) - 1
        o_n = (i_n + tl.arange(0, BN))[None, :] + tl.zeros([BQ, 1], tl.int32)
        p_out = indices + o_q.to(tl.int64)[:, None] * s_o[1] + place
        tl.store(p_out, o_n, mask=chosen & m_q[:, None])

        b_equal += tl.sum(equal.to(tl.int32), 1)
        b_taken += tl.sum(chosen.to(tl.int32), 1)

    # -1 at the end of short lists
    o_s = tl.arange(0, BS)
    empty = (o_s[None, :] >= b_taken[:, None]) & (o_s < size)[None, :] & m_q[:, None]
    p_out = indices + o_q.to(tl.int64)[:, None] * s_o[1] + o_s[None, :]
    tl.store(p_out, tl.full([BQ, BS], -1, tl.int32), mask=empty)
