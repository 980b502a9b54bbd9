"""Attention to listed blocks that skips values of negligible weight, on the triton backend."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_convert.kernels.common.custom_ops import new_name
from nsa_convert.kernels.common.toolchain import LOG2E, Config, declare, dot
from nsa_convert.kernels.union.skipping import RUN
from nsa_convert.kernels.union.triton_forward import store_output
from nsa_convert.kernels.union.triton_plan import Shape, make_plan
from nsa_convert.kernels.union.triton_steps import (
    GEOMETRY,
    load_heads,
    load_keys,
    load_tile,
    load_tile_rows,
    row_bytes,
    seen_by,
    step_keys,
    tile_arguments,
)
from nsa_convert.patterns import BlockSelection, SequenceLayout

SHAPE = {"BM": 64, "R": 1, "G": 4, "W": 64, "BS": 64, "BN": 64, "PARTS": 1, "UPCAST": False}


@declare(
    types={**GEOMETRY, "q": "*T", "k": "*T", "v": "*T", "o": "*T", "lse": "*fp32", "skip": "fp32"},
    configs=(
        Config(num_warps=4, num_stages=2, max_row=256),
        Config(num_warps=4, num_stages=3, max_row=256),
        Config(num_warps=8, num_stages=1, min_row=256),
    ),
    key=("DP", "BM", "BN"),
    cases=(
        {**SHAPE, "D": 128, "DP": 128},
        {**SHAPE, "D": 64, "DP": 64, "row": 128, "BS": 128, "PARTS": 2},
        {**SHAPE, "D": 256, "DP": 256, "row": 512},
    ),
)
def attend_skipping(
    q, k, v, o, lse, tiles, bounds, blocks, members, scale, skip, TQ, TK, HQ, HS,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, R: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
    BS: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Attend with one tile of one head; skipped values are not loaded. Programs: (tiles, HQ, B)."""
    i_t = tl.program_id(0)
    i_p = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    first, count, slot, start, begin, end, _, _ = load_tile(
        tiles, bounds, bounds, i_t, i_p, i_b, tl.num_programs(0), HQ, HS, R, 1
    )

    i_h = (i_p // G).to(tl.int64)
    k += i_b * s_kb + i_h * s_kh
    v += i_b * s_vb + i_h * s_vh

    o_q, o_hq, m_m, o_w = load_tile_rows(first, count, i_p, 0, BM, R, W, 1)
    b_q = load_heads(q + i_b * s_qb, o_q, o_hq, m_m, s_qt, s_qh, D, DP)

    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, DP], tl.float32)

    for j in range(begin * PARTS, end * PARTS):
        o_k, m_k, bits = step_keys(j, end, blocks, members, start, TK, BS, BN, PARTS, 1)

        b_k = load_keys(k, o_k, m_k, s_kt, D, DP)
        visible = seen_by(bits, o_k, m_k, o_w, slot, 1)

        b_s = tl.where(visible, dot(b_q, tl.trans(b_k), UPCAST) * scale, float("-inf"))  # [BM, BN]

        # Online softmax over all keys
        b_max = tl.max(b_s, 1)
        b_new = tl.maximum(b_m, b_max)
        safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - safe[:, None])
        shrink = tl.exp2(b_m - safe)
        b_l = b_l * shrink + tl.sum(b_p, 1)
        b_o = b_o * shrink[:, None]

        # Values are loaded and added only where some row gives them weight.
        if tl.max(b_max - safe, 0) >= skip:
            b_v = load_keys(v, o_k, m_k, s_vt, D, DP)
            b_o += dot(b_p.to(b_v.dtype), b_v, UPCAST)

        b_m = b_new

    store_output(b_m, b_l, b_o, o, lse, i_b * TQ, first, count, 0, i_p, HQ, D, DP, BM, R, W, 1)


def attend_kept_blocks(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockSelection, layout: SequenceLayout, scale: float,
    value_skip: float, rows: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`nsa_convert.kernels.union.skipping.skipping_attention`; tiles of ``rows`` queries."""
    indices = pattern.block_indices.repeat_interleave(q.shape[2] // pattern.block_indices.shape[1], 1)
    sizes = pattern.block_size, pattern.query_block, rows
    return _attend(q, k, v, indices, *sizes, int(layout.offset), scale, value_skip)


@torch.library.custom_op(new_name("skipping_attention"), mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, block_size: int, query_block: int, rows: int,
    offset: int, scale: float, value_skip: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))

    layout = SequenceLayout(offset=offset)
    heads = (q.shape[2], k.shape[2])
    lengths = q.shape[1], k.shape[1]
    plan = make_plan(indices, block_size, query_block, layout, heads, lengths, shape=Shape(rows=rows))

    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)

    keys = max(16, min(RUN, triton.next_power_of_2(block_size)))
    attend_skipping.launch(
        (plan.tiles.shape[1], q.shape[2], q.shape[0]), q, row_bytes(q), q=q, k=k, v=v, o=o, lse=lse,
        bounds=plan.unions.bounds, blocks=plan.unions.blocks, members=plan.unions.members, HS=plan.lists,
        skip=value_skip * LOG2E, BS=block_size, BN=keys, PARTS=-(-block_size // keys),
        s_vb=v.stride(0), s_vt=v.stride(1), s_vh=v.stride(2), **tile_arguments(q, k, plan, scale),
    )  # fmt: skip
    return o, lse


@_attend.register_fake
def _(q, k, v, *_):
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        q.shape[:3], dtype=torch.float32
    )
