"""Backward of attention to lists of tokens: dq from each query's keys, dk and dv from each key's readers."""

from __future__ import annotations

import triton.language as tl

from nsa_convert.kernels.common.toolchain import Config, declare, dot
from nsa_convert.kernels.gather.triton_forward import LIST, SHAPES, TYPES, key_slots, list_pointer
from nsa_convert.kernels.interval.triton_forward import load_rows

CHUNK = 512
"""Queries of one key that one program adds up."""

TYPES = {
    **TYPES,
    **dict.fromkeys(("dk", "dv"), "*T"),
    "parts": "*fp32",
    **dict.fromkeys(("entries", "offsets", "last_chunk", "key_of"), "*i32"),
    **dict.fromkeys(("TK", "H", "heads"), "i32"),
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
    q, k, v, do, lse, delta, dq, items, list_of, lo, hi, first,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_gb, s_gt, s_gh, s_db, s_dt, s_dh,
    s_lb, s_lt, s_lh, s_nb, s_nh, s_nt, s_ib,
    scale, num_sinks, HQ, G, lists, size, block_size, query_block,
    D: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, GN: tl.constexpr,
    LISTED: tl.constexpr, MAPPED: tl.constexpr, HAS_SINKS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Store dq of one query, for the GROUP heads that share its list."""
    i_t = tl.program_id(0)
    i_b = (tl.program_id(1) // (HQ // GROUP)).to(tl.int64)
    i_l = (tl.program_id(1) % (HQ // GROUP)).to(tl.int64)

    lo = tl.load(lo + i_b * s_ib + i_t)
    hi = tl.load(hi + i_b * s_ib + i_t)
    items = list_pointer(items, list_of, i_b, i_l, i_t, lists, query_block, s_nb, s_nh, s_nt, MAPPED)

    # The heads of the group, and the head that holds their keys
    o_h = i_l * GROUP + tl.arange(0, GN)
    m_h = tl.arange(0, GN) < GROUP
    k += i_b * s_kb + i_l * GROUP // G * s_kh
    v += i_b * s_vb + i_l * GROUP // G * s_vh

    i_t = i_t.to(tl.int64)
    b_q = load_rows(q + i_b * s_qb + i_t * s_qt, o_h, s_qh, m_h, D, BD, True)  # [GN, BD]
    b_do = load_rows(do + i_b * s_gb + i_t * s_gt, o_h, s_gh, m_h, D, BD, True)
    p_l = i_b * s_lb + i_t * s_lt + o_h * s_lh
    b_lse = tl.load(lse + p_l, mask=m_h, other=float("-inf"))
    # A query without keys has no gradient, whatever its lse is used for.
    b_lse2 = tl.where(b_lse == float("-inf"), 0.0, b_lse * 1.4426950408889634)
    b_delta = tl.load(delta + p_l, mask=m_h & (b_lse > float("-inf")), other=0.0)

    scale2 = scale * 1.4426950408889634
    b_dq = tl.zeros([BD, GN], tl.float32)

    for i_x in range(0, size * block_size, BK):
        o_n, m_n = key_slots(
            i_x + tl.arange(0, BK), size * block_size, items, size, block_size, 0, lo, hi, first, LISTED,
            HAS_SINKS,
        )  # fmt: skip

        b_k = load_rows(k, o_n, s_kt, m_n, D, BD, True)
        b_v = load_rows(v, o_n, s_vt, m_n, D, BD, True)

        b_s = dot(b_k, tl.trans(b_q), UPCAST) * scale2 - b_lse2[None, :]  # [BK, GN]
        b_p = tl.exp2(tl.where(m_n[:, None], b_s, float("-inf")))
        b_ds = b_p * (dot(b_v, tl.trans(b_do), UPCAST) - b_delta[None, :])
        b_dq += dot(tl.trans(b_k), b_ds.to(b_k.dtype), UPCAST)

    o_d = tl.arange(0, BD)
    p_dq = dq + i_b * s_db + i_t * s_dt + o_h[None, :] * s_dh + o_d[:, None]
    tl.store(p_dq, (b_dq * scale).to(dq.dtype.element_ty), mask=m_h[None, :] & (o_d < D)[:, None])


@declare(
    types=TYPES,
    configs=(Config(sizes={"BR": 16}),),
    key=("D", "GROUP"),
    cases=tuple({n: x for n, x in shape.items() if n != "GN"} | {"CHUNK": CHUNK} for shape in SHAPES),
)
def gather_backward_kv(
    q, k, v, do, lse, delta, parts, entries, offsets, last_chunk, key_of,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_gb, s_gt, s_gh, s_lb, s_lt, s_lh,
    s_pv, s_ph, s_eb, s_xb, s_cb, s_fb, scale, G, lists, heads, TK,
    D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
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
        b_k = tl.load(k + i_b * s_kb + i_n * s_kt + i_h * s_kh + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_v = tl.load(v + i_b * s_vb + i_n * s_vt + i_h * s_vh + o_d, mask=m_d, other=0.0).to(tl.float32)

        b_dk = tl.zeros([BD], tl.float32)
        b_dv = tl.zeros([BD], tl.float32)

        for i_e in range(begin, end, BR):
            o_e = i_e + tl.arange(0, BR)
            m_e = o_e < end
            o_t = tl.load(entries + row * s_eb + o_e, mask=m_e, other=0)
            for i_g in range(GROUP):
                i_q = i_l * GROUP + i_g
                b_q = load_rows(q + i_b * s_qb + i_q * s_qh, o_t, s_qt, m_e, D, BD, True).to(tl.float32)
                b_do = load_rows(do + i_b * s_gb + i_q * s_gh, o_t, s_gt, m_e, D, BD, True).to(tl.float32)
                p_l = i_b * s_lb + i_q * s_lh + o_t.to(tl.int64) * s_lt

                b_lse = tl.load(lse + p_l, mask=m_e, other=float("inf"))
                b_delta = tl.load(delta + p_l, mask=m_e, other=0.0)

                b_s = tl.sum(b_q * b_k[None, :], 1) * scale  # [BR]
                b_p = tl.exp2((b_s - b_lse) * 1.4426950408889634)
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
    parts, last_chunk, dk, dv, s_pv, s_ph, s_cb, s_db, s_dt, s_dh, scale, TK, H, heads, lists,
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
            b_dk += load_rows(p_part, o_c, D, m_n & (o_c < b_end), D, BD, True)
            b_dv += load_rows(p_part + s_pv, o_c, D, m_n & (o_c < b_end), D, BD, True)

    o_d = tl.arange(0, BD)
    m_nd = m_n[:, None] & (o_d < D)[None, :]
    p_d = i_b * s_db + i_h * s_dh + o_n.to(tl.int64)[:, None] * s_dt + o_d[None, :]
    tl.store(dk + p_d, (b_dk * scale).to(dk.dtype.element_ty), mask=m_nd)
    tl.store(dv + p_d, b_dv.to(dv.dtype.element_ty), mask=m_nd)
