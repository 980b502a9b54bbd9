"""What the kernels over tiles of queries share: the tile table, steps of keys, and one step of a tile."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_convert.kernels.common.toolchain import (
    LOG2E,
    Config,
    clean_rows,
    dot,
    finite_rows,
    padded_dim,
    upcast,
)
from nsa_convert.kernels.union.triton_plan import Plan

KEY_BYTES = 16384
"""Keys of one step: part of a large block, or several small blocks together; 16 to 64 of them."""

ROW_BYTES = 32768
"""Queries of one tile."""

LARGE = {"BM": (128,), "CLEAN": (False,)}
SMALL = {"BM": (16, 32, 64), "CLEAN": (False,)}

CLEANING = tuple(
    Config(num_warps=warps, num_stages=2, max_row=256, only={"BM": rows, "CLEAN": (True,)})
    for warps, rows in ((8, (128,)), (4, (16, 32, 64)))
)
"""For the second launch, on tiles that are not finite; as many warps as the first, so sums are the same."""

GEOMETRY = {
    "tiles": "*i32", "bounds": "*i64", "blocks": "*i32", "members": "*i64", "scale": "fp32", "TQ": "i32",
    "TK": "i32", "HQ": "i32", "HS": "i32", "groups": "*i32", "broken": "*i32",
}  # fmt: skip
"""Types of the arguments that all kernels over tiles share."""

LONG = {
    "D": 256, "DP": 256, "row": 512, "BM": 64, "R": 4, "G": 4, "W": 16, "BS": 64, "BN": 32, "UPCAST": False,
}  # fmt: skip
EXACT = {**LONG, "D": 128, "DP": 128, "dtype": "fp32", "row": 1024, "BM": 32, "W": 8, "BN": 16, "slow": True}
CASES: tuple[dict[str, Any], ...] = tuple(
    {"D": 128, "DP": 128, "BM": rows, "R": readers, "G": readers, "W": min(64, rows // readers), "BS": size,
     "BN": min(64, size * join), "PARTS": parts, "JOIN": join, "HALVES": halves, "CLEAN": clean,
     "UPCAST": False}
    for rows, readers, size, parts, join, halves, clean in (
        (128, 4, 64, 1, 1, 1, False), (64, 4, 64, 1, 1, 1, False), (128, 7, 128, 2, 1, 1, False),
        (128, 8, 16, 1, 4, 1, False), (128, 4, 64, 1, 1, 2, False), (128, 8, 16, 1, 4, 2, False),
        (128, 4, 64, 1, 1, 1, True), (64, 4, 64, 1, 1, 1, True), (128, 8, 16, 1, 4, 2, True),
    )
)  # fmt: skip
CASES += tuple(
    {**case, "JOIN": 1, "HALVES": 1, "CLEAN": False} for case in ({**LONG, "PARTS": 2}, {**EXACT, "PARTS": 4})
)


def key_steps(block_size: int, row: int) -> dict[str, int]:
    """Return the constexprs that say which keys a step covers.

    ``BN`` keys: one of ``PARTS`` parts of a block, or ``JOIN`` whole blocks, each padded to a power of two.
    """
    most = max(16, min(64, KEY_BYTES // row))
    size = triton.next_power_of_2(block_size)
    join = max(1, most // size)
    keys = min(most, size * join)
    return {"BS": block_size, "BN": keys, "PARTS": -(-block_size // keys) if join == 1 else 1, "JOIN": join}


@triton.jit
def load_tile(
    tiles, bounds, groups, i_t, i_p, i_b, num_tiles, HQ, HS, R: tl.constexpr, HALVES: tl.constexpr
):  # fmt: skip
    """Return a tile's ``(first, count, slot, start, begin, own, own2, end)``.

    These are its first query, number of queries, key slot of the first query and first slot of its document;
    then the bounds of its blocks, in order: those of both halves, of the first alone, and of the second.
    """
    p_tile = tiles + (i_b * num_tiles + i_t) * 8
    first, count, slot, start = (
        tl.load(p_tile), tl.load(p_tile + 1), tl.load(p_tile + 2), tl.load(p_tile + 3)
    )  # fmt: skip

    i_list = (i_b * HS + i_p * HS // (HQ // R)) * num_tiles + i_t
    begin = tl.load(bounds + i_list).to(tl.int32)
    end = tl.load(bounds + i_list + 1).to(tl.int32)
    own = end
    own2 = end

    if HALVES == 2:
        own = begin + tl.load(groups + i_list * 2)
        own2 = own + tl.load(groups + i_list * 2 + 1)
    return first, count, slot, start, begin, own, own2, end


@triton.jit
def load_tile_rows(
    first, count, i_p, from_w, BM: tl.constexpr, R: tl.constexpr, W: tl.constexpr, HALVES: tl.constexpr
):  # fmt: skip
    """Return the queries of BM rows and their heads, which rows exist, and their number in the tile.

    The rows are those of W queries from number ``from_w`` of the tile on, half by half.
    """
    HALF: tl.constexpr = BM // HALVES
    o_m = tl.arange(0, BM) % HALF
    o_w = from_w + tl.arange(0, BM) // HALF * (W // HALVES) + o_m // R
    m_m = (o_w < count) & (o_m < W // HALVES * R)
    return (first + o_w).to(tl.int64), i_p * R + o_m % R, m_m, o_w


@triton.jit
def two_halves(x):
    """Return the first and the second half of the rows of ``x [BM, ...]``."""
    if len(x.shape) == 1:
        x = tl.permute(tl.reshape(x, [2, x.shape[0] // 2]), [1, 0])
    else:
        x = tl.permute(tl.reshape(x, [2, x.shape[0] // 2, x.shape[1]]), [1, 2, 0])
    return tl.split(x)


@triton.jit
def load_heads(p, o_q, o_hq, m_m, s_t, s_h, D: tl.constexpr, DP: tl.constexpr):
    """Load the rows ``[BM, DP]`` of queries and heads of one batch row; 0 where masked and beyond D."""
    o_d = tl.arange(0, DP)
    p_rows = p + (o_q * s_t + o_hq * s_h)[:, None] + o_d[None, :]
    return tl.load(p_rows, mask=m_m[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def step_keys(
    j, end, blocks, members, start, TK, BS: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr,
    JOIN: tl.constexpr,
):  # fmt: skip
    """Return the key slots ``[BN]`` of step j, which of them are keys, and the members of their blocks."""
    o_n = tl.arange(0, BN)
    if JOIN == 1:
        inside = (j % PARTS) * BN + o_n
        bits = tl.load(members + j // PARTS)
        o_k = start + tl.load(blocks + j // PARTS) * BS + inside
        m_k = inside < BS
    else:
        o_e = j + o_n // (BN // JOIN)
        m_e = o_e < end
        inside = o_n % (BN // JOIN)
        bits = tl.load(members + o_e, mask=m_e, other=0)
        o_k = start + tl.load(blocks + o_e, mask=m_e, other=0) * BS + inside
        m_k = m_e & (inside < BS)
    return o_k, m_k & (o_k < TK), bits


@triton.jit
def seen_by(bits, o_k, m_k, o_w, slot, JOIN: tl.constexpr):
    """Return which keys of a step the queries number ``o_w`` of a tile see, ``[BM, BN]``."""
    o_bit = o_w.to(tl.int64)
    if JOIN == 1:
        listed = ((bits >> o_bit) & 1)[:, None] != 0
    else:
        listed = ((bits[None, :] >> o_bit[:, None]) & 1) != 0
    return listed & m_k[None, :] & (o_k[None, :] <= (slot + o_w)[:, None])


@triton.jit
def load_keys(p, o_k, m_k, s_t, D: tl.constexpr, DP: tl.constexpr):
    """Return the keys or values ``[BN, DP]`` of a step."""
    o_d = tl.arange(0, DP)
    p_rows = p + (o_k.to(tl.int64) * s_t)[:, None] + o_d[None, :]
    return tl.load(p_rows, mask=m_k[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def add_step(
    b_q, b_m, b_l, b_o, b_k, b_v, visible, scale, UPCAST: tl.constexpr, CLEAN: tl.constexpr
):  # fmt: skip
    """Add the keys of a step to the running softmax of a tile's rows.

    A value that is not finite would reach queries that do not see it, as ``0 * NaN`` is NaN; with ``CLEAN``
    only those that see it become NaN.
    """
    b_s = dot(b_q, tl.trans(b_k), UPCAST) * scale  # [BM, BN]

    if CLEAN:
        good = finite_rows(b_v)
        b_s = tl.where(good[None, :], b_s, float("nan"))
        b_v = clean_rows(b_v, good)

    b_s = tl.where(visible, b_s, float("-inf"))

    # Rescale the running sums to the new maximum; -inf - -inf would be NaN in a row that saw no key yet.
    b_new = tl.maximum(b_m, tl.max(b_s, 1))
    safe = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = tl.exp2(b_s - safe[:, None])
    shrink = tl.exp2(b_m - safe)

    b_l = b_l * shrink + tl.sum(b_p, 1)
    b_o = b_o * shrink[:, None] + dot(b_p.to(b_v.dtype), b_v, UPCAST)
    return b_new, b_l, b_o


@triton.jit
def gradient_rows(
    b_dq, b_q, b_do, b_base, b_delta, b_k, b_v, visible, scale, UPCAST: tl.constexpr, CLEAN: tl.constexpr
):  # fmt: skip
    """Add what the keys of a step give to dq of a tile's rows."""
    b_s = tl.where(visible, dot(b_q, tl.trans(b_k), UPCAST) * scale, float("-inf"))  # [BM, BN]
    b_p = tl.exp2(b_s - b_base[:, None])

    b_dp = dot(b_do, tl.trans(b_v), UPCAST) - b_delta[:, None]
    if CLEAN:  # as in the forward; rows that see such a value have a base that is NaN
        b_dp = tl.where(visible, b_dp, 0.0)
        b_k = clean_rows(b_k, finite_rows(b_k))
    return b_dq + dot((b_p * b_dp).to(b_k.dtype), b_k, UPCAST)


def row_bytes(q: Tensor) -> int:
    """Return the bytes that a padded row of q, k or v takes, at most 1024.

    float32 counts twice: its exact products hold their operands in registers.
    """
    size = 8 if q.dtype == torch.float32 else q.element_size()
    return min(1024, padded_dim(q.shape[3]) * size)


def tile_arguments(q: Tensor, k: Tensor, plan: Plan, scale: float) -> dict:
    """Return the launch arguments that all kernels over tiles share."""
    return {
        "tiles": plan.tiles, "scale": scale * LOG2E, "TQ": q.shape[1], "TK": k.shape[1], "HQ": q.shape[2],
        "s_qb": q.stride(0), "s_qt": q.stride(1), "s_qh": q.stride(2),
        "s_kb": k.stride(0), "s_kt": k.stride(1), "s_kh": k.stride(2),
        "D": q.shape[3], "DP": padded_dim(q.shape[3]), "BM": plan.rows, "R": plan.readers,
        "G": q.shape[2] // k.shape[2], "W": plan.width, "UPCAST": upcast(q.dtype),
    }  # fmt: skip


def union_arguments(q: Tensor, plan: Plan) -> dict:
    """Return the launch arguments of kernels that walk the union of each tile."""
    unions = plan.unions
    return {
        "bounds": unions.bounds, "groups": unions.groups, "blocks": unions.blocks, "members": unions.members,
        "HS": plan.lists, "HALVES": plan.halves, **key_steps(plan.block_size, row_bytes(q)),
    }  # fmt: skip
