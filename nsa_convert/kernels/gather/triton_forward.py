"""Attention query by query: each program fetches the keys of one query, for decoding and for lists of tokens.

The operands are swapped: keys are the rows of the matrix products, and the query heads that share them are
the columns. A matrix instruction needs 16 rows but only 8 columns, so small groups waste less of it.
"""

from __future__ import annotations

from collections import namedtuple

import triton
import triton.language as tl

from nsa_convert.kernels.common.toolchain import Config, declare
from nsa_convert.kernels.common.triton_flash import (
    LN2,
    LOG2E,
    Rows,
    dot,
    head_rows,
    load_rows,
    softmax_divisor,
    softmax_lse,
    token_rows,
    weigh,
)

TYPES = {
    **dict.fromkeys(("q", "k", "v", "o", "do", "dq"), "*T"),
    **dict.fromkeys(("lse", "delta", "part", "part_lse"), "*fp32"),
    **dict.fromkeys(("items", "list_of", "lo", "hi", "first"), "*i32"),
    **dict.fromkeys(
        ("TQ", "HQ", "G", "lists", "size", "block_size", "query_block", "num_sinks", "splits"), "i32"
    ),
    **dict.fromkeys(("s_ib", "s_os", "s_ls", "s_ps", "s_es"), "i32"),
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


Listed = namedtuple("Listed", ("items", "size", "block_size"))
"""The list of a query: a pointer to it, its length and the keys of a block."""


Run = namedtuple("Run", ("lo", "hi", "first", "sinks"))
"""What a query may see: the keys ``[lo, hi)``, and before them ``sinks`` keys from ``first`` on."""


@triton.jit
def load_run(lo, hi, first, num_sinks, HAS_SINKS: tl.constexpr):
    """Return the :class:`Run` of a query, and how many keys it has."""
    i_lo = tl.load(lo)
    i_hi = tl.load(hi)
    i_first = tl.load(first)
    sinks = 0
    if HAS_SINKS:
        sinks = tl.maximum(tl.minimum(tl.minimum(i_first + num_sinks, i_lo), i_hi) - i_first, 0)
    return Run(i_lo, i_hi, i_first, sinks), sinks + tl.maximum(i_hi - i_lo, 0)


@triton.jit
def key_slots(o_x, end, run, listed, LISTED: tl.constexpr, HAS_SINKS: tl.constexpr):
    """Return the slots of the entries ``o_x [BK]`` of a query's list or run, and which of them it sees."""
    m_x = o_x < end
    if LISTED:
        size = listed.block_size
        b_item = tl.load(listed.items + o_x // size, mask=m_x, other=-1).to(tl.int32)
        o_n = run.lo + b_item * size + o_x % size
        # Numbers past the end may overflow: compare the block number, too.
        m_x = m_x & (b_item >= 0) & (b_item <= (run.hi - run.lo) // size) & (o_n < run.hi)
    elif HAS_SINKS:
        o_n = tl.where(o_x < run.sinks, run.first + o_x, run.lo + o_x - run.sinks)
    else:
        o_n = run.lo + o_x
    return tl.where(m_x, o_n, 0), m_x


@triton.jit
def list_pointer(items, s_n, list_of, i_b, i_l, i_t, lists, query_block, MAPPED: tl.constexpr):
    """Return a pointer to the list of a query; ``lists`` counts the heads that have lists, at least 1."""
    row = tl.load(list_of + i_t) if MAPPED else i_t // query_block
    return items + i_b * s_n[0] + (i_l % lists) * s_n[2] + row.to(tl.int64) * s_n[1]


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
    q, k, v, o, lse, items, list_of, lo, hi, first, s_q, s_k, s_v, s_o, s_os, s_l, s_ls, s_n, s_ib,
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

    # How many keys the query lists or sees, and the part of them that this program takes
    o_i = i_b * s_ib + i_t
    run, length = load_run(lo + o_i, hi + o_i, first + o_i, num_sinks, HAS_SINKS)
    listed = Listed(items, size, block_size)
    if LISTED:
        items = list_pointer(items, s_n, list_of, i_b, i_l, i_t, lists, query_block, MAPPED)
        listed = Listed(items, size, block_size)
        length = size * block_size
    begin, end = part_of(length, i_s, splits, BK)

    # The heads of the group, and the head that holds their keys
    o_h = i_l * GROUP + tl.arange(0, GN)
    m_h = tl.arange(0, GN) < GROUP
    k = head_rows(k, s_k, i_b, i_l * GROUP // G)
    v = head_rows(v, s_v, i_b, i_l * GROUP // G)

    i_t = i_t.to(tl.int64)
    b_q = load_rows(token_rows(q, s_q, i_b, i_t), o_h, m_h, D, BD, True)  # [GN, BD]

    scale2 = scale * LOG2E
    b_m = tl.full([GN], float("-inf"), tl.float32)
    b_l = tl.zeros([GN], tl.float32)
    b_o = tl.zeros([BD, GN], tl.float32)

    for i_x in range(begin, end, BK):
        o_n, m_n = key_slots(i_x + tl.arange(0, BK), end, run, listed, LISTED, HAS_SINKS)

        b_k = load_rows(k, o_n, m_n, D, BD, True)
        b_s = dot(b_k, tl.trans(b_q), UPCAST) * scale2  # [BK, GN]
        b_s = tl.where(m_n[:, None], b_s, float("-inf"))
        b_m, b_l, b_p, shrink = weigh(b_m, b_l, b_s, 0, True)

        if VALUES:
            b_v = load_rows(v, o_n, m_n, D, BD, True)
            b_o = b_o * shrink[None, :] + dot(tl.trans(b_v), b_p.to(b_v.dtype), UPCAST)

    p_lse = lse + i_b * s_l[0] + i_t * s_l[1] + i_s * s_ls + o_h * s_l[2]
    tl.store(p_lse, softmax_lse(b_m, b_l), mask=m_h)

    if VALUES:
        o_d = tl.arange(0, BD)
        p_o = o + i_b * s_o[0] + i_t * s_o[1] + i_s * s_os + o_h[None, :] * s_o[2] + o_d[:, None]
        b_o = (b_o / softmax_divisor(b_l)[None, :]).to(o.dtype.element_ty)
        tl.store(p_o, b_o, mask=m_h[None, :] & (o_d < D)[:, None])


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
    part, part_lse, o, lse, s_p, s_ps, s_e, s_es, s_o, s_l, HQ, splits,
    D: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Join the parts of the keys of one query and head, in a fixed order."""
    i_t = tl.program_id(0).to(tl.int64)
    i_b = (tl.program_id(1) // HQ).to(tl.int64)
    i_h = (tl.program_id(1) % HQ).to(tl.int64)

    o_s = tl.arange(0, PARTS)
    m_s = o_s < splits
    p_e = part_lse + i_b * s_e[0] + i_t * s_e[1] + i_h * s_e[2] + o_s * s_es
    b_e = tl.load(p_e, mask=m_s, other=float("-inf"))

    # Weight of each part, exp(lse_i - top); divided by their total it is its share of the softmax.
    top = tl.max(b_e, 0)
    b_w = tl.exp2((b_e - tl.where(top == float("-inf"), 0.0, top)) * LOG2E)
    total = tl.sum(b_w, 0)
    b_lse = tl.where(total == 0, float("-inf"), top + tl.log2(total) * LN2)
    tl.store(lse + i_b * s_l[0] + i_t * s_l[1] + i_h * s_l[2], b_lse)

    if VALUES:
        o_d = tl.arange(0, BD)
        rows = Rows(part + i_b * s_p[0] + i_t * s_p[1] + i_h * s_p[2], s_ps)
        b_p = load_rows(rows, o_s, m_s, D, BD, True)
        b_o = tl.sum(b_p * (b_w / tl.where(total == 0, 1.0, total))[:, None], 0)
        p_o = o + i_b * s_o[0] + i_t * s_o[1] + i_h * s_o[2] + o_d
        tl.store(p_o, b_o.to(o.dtype.element_ty), mask=o_d < D)
