"""Backward of attention to lists of tokens: dq from each query's keys, dk and dv from each key's readers."""

from __future__ import annotations

import triton.language as tl

from nsa_convert.kernels.common.toolchain import Config, declare
from nsa_convert.kernels.common.triton_flash import (
    LOG2E,
    Rows,
    dot,
    head_rows,
    load_rows,
    load_terms,
    probabilities,
    store_rows,
    token_rows,
)
from nsa_convert.kernels.gather.triton_forward import (
    LIST,
    SHAPES,
    TYPES,
    Listed,
    key_slots,
    list_pointer,
    load_run,
)

CHUNK = 512
"""Queries of one key that one program adds up."""

TYPES = {
    **TYPES,
    **dict.fromkeys(("dk", "dv"), "*T"),
    "parts": "*fp32",
    **dict.fromkeys(("entries", "offsets", "last_chunk", "key_of"), "*i32"),
    **dict.fromkeys(("TK", "H", "heads", "s_pv", "s_ph", "s_eb", "s_xb", "s_cb", "s_fb"), "i32"),
}


@declare(
    types=TYPES,
    configs=(
        Config(sizes={"BK": 32}, num_warps=4, num_stages=2, max_row=256),
        Config(sizes={"BK": 64}, num_warps=4, num_stages=2, max_row=256),
        Config(sizes={"BK": 16}, num_warps=4, num_stages=1, min_row=256),
    ),
    key=("D", "GN"),
    cases=tuple({**shape, **LIST} for shape in SHAPES),
)
def gather_backward_q(
    q, k, v, do, lse, delta, dq, items, list_of, lo, hi, first, s_q, s_k, s_v, s_g, s_d, s_l, s_n, s_ib,
    scale, num_sinks, HQ, G, lists, size, block_size, query_block,
    D: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, GN: tl.constexpr,
    LISTED: tl.constexpr, MAPPED: tl.constexpr, HAS_SINKS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Store dq of one query, for the GROUP heads that share its list."""
    i_t = tl.program_id(0)
    i_b = (tl.program_id(1) // (HQ // GROUP)).to(tl.int64)
    i_l = (tl.program_id(1) % (HQ // GROUP)).to(tl.int64)

    o_i = i_b * s_ib + i_t
    run, _ = load_run(lo + o_i, hi + o_i, first + o_i, num_sinks, HAS_SINKS)
    items = list_pointer(items, s_n, list_of, i_b, i_l, i_t, lists, query_block, MAPPED)
    listed = Listed(items, size, block_size)

    # The heads of the group, and the head that holds their keys
    o_h = i_l * GROUP + tl.arange(0, GN)
    m_h = tl.arange(0, GN) < GROUP
    k = head_rows(k, s_k, i_b, i_l * GROUP // G)
    v = head_rows(v, s_v, i_b, i_l * GROUP // G)

    i_t = i_t.to(tl.int64)
    b_q = load_rows(token_rows(q, s_q, i_b, i_t), o_h, m_h, D, BD, True)  # [GN, BD]
    b_do = load_rows(token_rows(do, s_g, i_b, i_t), o_h, m_h, D, BD, True)
    o_l = i_b * s_l[0] + i_t * s_l[1] + o_h * s_l[2]
    base, b_delta = load_terms(lse + o_l, delta + o_l, m_h, True)

    scale2 = scale * LOG2E
    b_dq = tl.zeros([BD, GN], tl.float32)

    for i_x in range(0, size * block_size, BK):
        o_n, m_n = key_slots(i_x + tl.arange(0, BK), size * block_size, run, listed, LISTED, HAS_SINKS)

        b_k = load_rows(k, o_n, m_n, D, BD, True)
        b_v = load_rows(v, o_n, m_n, D, BD, True)

        b_s = dot(b_k, tl.trans(b_q), UPCAST) * scale2 - base[None, :]  # [BK, GN]
        b_dp = dot(b_v, tl.trans(b_do), UPCAST) - b_delta[None, :]
        b_p = probabilities(b_s, m_n[:, None], True)
        b_dq += dot(tl.trans(b_k), (b_p * b_dp).to(b_k.dtype), UPCAST)

    o_d = tl.arange(0, BD)
    p_dq = dq + i_b * s_d[0] + i_t * s_d[1] + o_h[None, :] * s_d[2] + o_d[:, None]
    tl.store(p_dq, (b_dq * scale).to(dq.dtype.element_ty), mask=m_h[None, :] & (o_d < D)[:, None])


@declare(
    types=TYPES,
    configs=(Config(sizes={"BR": 16}),),
    key=("D", "GROUP"),
    cases=tuple({n: x for n, x in shape.items() if n != "GN"} | {"CHUNK": CHUNK} for shape in SHAPES),
)
def gather_backward_kv(
    q, k, v, do, lse, delta, parts, entries, offsets, last_chunk, key_of,
    s_q, s_k, s_v, s_g, s_l, s_pv, s_ph, s_eb, s_xb, s_cb, s_fb, scale, G, lists, heads, TK,
    D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Store what one chunk of the queries that list a key gives to its dk and dv, in float32."""
    i_c = tl.program_id(0)
    i_b = (tl.program_id(1) // heads).to(tl.int64)
    i_l = (tl.program_id(1) % heads).to(tl.int64)

    row = i_b * lists + i_l % lists
    i_n = tl.load(key_of + row * s_fb + i_c).to(tl.int64)

    # Spare programs have no key.
    if i_n < TK:
        chunk = i_c
        if i_n > 0:
            chunk = i_c - tl.load(last_chunk + row * s_cb + i_n - 1)
        begin = tl.load(offsets + row * s_xb + i_n) + chunk * CHUNK
        end = tl.minimum(tl.load(offsets + row * s_xb + i_n + 1), begin + CHUNK)

        o_d = tl.arange(0, BD)
        m_d = o_d < D
        i_h = i_l * GROUP // G
        b_k = tl.load(k + i_b * s_k[0] + i_n * s_k[1] + i_h * s_k[2] + o_d, mask=m_d, other=0.0).to(
            tl.float32
        )
        b_v = tl.load(v + i_b * s_v[0] + i_n * s_v[1] + i_h * s_v[2] + o_d, mask=m_d, other=0.0).to(
            tl.float32
        )

        b_dk = tl.zeros([BD], tl.float32)
        b_dv = tl.zeros([BD], tl.float32)

        for i_e in range(begin, end, BR):
            o_e = i_e + tl.arange(0, BR)
            m_e = o_e < end
            o_t = tl.load(entries + row * s_eb + o_e, mask=m_e, other=0)
            for i_g in range(GROUP):
                i_q = i_l * GROUP + i_g
                b_q = load_rows(head_rows(q, s_q, i_b, i_q), o_t, m_e, D, BD, True).to(tl.float32)
                b_do = load_rows(head_rows(do, s_g, i_b, i_q), o_t, m_e, D, BD, True).to(tl.float32)
                o_l = i_b * s_l[0] + i_q * s_l[2] + o_t.to(tl.int64) * s_l[1]
                base, b_delta = load_terms(lse + o_l, delta + o_l, m_e, True)

                b_s = tl.sum(b_q * b_k[None, :], 1) * (scale * LOG2E) - base  # [BR]
                b_p = probabilities(b_s, m_e, True)
                b_ds = b_p * (tl.sum(b_do * b_v[None, :], 1) - b_delta)

                b_dv += tl.sum(b_p[:, None] * b_do, 0)
                b_dk += tl.sum(b_ds[:, None] * b_q, 0)

        p_part = parts + (i_b * heads + i_l) * s_ph + i_c.to(tl.int64) * D + o_d
        tl.store(p_part, b_dk, mask=m_d)
        tl.store(p_part + s_pv, b_dv, mask=m_d)


@declare(
    types=TYPES,
    configs=(Config(sizes={"BK": 16}),),
    cases=tuple({"D": d, "BD": bd} for d, bd in ((128, 128), (64, 64), (80, 128), (256, 256))),
)
def sum_chunks(
    parts, last_chunk, dk, dv, s_pv, s_ph, s_cb, s_d, scale, TK, H, heads, lists,
    D: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Add up the chunks of a tile of keys, list by list and then in ascending order."""
    i_b = (tl.program_id(1) // H).to(tl.int64)
    i_h = (tl.program_id(1) % H).to(tl.int64)

    o_n = tl.program_id(0) * BK + tl.arange(0, BK)
    m_n = o_n < TK

    b_dk = tl.zeros([BK, BD], tl.float32)
    b_dv = tl.zeros([BK, BD], tl.float32)

    for i in range(heads // H):
        i_l = i_h * (heads // H) + i
        p_last = last_chunk + (i_b * lists + i_l % lists) * s_cb + o_n
        b_end = tl.load(p_last, mask=m_n, other=0)
        b_begin = tl.load(p_last - 1, mask=m_n & (o_n > 0), other=0)

        p_part = parts + (i_b * heads + i_l) * s_ph
        for i_c in range(tl.max(b_end - b_begin, 0)):
            o_c = b_begin + i_c
            b_dk += load_rows(Rows(p_part, D), o_c, m_n & (o_c < b_end), D, BD, True)
            b_dv += load_rows(Rows(p_part + s_pv, D), o_c, m_n & (o_c < b_end), D, BD, True)

    store_rows(head_rows(dk, s_d, i_b, i_h), o_n, m_n, b_dk * scale, D, BD)
    store_rows(head_rows(dv, s_d, i_b, i_h), o_n, m_n, b_dv, D, BD)
