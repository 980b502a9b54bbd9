"""Scores of blocks for a few queries: cells are the rows of the products, heads of a group the columns."""

from __future__ import annotations

import triton.language as tl

from nsa_convert.kernels.common.toolchain import Config, declare
from nsa_convert.kernels.common.triton_flash import LOG2E, dot, head_rows, load_rows, token_rows
from nsa_convert.kernels.compressed.triton_scores import TYPES, stride_weight


@declare(
    types=TYPES,
    configs=(
        Config(sizes={"BB": 32}, num_warps=4, num_stages=3, max_row=512),
        Config(sizes={"BB": 16}, num_warps=4, num_stages=1, min_row=512),
    ),
    cases=tuple(
        {"D": d, "BD": bd, "GROUP": group, "GN": max(8, group), "MAXIMUM": False, "UPCAST": False, **more}
        for d, bd, group, more in (
            (128, 128, 4, {}),
            (256, 256, 8, {"row": 512}),
            (160, 256, 16, {"row": 512, "dtype": "fp16"}),
            (256, 256, 4, {"row": 1024, "dtype": "fp32"}),
        )
    ),
)
def decode_score(
    q, ck, lse, score, lo, hi, own, s_q, s_k, s_l, s_ib, s_jb, s_s, scale, HQ, parts, steps, overlap,
    D: tl.constexpr, BD: tl.constexpr, BB: tl.constexpr, GROUP: tl.constexpr, GN: tl.constexpr,
    MAXIMUM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Store the scores of a tile of blocks for one query and key head, weighted as in ``block_score``."""
    i_t = tl.program_id(0).to(tl.int64)
    i_b = (tl.program_id(2) // (HQ // GROUP)).to(tl.int64)
    i_h = (tl.program_id(2) % (HQ // GROUP)).to(tl.int64)
    own = tl.load(own + i_b * s_jb + i_t)

    # Blocks after the query's own are left out.
    if own >= tl.program_id(1) * BB:
        first = tl.load(lo + i_b * s_ib + i_t)
        end = tl.load(hi + i_b * s_ib + i_t)

        o_b = tl.program_id(1) * BB + tl.arange(0, BB)

        o_h = i_h * GROUP + tl.arange(0, GN)
        m_h = tl.arange(0, GN) < GROUP
        b_q = load_rows(token_rows(q, s_q, i_b, i_t), o_h, m_h, D, BD, True)  # [GN, BD]
        p_lse = lse + i_b * s_l[0] + i_t * s_l[1] + o_h * s_l[2]
        b_lse2 = tl.load(p_lse, mask=m_h, other=float("inf")) * LOG2E

        b_score = tl.zeros([BB], tl.float32)

        # The cells that overlap each block
        for i in range(parts):
            o_c = o_b * steps + (1 - overlap + i)
            m_c = (o_c >= 0) & (first + o_c < end)
            b_k = load_rows(head_rows(ck, s_k, i_b, i_h), first + o_c, m_c, D, BD, True)

            b_s = dot(b_k, tl.trans(b_q), UPCAST) * (scale * LOG2E)  # [BB, GN]
            b_p = tl.exp2(tl.minimum(b_s - b_lse2[None, :], 115.0))  # bounded, see probability()
            b_p = tl.where(m_c[:, None] & m_h[None, :], b_p, 0.0)

            if MAXIMUM:
                b_score = tl.maximum(b_score, tl.sum(b_p, 1))
            else:
                b_score += tl.sum(b_p, 1) * stride_weight(i, parts, steps, overlap)

        p_score = score + i_b * s_s[0] + i_h * s_s[2] + i_t * s_s[1] + o_b
        tl.store(p_score, b_score, mask=o_b <= own)
