"""How a call is cut into tiles of neighbouring queries, how wide they are, and which tiles read a block."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nsa_convert.kernels.union.torch_backend import union_sizes
from nsa_convert.kernels.union.triton_lists import COLUMNS, Unions, lists_per_tile, unite
from nsa_convert.patterns import SequenceLayout

ROWS = (128, 64, 32, 16)
"""Rows of the matrix products of a tile: its queries times the heads that share a list."""

HALVED = 128
"""Rows of a tile that may be walked in two halves."""

HALVES_COST = 0.95
"""Halves must cost less than this part of what whole tiles do: they fill the matrix units less well."""

MAX_WIDTH = 64
"""Queries in a tile: one bit each in the member masks."""

LOAD_ROWS = 64
"""Loading a key and its value costs a tile about as much as this many rows of its matrix products."""

SAMPLES = 32
MAX_LISTED = 8192
"""List entries of a tile that fit the registers of the program that unites them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Tiles of one call and the blocks they read.

    Attributes:
        rows: Rows of a tile, a power of two.
        halves: 2 when the first and the second half of a tile's queries skip blocks that only the other
            listed, else 1. Row r of a half is query ``r // readers`` of it, head ``r % readers``.
        width: Queries in a tile.
        readers: Query heads that share a list and a key head.
        lists: HS, block lists per batch row; the same for all heads when 1.
        block_size: Keys in a block.
        tiles: ``[B, NT, 8]`` int32, see :func:`tile_table`.
        block_rows: Blocks in a batch row, those of all its documents together.
        unions: What the tiles read.
        exact: Whether E is the number of entries; otherwise more room than they need.
    """

    rows: int
    halves: int
    width: int
    readers: int
    lists: int
    block_size: int
    tiles: Tensor
    block_rows: int
    unions: Unions
    exact: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The rows of a tile, and in how many parts they are walked."""

    rows: int
    halves: int = 1

    def width(self, readers: int) -> int:
        """Return how many queries fit a tile when ``readers`` heads share a list; even for two halves."""
        return self.halves * max(1, min(MAX_WIDTH, self.rows // self.halves // readers))


def make_plan(
    indices: Tensor,
    block_size: int,
    query_block: int,
    layout: SequenceLayout,
    heads: tuple[int, int],
    lengths: tuple[int, int],
    max_rows: int = 128,
    shape: Shape | None = None,
    room: int | None = None,
) -> Plan:
    """Cut a call into tiles; reads the device twice, or not at all while a CUDA graph is captured.

    A captured call takes the tiles of the last call of its kind, and room for all blocks there could be.

    Args:
        indices: ``[B, HS, NQ, S]``.
        block_size: Keys in a block.
        query_block: Queries that share one list.
        layout: Position of the queries, padding and packing.
        heads: ``(HQ, H)``.
        lengths: ``(TQ, TK)``.
        max_rows: Rows that fit the memory of a program.
        shape: Shape of the tiles; chosen from the lists when None.
        room: Blocks that the tiles list together, where that is known.
    """
    readers = readers_of(heads, indices.shape[1], max_rows)

    if heads[1] < indices.shape[1] < heads[0] // readers:
        raise ValueError(f"{indices.shape[1]} block lists for {heads[0]} query and {heads[1]} key heads")

    if indices.shape[1] > 1 and indices.shape[1] < heads[0] // readers:  # more than 64 heads share a list
        indices = indices.repeat_interleave(heads[0] // readers // indices.shape[1], 1)

    # Shape of the tiles
    blind = capturing(indices)
    kind = (readers, query_block, max_rows, indices.shape[3], block_size)
    if shape is None and blind:
        shape = _last_shapes.get(kind) or shape_options(indices, readers, query_block, max_rows)[0]
    elif shape is None:
        shape = _last_shapes[kind] = choose_shape(indices, readers, query_block, max_rows)

    width = shape.width(readers)
    tiles = tile_table(layout, indices.shape[0], *lengths, width, block_size, query_block, indices.device)

    if blind:
        most = min(lists_per_tile(width, query_block) * indices.shape[3], -(-lengths[1] // block_size))
        room = indices.shape[0] * indices.shape[1] * tiles.shape[1] * most

    unions = unite(indices, tiles, width, block_size, query_block, room, shape.halves)
    documents = 0 if layout.cu_seqlens is None else layout.cu_seqlens.shape[0]
    return Plan(
        rows=shape.rows, halves=shape.halves, width=width, readers=readers, lists=indices.shape[1],
        block_size=block_size, tiles=tiles, block_rows=lengths[1] // block_size + 1 + documents,
        unions=unions, exact=not blind,
    )  # fmt: skip


_last_shapes: dict[tuple[int, ...], Shape] = {}


def capturing(x: Tensor) -> bool:
    """Return whether a CUDA graph is being captured: the device may not be read then."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def readers_of(heads: tuple[int, int], lists: int, most: int = 64) -> int:
    """Return how many query heads share a list and a key head in one tile, at most 64 or ``most``."""
    group = heads[0] // heads[1] if lists <= heads[1] else 1
    return max(n for n in range(1, min(group, most, 64) + 1) if group % n == 0)


def choose_shape(indices: Tensor, readers: int, query_block: int, max_rows: int = 128) -> Shape:
    """Return the shape of tiles that cost least, from the unions of a sample of neighbouring lists.

    A key of the union costs one load for the tile and one row of matrix products for each of its rows; the
    tiles serve ``width`` queries. Lists without locality end at small tiles.
    """
    options = shape_options(indices, readers, query_block, max_rows)

    batch, heads, count, size = indices.shape
    wide = min(count, max(1, options[0].width(readers) // query_block))
    if len(options) == 1 or wide == 1 or not indices.numel():
        return options[0]

    # A sample of runs of ``wide`` neighbouring lists
    steps = count // wide
    n = torch.arange(min(SAMPLES, steps * batch * heads), device=indices.device)
    begin = (n * steps // len(n) * wide)[:, None] + torch.arange(wide, device=n.device)
    sample = indices[(n % batch)[:, None], (n // batch % heads)[:, None], begin].long()  # [n, wide, S]

    def union(queries: int) -> Tensor:
        lists = min(wide, max(1, queries // query_block))
        return union_sizes(sample[:, : wide // lists * lists].reshape(-1, lists * size)).double().mean()

    costs = []
    for shape in options:
        width, blocks = shape.width(readers), union(shape.width(readers))
        work = blocks if shape.halves == 1 else union(width // 2)
        cost = (work * shape.rows + blocks * LOAD_ROWS) / width
        costs.append(cost if shape.halves == 1 else cost / HALVES_COST)
    return options[int(torch.stack(costs).argmin())]


def shape_options(indices: Tensor, readers: int, query_block: int, max_rows: int) -> list[Shape]:
    """Return the possible shapes of tiles, most rows first and whole tiles before halves."""
    least = max(16, 1 << (readers - 1).bit_length())
    rows = [n for n in ROWS if least <= n <= max(least, max_rows)]

    whole = [Shape(rows=n) for n in rows]
    whole = [x for x in whole if 2 * x.width(readers) * readers > x.rows]
    whole = [x for x in whole if _listed(x, readers, query_block, indices) <= MAX_LISTED]

    half = Shape(rows=HALVED, halves=2)
    if Shape(rows=HALVED) in whole and half.width(readers) > query_block:
        whole.insert(1, half)
    return whole or [Shape(rows=least)]


def _listed(shape: Shape, readers: int, query_block: int, indices: Tensor) -> int:
    lists = max(1, shape.width(readers) // query_block)
    return (1 << (lists - 1).bit_length()) * (1 << (indices.shape[3] - 1).bit_length())


def tile_table(
    layout: SequenceLayout,
    batch: int,
    num_queries: int,
    num_keys: int,
    width: int,
    block_size: int,
    query_block: int,
    device: torch.device,
) -> Tensor:
    """Return the tiles of each batch row, ``[B, NT, 8]`` int32, without reading the device.

    Columns: first query, number of queries (0 for a spare tile), key slot of the first query, first key slot
    of its document, key slot behind its document, number of the document's first block among all of the row,
    first list, and how many queries of that list lie before the tile. Tiles never cross documents.
    """
    zero = torch.zeros((), dtype=torch.int64, device=device)

    if layout.cu_seqlens is None:
        first = width * torch.arange(-(-num_queries // width), device=device)
        count = (num_queries - first).clamp(max=width)
        starts = zero[None] if layout.start is None else layout.start.to(device)
        columns = (
            first, count, first + layout.offset, starts[:, None], zero + num_keys, zero,
            first // query_block, first % query_block,
        )  # fmt: skip
    else:
        bounds, queries = layout.cu_seqlens.long(), layout.query_bounds(num_queries).long()
        tile_base, list_base, block_base = (
            torch.nn.functional.pad(((x.diff() + n - 1) // n).cumsum(0), (1, 0))
            for x, n in ((queries, width), (queries, query_block), (bounds, block_size))
        )

        # A tile's document is the last that begins at or before it; spare tiles are behind the last document.
        tile = torch.arange(num_queries // width + len(bounds) - 1, device=device)
        document = torch.bucketize(tile, tile_base[1:], right=True)
        real = document < len(bounds) - 1

        document = document.clamp(max=len(bounds) - 2)
        inner = ((tile - tile_base[document]) * width).where(real, 0)
        first = queries[document] + inner
        count = (queries[document + 1] - first).clamp(max=width).where(real, 0)
        columns = (
            first, count, first + layout.offset, bounds[document], bounds[document + 1],
            block_base[document], list_base[document] + inner // query_block, inner % query_block,
        )  # fmt: skip

    assert len(columns) == COLUMNS  # why: the table is built above, and read by these numbers
    return torch.stack([x.expand(batch, len(first)) for x in columns], -1).to(torch.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Readers:
    """The tiles that read each block, in work items of bounded length.

    Attributes:
        items: ``[NI, 4]`` int64: block row (``-1`` for a spare item), first and last entry, and the slot of
            the partial sum it writes (``-1``: it is the block's only item and writes the result).
        entry_tiles: ``[E]`` int32, ``g * NT + t`` for tile t and the g-th list head of the key head.
        entry_members: ``[E]`` int64, members of the entries in this order.
        key_heads: Lists of readers per batch row: 1 when all heads share them, else H.
        sums: ``[NS, 4]`` int64: block row, first entry, first slot, items; for each block with several items,
            and others, which are skipped, where the device was not read.
        slots: Partial sums.
    """

    items: Tensor
    entry_tiles: Tensor
    entry_members: Tensor
    key_heads: int
    sums: Tensor
    slots: int


def invert(plan: Plan, num_kv_heads: int) -> Readers:
    """Return which tiles read each block, from which blocks each tile reads; tiles stay in ascending order.

    A block read by many tiles (the first one is read by all) is cut into items of a length that depends on
    the sizes alone, whose partial sums are added in a fixed order. Reads the device once, if the plan did.
    """
    batch, num_tiles = plan.tiles.shape[:2]
    unions = plan.unions
    device = unions.blocks.device
    total = unions.blocks.shape[0]
    key_heads = min(plan.lists, num_kv_heads)
    per_key = plan.lists // key_heads

    # Tile, list head and block row of each entry
    entry = torch.arange(total, device=device)
    lists = torch.searchsorted(unions.bounds[1:], entry, right=True).clamp(max=unions.bounds.shape[0] - 2)
    tile, head = lists % num_tiles, lists // num_tiles  # head = b * HS + l

    row = head // plan.lists
    base = plan.tiles[:, :, 5].flatten()[row * num_tiles + tile]
    num_rows = batch * key_heads * plan.block_rows
    block_row = (head // per_key) * plan.block_rows + base + unions.blocks
    block_row = block_row.where(entry < unions.bounds[-1], num_rows)  # room that is left goes last

    # Sorted by block row, and in it by tile: the sort is stable.
    order = block_row.sort(stable=True)
    first = torch.searchsorted(order.values, torch.arange(num_rows + 1, device=device))

    # Cut the entries of each block row into items of at most ``length``.
    length = max(32, 1 << (4 * total // max(1, num_rows)).bit_length())
    parts = (first.diff() + length - 1) // length
    begin = torch.nn.functional.pad(parts.cumsum(0), (1, 0))

    item = torch.arange(total // length + min(num_rows, total), device=device)
    block = torch.bucketize(item, begin[1:], right=True)
    real = block < num_rows
    block = block.clamp(max=num_rows - 1)

    # Blocks with several items get a slot for each partial sum.
    several = parts > 1
    slot = torch.nn.functional.pad(parts.where(several, 0).cumsum(0), (1, 0))
    part = item - begin[block]

    low = first[block] + part * length
    high = torch.minimum(low + length, first[block + 1])

    items = torch.stack([
        block.where(real, -1), low.where(real, 0), high.where(real, 0),
        (slot[block] + part).where(several[block], -1),
    ], -1)  # fmt: skip

    if plan.exact:
        split = several.nonzero()[:, 0]  # reads the device
        slots = int(slot[-1]) if len(split) else 0
    else:  # a block with several items has more than length entries, so 2 * entries / length items suffice
        split = torch.arange(num_rows, device=device)
        slots = 2 * total // length

    sums = torch.stack([split, first[split], slot[split], parts[split]], -1)
    return Readers(
        items=items,
        entry_tiles=((head % per_key)[order.indices] * num_tiles + tile[order.indices]).to(torch.int32),
        entry_members=unions.members[order.indices],
        key_heads=key_heads,
        sums=sums,
        slots=slots,
    )
