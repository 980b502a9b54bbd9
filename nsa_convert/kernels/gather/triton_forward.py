"""Attention query by query: each program fetches the keys of one query, for decoding and for lists of tokens.

The operands are swapped: keys are the rows of the matrix products, and the query heads that share them are
the columns. A matrix instruction needs 16 rows but only 8 columns, so small groups waste less of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa_convert.kernels.common.toolchain import Config, declare, dot
from nsa_convert.kernels.interval.triton_forward import load_rows

TYPES = {
    **dict.fromkeys(("q", "k", "v", "o", "do", "dq"), "*T"),
    **dict.fromkeys(("lse", "delta", "part", "part_lse"), "*fp32"),
    **dict.fromkeys(("items", "list_of", "lo", "hi", "first"), "*i32"),
    **dict.fromkeys(
        ("TQ", "HQ", "G", "lists", "size", "block_size", "query_block", "num_sinks", "splits"), "i32"
    ),
    "scale": "fp32",
}

LIST = {"LISTED": True, "MAPPED": False, "HAS_SINKS": False, "UPCAST": False}
RUN = {"LISTED": False, "MAPPED": False, "HAS_SINKS": True, "UPCAST": False}
SHAPES = (
    {"D": 128, "BD": 128, "GROUP": 4, "GN": 8},
    {"D": 80, "BD": 128, "GROUP": 1, "GN": 8, "dtype": "fp16"},
    {"D": 256, "BD": 256, "GROUP": 4, "GN": 8, "row": 512},
    {"D": 64, "BD": 64, "GROUP": 7, "GN": 8, "row": 128},
    {"D": 128, "BD": 128, "GROUP": 16, "GN": 16},
    {"D": 128, "BD": 128, "GROUP": 4, "GN": 8, "row": 512, "dtype": "fp32"},
    {"D": 256, "BD": 256, "GROUP": 4, "GN": 8, "row": 1024, "dtype": "fp32"},
)


@triton.jit
def part_of(length, i_s, splits, BK: tl.constexpr):
    """Return the bounds of the i-th of ``splits`` parts of a list; parts are whole tiles of BK keys."""
    size = tl.cdiv(tl.cdiv(length, BK), splits) * BK
    return tl.minimum(i_s * size, length), tl.minimum((i_s + 1) * size, length)


@triton.jit
def run_length(lo, hi, first, num_sinks, HAS_SINKS: tl.constexpr):
    """Return how many sinks lie before a run of keys, and how many keys a query sees in all."""
    sinks = 0
    if HAS_SINKS:
        sinks = tl.maximum(tl.minimum(tl.minimum(first + num_sinks, lo), hi) - first, 0)
    return sinks, sinks + tl.maximum(hi - lo, 0)


@triton.jit
def key_slots(
    o_x, end, items, size, block_size, sinks, lo, hi, first, LISTED: tl.constexpr, HAS_SINKS: tl.constexpr
):  # fmt: skip
    """Return the slots of the entries ``o_x [BK]`` of a query's list, and which of them it sees."""
    m_x = o_x < end
    if LISTED:
        b_item = tl.load(items + o_x // block_size, mask=m_x, other=-1).to(tl.int32)
        o_n = lo + b_item * block_size + o_x % block_size
        # Numbers past the end may overflow: compare the block number, too.
        m_x = m_x & (b_item >= 0) & (b_item <= (hi - lo) // block_size) & (o_n < hi)
    elif HAS_SINKS:
        o_n = tl.where(o_x < sinks, first + o_x, lo + o_x - sinks)
    else:
        o_n = lo + o_x
    return tl.where(m_x, o_n, 0), m_x


@triton.jit
def list_pointer(items, list_of, i_b, i_l, i_t, lists, query_block, s_nb, s_nh, s_nt, MAPPED: tl.constexpr):
    """Return a pointer to the list of a query; ``lists`` counts the heads that have lists, at least 1."""
    row = tl.load(list_of + i_t) if MAPPED else i_t // query_block
    return items + i_b * s_nb + (i_l % lists) * s_nh + row.to(tl.int64) * s_nt


@declare(
    types=TYPES,
    configs=(
        Config(sizes={"BK": 64}, num_warps=4, num_stages=2, max_row=256),
        Config(sizes={"BK": 64}, num_warps=4, num_stages=3, max_row=256),
        Config(sizes={"BK": 32}, num_warps=4, num_stages=2, min_row=256, max_row=512),
        Config(sizes={"BK": 16}, num_warps=4, num_stages=1, min_row=512),
    ),
    key=("D", "GN", "LISTED"),
    cases=(
        *({**shape, **LIST, "VALUES": True} for shape in SHAPES),
        {**SHAPES[0], **LIST, "MAPPED": True, "VALUES": True},
        *({**shape, **RUN, "VALUES": True} for shape in SHAPES[:2]),
        *({**shape, **RUN, "HAS_SINKS": False, "VALUES": False} for shape in (SHAPES[0], SHAPES[2])),
    ),
)
def gather_forward(
    q, k, v, o, lse, items, list_of, lo, hi, first,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_ob, s_ot, s_oh, s_os, s_lb, s_lt, s_lh, s_ls,
    s_nb, s_nh, s_nt, s_ib,
    scale, num_sinks, HQ, G, lists, size, block_size, query_block, splits,
    D: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, GN: tl.constexpr,
    LISTED: tl.constexpr, MAPPED: tl.constexpr, HAS_SINKS: tl.constexpr, VALUES: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Store o and lse of one part of the keys of one query, for the GROUP heads that share them."""
    i_t = tl.program_id(0) // splits
    i_s = tl.program_id(0) % splits
    i_b = (tl.program_id(1) // (HQ // GROUP)).to(tl.int64)
    i_l = (tl.program_id(1) % (HQ // GROUP)).to(tl.int64)

    lo = tl.load(lo + i_b * s_ib + i_t)
    hi = tl.load(hi + i_b * s_ib + i_t)

    # How many keys the query lists or sees, and the part of them that this program takes
    sinks = 0
    if LISTED:
        items = list_pointer(items, list_of, i_b, i_l, i_t, lists, query_block, s_nb, s_nh, s_nt, MAPPED)
        length = size * block_size
    else:
        first = tl.load(first + i_b * s_ib + i_t)
        sinks, length = run_length(lo, hi, first, num_sinks, HAS_SINKS)
    begin, end = part_of(length, i_s, splits, BK)

    # The heads of the group, and the head that holds their keys
    o_h = i_l * GROUP + tl.arange(0, GN)
    m_h = tl.arange(0, GN) < GROUP
    k += i_b * s_kb + i_l * GROUP // G * s_kh
    v += i_b * s_vb + i_l * GROUP // G * s_vh

    i_t = i_t.to(tl.int64)
    b_q = load_rows(q + i_b * s_qb + i_t * s_qt, o_h, s_qh, m_h, D, BD, True)  # [GN, BD]

    scale2 = scale * 1.4426950408889634
    b_m = tl.full([GN], float("-inf"), tl.float32)
    b_l = tl.zeros([GN], tl.float32)
    b_o = tl.zeros([BD, GN], tl.float32)

    for i_x in range(begin, end, BK):
        o_n, m_n = key_slots(
            i_x + tl.arange(0, BK), end, items, size, block_size, sinks, lo, hi, first, LISTED, HAS_SINKS
        )

        b_k = load_rows(k, o_n, s_kt, m_n, D, BD, True)
        b_s = dot(b_k, tl.trans(b_q), UPCAST) * scale2  # [BK, GN]
        b_s = tl.where(m_n[:, None], b_s, float("-inf"))

        # Online softmax; the reductions run over the rows of b_s, which are keys here.
        b_max = tl.maximum(b_m, tl.max(b_s, 0))
        safe = tl.where(b_max == float("-inf"), 0.0, b_max)
        b_p = tl.exp2(b_s - safe[None, :])
        shrink = tl.exp2(b_m - safe)
        b_l = b_l * shrink + tl.sum(b_p, 0)

        if VALUES:
            b_v = load_rows(v, o_n, s_vt, m_n, D, BD, True)
            b_o = b_o * shrink[None, :] + dot(tl.trans(b_v), b_p.to(b_v.dtype), UPCAST)

        b_m = b_max

    # A query without keys in this part gets o = 0 and lse = -inf.
    blind = b_l == 0
    b_lse = tl.where(blind, float("-inf"), (b_m + tl.log2(b_l)) * 0.6931471805599453)
    tl.store(lse + i_b * s_lb + i_t * s_lt + i_s * s_ls + o_h * s_lh, b_lse, mask=m_h)

    if VALUES:
        b_o = b_o / tl.where(blind, 1.0, b_l)[None, :]
        o_d = tl.arange(0, BD)
        p_o = o + i_b * s_ob + i_t * s_ot + i_s * s_os + o_h[None, :] * s_oh + o_d[:, None]
        tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_h[None, :] & (o_d < D)[:, None])


@declare(
    types=TYPES,
    configs=(Config(),),
    cases=tuple(
        {"D": d, "BD": bd, "PARTS": parts, "VALUES": values}
        for d, bd, parts, values in (
            (128, 128, 16, True), (80, 128, 4, True), (256, 256, 64, True), (64, 64, 2, False)
        )
    ),
)  # fmt: skip
def merge_parts(
    part, part_lse, o, lse, s_pb, s_pt, s_ph, s_ps, s_eb, s_et, s_eh, s_es, s_ob, s_ot, s_oh,
    s_lb, s_lt, s_lh, HQ, splits, D: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr,
    VALUES: tl.constexpr,
):  # fmt: skip
    """Join the parts of the keys of one query and head, in a fixed order."""
    i_t = tl.program_id(0).to(tl.int64)
    i_b = (tl.program_id(1) // HQ).to(tl.int64)
    i_h = (tl.program_id(1) % HQ).to(tl.int64)

    o_s = tl.arange(0, PARTS)
    m_s = o_s < splits
    p_e = part_lse + i_b * s_eb + i_t * s_et + i_h * s_eh + o_s * s_es
    b_e = tl.load(p_e, mask=m_s, other=float("-inf"))

    # Weight of each part, exp(lse_i - top); divided by their total it is its share of the softmax.
    top = tl.max(b_e, 0)
    b_w = tl.exp2((b_e - tl.where(top == float("-inf"), 0.0, top)) * 1.4426950408889634)
    total = tl.sum(b_w, 0)
    b_lse = tl.where(total == 0, float("-inf"), top + tl.log2(total) * 0.6931471805599453)
    tl.store(lse + i_b * s_lb + i_t * s_lt + i_h * s_lh, b_lse)

    if VALUES:
        o_d = tl.arange(0, BD)
        b_p = load_rows(part + i_b * s_pb + i_t * s_pt + i_h * s_ph, o_s, s_ps, m_s, D, BD, True)
        b_o = tl.sum(b_p * (b_w / tl.where(total == 0, 1.0, total))[:, None], 0)
        p_o = o + i_b * s_ob + i_t * s_ot + i_h * s_oh + o_d
        tl.store(p_o, b_o.to(o.dtype.element_ty), mask=o_d < D)
