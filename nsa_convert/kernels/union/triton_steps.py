"""What the kernels over tiles of queries share: the tile table, steps of keys, and one step of a tile."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_convert.kernels.common.toolchain import Config, padded_dim, strides, upcast
from nsa_convert.kernels.common.triton_flash import LOG2E, Graded, Rows, load_rows, load_terms
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


Sizes = namedtuple("Sizes", ("D", "DP", "R", "BS", "BN", "PARTS", "JOIN", "UPCAST", "CLEAN"))
"""Constants of a kernel over tiles: head dim, the same padded, heads that share a list, keys of a step.

``BS``, ``BN``, ``PARTS`` and ``JOIN`` as :func:`key_steps` returns them. A second launch with ``CLEAN``
computes again what is not finite.
"""


Part = namedtuple("Part", ("BM", "W", "HALVES"))
"""The rows of a tile that are walked: their number, their queries, and in how many halves they lie."""


Tile = namedtuple("Tile", ("first", "size", "slot", "start", "head", "row", "HQ", "TK"))
"""The queries of a program.

The first one and how many there are, its key slot, the first slot of its document, the first head, the
row ``i_b * TQ`` of the call's first query, the number of heads and the end of the keys.
"""


Union = namedtuple("Union", ("blocks", "members", "begin", "own", "own2", "end"))
"""The blocks of a tile, in order: those of both halves, of the first alone, and of the second."""


@triton.jit
def load_tile(tiles, TQ, TK, HQ, R: tl.constexpr):
    """Return the :class:`Tile` of a program. Programs: (tiles, HQ / R, B)."""
    i_b = tl.program_id(2).to(tl.int64)
    p_tile = tiles + (i_b * tl.num_programs(0) + tl.program_id(0)) * 8
    first, size, slot, start = (
        tl.load(p_tile), tl.load(p_tile + 1), tl.load(p_tile + 2), tl.load(p_tile + 3)
    )  # fmt: skip
    return Tile(first, size, slot, start, tl.program_id(1) * R, i_b * TQ, HQ, TK)


@triton.jit
def load_union(blocks, members, bounds, groups, HQ, HS, R: tl.constexpr, HALVES: tl.constexpr):
    """Return the :class:`Union` of a program's tile."""
    num_tiles = tl.num_programs(0)
    i_list = tl.program_id(2).to(tl.int64) * HS + tl.program_id(1) * HS // (HQ // R)
    i_list = i_list * num_tiles + tl.program_id(0)
    begin = tl.load(bounds + i_list).to(tl.int32)
    end = tl.load(bounds + i_list + 1).to(tl.int32)
    own = end
    own2 = end

    if HALVES == 2:
        own = begin + tl.load(groups + i_list * 2)
        own2 = own + tl.load(groups + i_list * 2 + 1)
    return Union(blocks, members, begin, own, own2, end)


@triton.jit
def flag_pointer(broken):
    """Return where a program says whether its result is not finite."""
    i_bp = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    return broken + i_bp * tl.num_programs(0) + tl.program_id(0)


@triton.jit
def load_tile_rows(tile, from_w, R: tl.constexpr, P: tl.constexpr):
    """Return queries and heads of the rows of a part, which rows exist, and their numbers in the tile.

    The rows are those of W queries from number ``from_w`` of the tile on, half by half.
    """
    HALF: tl.constexpr = P.BM // P.HALVES
    o_m = tl.arange(0, P.BM) % HALF
    o_w = from_w + tl.arange(0, P.BM) // HALF * (P.W // P.HALVES) + o_m // R
    m_m = (o_w < tile.size) & (o_m < P.W // P.HALVES * R)
    return (tile.first + o_w).to(tl.int64), (tile.head + o_m % R).to(tl.int64), m_m, o_w


@triton.jit
def two_halves(x):
    """Return the first and the second half of the rows of ``x [BM, ...]``."""
    if len(x.shape) == 1:
        x = tl.permute(tl.reshape(x, [2, x.shape[0] // 2]), [1, 0])
    else:
        x = tl.permute(tl.reshape(x, [2, x.shape[0] // 2, x.shape[1]]), [1, 2, 0])
    return tl.split(x)


Row = namedtuple("Row", ("first", "strides"))
"""A batch row of a tensor ``[B, T, H, D]``: a pointer to it, and the strides of the tensor."""


@triton.jit
def load_heads(x, o_q, o_hq, m_m, D: tl.constexpr, DP: tl.constexpr):
    """Load the rows ``[BM, DP]`` of queries and heads of a :class:`Row`; 0 where masked and beyond D."""
    return load_rows(Rows(x.first, 1), o_q * x.strides[1] + o_hq * x.strides[2], m_m, D, DP, True)


Queries = namedtuple("Queries", ("q", "do", "lse", "delta"))
"""What is read for each query: q and do as :class:`Row`, lse and delta ``[B, TQ, HQ]``."""


@triton.jit
def load_queries(x, row, o_q, o_hq, m_m, D: tl.constexpr, DP: tl.constexpr):
    """Return the :class:`Graded` rows of queries and heads; ``row`` are their numbers in the call."""
    b_q = load_heads(x.q, o_q, o_hq, m_m, D, DP)
    b_do = load_heads(x.do, o_q, o_hq, m_m, D, DP)
    base, b_delta = load_terms(x.lse + row, x.delta + row, m_m, True)
    return Graded(b_q, b_do, base, b_delta)


@triton.jit
def step_keys(j, end, union, tile, S: tl.constexpr):
    """Return the key slots ``[BN]`` of step j, which of them are keys, and the members of their blocks."""
    o_n = tl.arange(0, S.BN)
    if S.JOIN == 1:
        inside = (j % S.PARTS) * S.BN + o_n
        bits = tl.load(union.members + j // S.PARTS)
        o_k = tile.start + tl.load(union.blocks + j // S.PARTS) * S.BS + inside
        m_k = inside < S.BS
    else:
        o_e = j + o_n // (S.BN // S.JOIN)
        m_e = o_e < end
        inside = o_n % (S.BN // S.JOIN)
        bits = tl.load(union.members + o_e, mask=m_e, other=0)
        o_k = tile.start + tl.load(union.blocks + o_e, mask=m_e, other=0) * S.BS + inside
        m_k = m_e & (inside < S.BS)
    return o_k, m_k & (o_k < tile.TK), bits


@triton.jit
def seen_by(bits, o_k, m_k, o_w, slot, JOIN: tl.constexpr):
    """Return which keys of a step the queries number ``o_w`` of a tile see, ``[BM, BN]``."""
    o_bit = o_w.to(tl.int64)
    if JOIN == 1:
        listed = ((bits >> o_bit) & 1)[:, None] != 0
    else:
        listed = ((bits[None, :] >> o_bit[:, None]) & 1) != 0
    return listed & m_k[None, :] & (o_k[None, :] <= (slot + o_w)[:, None])


def row_bytes(q: Tensor) -> int:
    """Return the bytes that a padded row of q, k or v takes, at most 1024.

    float32 counts twice: its exact products hold their operands in registers.
    """
    size = 8 if q.dtype == torch.float32 else q.element_size()
    return min(1024, padded_dim(q.shape[3]) * size)


def tile_arguments(q: Tensor, k: Tensor, plan: Plan, scale: float) -> dict:
    """Return the launch arguments that all kernels over tiles share."""
    return {
        "tiles": plan.tiles, "scale": scale * LOG2E.value, "TQ": q.shape[1], "TK": k.shape[1],
        "HQ": q.shape[2], **strides(q=q, k=k),
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
