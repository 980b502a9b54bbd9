"""The union of the block lists of neighbouring queries, and who listed which block."""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_convert.kernels.common.toolchain import Config, declare

COLUMNS = 8
"""Columns of a tile table; :func:`nsa_convert.kernels.union.triton_plan.tile_table` names them."""


@declare(
    types={
        "indices": "*i64", "tiles": "*i32", "bounds": "*i64", "groups": "*i32", "blocks": "*i32",
        "members": "*i64", "S": "i32", "s_i": ("i32",) * 4,
    },
    configs=(
        # One warp needs no barriers; long lists need more registers than one has.
        Config(num_warps=1, num_stages=1, only={"SP": tuple(1 << i for i in range(5))}),
        Config(num_warps=4, num_stages=1, only={"SP": tuple(1 << i for i in range(5, 24))}),
    ),
    cases=tuple(
        {"WIDTH": width, "LISTS": lists, "SP": size, "BS": 64, "QB": block, "HALF": half, "WRITE": True}
        for width, lists, size, block, half in (
            (32, 32, 16, 1, 0), (64, 64, 64, 1, 0), (64, 2, 128, 64, 0), (16, 16, 64, 1, 8)
        )
    ),
)  # fmt: skip
def union_lists(
    indices, tiles, bounds, groups, blocks, members,
    S, s_i,
    WIDTH: tl.constexpr, LISTS: tl.constexpr, SP: tl.constexpr, BS: tl.constexpr, QB: tl.constexpr,
    HALF: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """Walk the blocks that one tile lists in ascending order, to count them or, with WRITE, to store them.

    Programs: (tiles, lists, batch). ``LISTS`` and ``WIDTH`` are powers of two that hold the lists and the
    queries of a tile; bit w of a member is set when query w of the tile lists the block. ``bounds`` gets
    their number, or says where to store them. With ``HALF``, the
    blocks that queries before and after number HALF list are written first, then those of the first half
    alone, then those of the second; ``groups`` has the sizes of the first two.
    """
    i_t = tl.program_id(0)
    i_l = tl.program_id(1)
    i_b = tl.program_id(2)

    num_tiles = tl.num_programs(0)
    p_tile = tiles + (i_b * num_tiles + i_t) * 8
    count, slot, start, stop = (
        tl.load(p_tile + 1), tl.load(p_tile + 2), tl.load(p_tile + 3), tl.load(p_tile + 4)
    )  # fmt: skip

    first = tl.load(p_tile + 6)
    rest = tl.load(p_tile + 7)

    o_l = tl.arange(0, LISTS)
    o_s = tl.arange(0, SP)
    o_w = tl.arange(0, WIDTH)
    used = tl.where(count > 0, (rest + count - 1) // QB + 1, 0)
    m_i = (o_l < used)[:, None] & (o_s < S)[None, :]
    p_i = indices + i_b.to(tl.int64) * s_i[0] + i_l.to(tl.int64) * s_i[1]
    p_i = p_i + (first + o_l).to(tl.int64)[:, None] * s_i[2] + o_s.to(tl.int64)[None, :] * s_i[3]
    b_i = tl.load(p_i, mask=m_i, other=-1).to(tl.int32)  # [LISTS, SP]

    # Blocks that begin after the last query of the tile are no use to any of them.
    reach = (tl.maximum(tl.minimum(slot + count, stop) - start, 0) + BS - 1) // BS

    NONE: tl.constexpr = 2147483647
    b_i = tl.where((b_i >= 0) & (b_i < reach), b_i, NONE)

    # bits: which queries of the tile read each list
    own = (rest + o_w) // QB
    bit = tl.full([WIDTH], 1, tl.int64) << o_w.to(tl.int64)
    reads = (own[None, :] == o_l[:, None]) & (o_w < count)[None, :]  # [LISTS, WIDTH]
    bits = tl.sum(tl.where(reads, bit[None, :], 0), 1)  # [LISTS]

    # Where the next block of each group is written
    i_row = (i_b * tl.num_programs(1) + i_l).to(tl.int64) * num_tiles + i_t
    at = tl.load(bounds + i_row) if WRITE else tl.full([], 0, tl.int64)
    at_first = at
    at_second = at
    if HALF and WRITE:
        at_first = at + tl.load(groups + i_row * 2)
        at_second = at_first + tl.load(groups + i_row * 2 + 1)

    # Take the smallest block that is left, and all lists that hold it.
    block = tl.min(tl.min(b_i, 1), 0)
    while block < NONE:
        here = b_i == block
        listed = tl.max(here.to(tl.int32), 1) > 0
        member = tl.sum(tl.where(listed, bits, 0), 0)

        if HALF:
            low = (member & ((1 << HALF) - 1)) != 0
            high = (member >> HALF) != 0
            place = tl.where(low & high, at, tl.where(low, at_first, at_second))
            at += (low & high).to(tl.int64)
            at_first += (low & (not high)).to(tl.int64)
            at_second += ((not low) & high).to(tl.int64)
        else:
            place = at
            at += 1

        if WRITE:
            tl.store(blocks + place, block)
            tl.store(members + place, member)

        b_i = tl.where(here, NONE, b_i)
        block = tl.min(tl.min(b_i, 1), 0)

    if not WRITE:
        if HALF:
            tl.store(groups + i_row * 2, at.to(tl.int32))
            tl.store(groups + i_row * 2 + 1, at_first.to(tl.int32))
            at += at_first + at_second
        tl.store(bounds + i_row, at)


def lists_per_tile(width: int, query_block: int) -> int:
    """Return how many lists a tile of ``width`` queries reads at most."""
    return 1 if query_block % width == 0 else (width - 2) // query_block + 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unions:
    """The blocks that tiles read.

    Attributes:
        bounds: ``[B * HS * NT + 1]`` int64: tile t of list head l of row b reads the entries ``bounds[i] ..
            bounds[i + 1]`` with ``i = (b * HS + l) * NT + t``.
        blocks: ``[E]`` int32, ascending in each tile, or in each of the three groups of one in halves.
        members: ``[E]`` int64; bit w is set when query w of the tile lists the block.
        groups: ``[B * HS * NT, 2]`` int32, how many blocks both halves of a tile list, and how many the first
            alone; they are written in this order, those of the second half last. ``[0, 2]`` for whole tiles.
        of_halves: Entries there would be if every half were a tile, where the device was read.
    """

    bounds: Tensor
    blocks: Tensor
    members: Tensor
    groups: Tensor
    of_halves: int | None = None


def unite(
    indices: Tensor,
    tiles: Tensor,
    width: int,
    block_size: int,
    query_block: int,
    room: int | None = None,
    halves: int = 1,
) -> Unions:
    """Return the union of the lists of every tile.

    Args:
        indices: ``[B, HS, NQ, S]`` int32 or int64 block numbers, -1 where unused.
        tiles: ``[B, NT, 8]`` int32 tile table.
        width: Queries in a tile, at most 64.
        block_size: Keys in a block.
        query_block: Queries that share one list.
        room: E where it is known, or the device may not be read to size it; the entries behind the last one
            are undefined.
        halves: 2 to tell apart what the first and the second half of a tile's queries list.
    """
    batch, lists, num_lists, size = indices.shape
    num_tiles = tiles.shape[1]
    per_tile = lists_per_tile(width, query_block)
    grid = (num_tiles, lists, batch)
    rows = batch * lists * num_tiles

    groups = torch.zeros(rows if halves == 2 else 0, 2, dtype=torch.int32, device=indices.device)
    bounds = torch.zeros(rows + 1, dtype=torch.int64, device=indices.device)

    common = {
        "indices": indices, "tiles": tiles, "S": size,
        "s_i": indices.stride(),
        "WIDTH": triton.next_power_of_2(width),
        "LISTS": triton.next_power_of_2(min(per_tile, width, max(1, num_lists))),
        "SP": triton.next_power_of_2(max(1, size)), "BS": block_size, "QB": query_block,
        "HALF": width // 2 if halves == 2 else 0, "groups": groups,
    }  # fmt: skip

    # The first walk counts the blocks of each tile.
    counts = bounds[1:]
    empty = bounds[:0]
    union_lists.launch(grid, indices, 0, bounds=counts, blocks=empty, members=empty, WRITE=False, **common)
    counts.copy_(counts.cumsum(0))

    # Reading their number waits for the device.
    total = room
    of_halves = None
    if total is None and halves == 2:
        total, of_halves = torch.stack([bounds[-1], bounds[-1] + groups[:, 0].sum()]).tolist()
    elif total is None:
        total = int(bounds[-1])

    # The second walk writes them.
    blocks = torch.empty(total, dtype=torch.int32, device=indices.device)
    members = torch.empty(total, dtype=torch.int64, device=indices.device)
    union_lists.launch(grid, indices, 0, bounds=bounds, blocks=blocks, members=members, WRITE=True, **common)
    return Unions(bounds=bounds, blocks=blocks, members=members, groups=groups, of_halves=of_halves)
