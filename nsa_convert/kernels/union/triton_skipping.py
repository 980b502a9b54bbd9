"""Attention to listed blocks that skips values of negligible weight, on the triton backend."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_convert.kernels.common.custom_ops import new_name
from nsa_convert.kernels.common.toolchain import Config, declare, strides
from nsa_convert.kernels.common.triton_flash import (
    LOG2E,
    Softmax,
    dot,
    head_rows,
    load_rows,
    new_softmax,
    weigh,
)
from nsa_convert.kernels.union.skipping import RUN
from nsa_convert.kernels.union.triton_forward import store_output
from nsa_convert.kernels.union.triton_plan import Shape, make_plan
from nsa_convert.kernels.union.triton_steps import (
    GEOMETRY,
    Part,
    Row,
    Sizes,
    load_heads,
    load_tile,
    load_tile_rows,
    load_union,
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
    q, k, v, o, lse, tiles, bounds, blocks, members, scale, skip, TQ, TK, HQ, HS, s_q, s_k, s_v,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, R: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
    BS: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Attend with one tile of one head; skipped values are not loaded. Programs: (tiles, HQ, B)."""
    P: tl.constexpr = Part(BM, W, 1)
    S: tl.constexpr = Sizes(D, DP, R, BS, BN, PARTS, 1, UPCAST, False)

    tile = load_tile(tiles, TQ, TK, HQ, R)
    union = load_union(blocks, members, bounds, bounds, HQ, HS, R, 1)

    i_b = tl.program_id(2).to(tl.int64)
    i_h = (tile.head // G).to(tl.int64)
    k = head_rows(k, s_k, i_b, i_h)
    v = head_rows(v, s_v, i_b, i_h)

    o_q, o_hq, m_m, o_w = load_tile_rows(tile, 0, R, P)
    b_q = load_heads(Row(q + i_b * s_q[0], s_q), o_q, o_hq, m_m, D, DP)
    state = new_softmax(BM, DP)

    for j in range(union.begin * PARTS, union.end * PARTS):
        o_k, m_k, bits = step_keys(j, union.end, union, tile, S)

        b_k = load_rows(k, o_k, m_k, D, DP, True)
        visible = seen_by(bits, o_k, m_k, o_w, tile.slot, 1)
        b_s = tl.where(visible, dot(b_q, tl.trans(b_k), UPCAST) * scale, float("-inf"))  # [BM, BN]

        # The softmax runs over all keys, ...
        top, total, b_p, shrink = weigh(state.top, state.total, b_s, 1, True)
        b_o = state.sums * shrink[:, None]

        # ... but values are loaded and added only where some row gives them weight.
        safe = tl.where(top == float("-inf"), 0.0, top)
        if tl.max(tl.max(b_s, 1) - safe, 0) >= skip:
            b_v = load_rows(v, o_k, m_k, D, DP, True)
            b_o += dot(b_p.to(b_v.dtype), b_v, UPCAST)

        state = Softmax(top, total, b_o)

    store_output(state, o, lse, tile, 0, D, R, P)


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
        skip=value_skip * LOG2E.value, BS=block_size, BN=keys, PARTS=-(-block_size // keys),
        **strides(v=v), **tile_arguments(q, k, plan, scale),
    )  # fmt: skip
    return o, lse


@_attend.register_fake
def _(q, k, v, *_):
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        q.shape[:3], dtype=torch.float32
    )
