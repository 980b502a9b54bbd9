"""Lists that many neighbouring queries share: a tile reads one list as it is, without a union.

Prefill methods choose once for 64 or 128 queries and for each query head. No list is repeated for its
queries, and only the blocks around the tile itself need a mask.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nsa_convert.kernels.common.tiles import Tiles
from nsa_convert.kernels.union.lists import Lists, batches, runs

SHARED_QUERIES = 16
"""Lists of fewer queries are united with their neighbours."""

CHUNK_BYTES = 1 << 20
"""Keys and values gathered at once: tiles are batched while their lists are short, for long ones padding
each other's lists costs more than calls."""

MAX_WIDTH = 256
PLAN_ENTRIES = 1 << 19
"""List entries that are sorted at once."""


def tile_width(query_block: int) -> int | None:
    """Return how many queries of a list form a tile, or None where lists are to be united."""
    width = next((w for w in range(min(query_block, MAX_WIDTH), 0, -1) if query_block % w == 0), 1)
    return width if width >= SHARED_QUERIES else None


def shared_tiles(lists: Lists, width: int, token_bytes: int) -> Iterator[Tiles]:
    """Yield the tiles of one segment and one selecting head; head and heads are set by the caller."""
    step = max(1, PLAN_ENTRIES // max(1, lists.indices.shape[1]))
    for begin, count, size in runs(lists, width, step):
        yield from _chunks(lists, begin, count, size, token_bytes)


def _chunks(lists: Lists, begin: int, count: int, width: int, token_bytes: int) -> Iterator[Tiles]:
    """Yield tiles whose gathered keys and mask fit the memory bound."""
    first = begin + width * torch.arange(count, device=lists.positions.device)
    positions = lists.positions[begin : begin + count * width].view(count, width)

    # Sort each list; entries that are unused or lie after the tile become one number past the last block.
    unused = -(-lists.segment.num_keys // lists.block_size)
    rows = lists.indices[lists.list_of[first]]
    rows = rows.masked_fill((rows < 0) | (rows > positions[:, -1:] // lists.block_size), unused)
    rows = rows.sort(-1).values  # unused entries last

    sizes = (rows < unused).sum(-1).tolist()

    # How many leading blocks every query of a tile sees as a whole: they need no mask.
    seen_by_all = positions[:, :1].clamp(max=lists.segment.num_keys - 1) + 1
    past = ((rows + 1) * lists.block_size <= seen_by_all).sum(-1).tolist()

    block_bytes = lists.block_size * (token_bytes + 3 * width)
    for part, largest in batches(sizes, block_bytes, CHUNK_BYTES):
        free = min(past[part]) * lists.block_size
        yield _tiles(lists, begin + part.start * width, positions[part], rows[part, :largest], free)


def _tiles(lists: Lists, begin: int, positions: Tensor, blocks: Tensor, free: int) -> Tiles:
    """Turn ``blocks [n, S]`` into the keys of n tiles; unused entries lie after every query."""
    size = lists.block_size
    segment = lists.segment
    keys = (blocks[..., None] * size + torch.arange(size, device=blocks.device)).flatten(1)  # [n, L]

    masked = keys[:, None, free:]
    visible = (masked <= positions[..., None]) & (masked < segment.num_keys)

    return Tiles(
        rows=(segment.row, segment.row + 1),
        head=0,
        heads=(0, 0),
        begin=segment.queries[0] + begin,
        count=positions.shape[0],
        width=positions.shape[1],
        keys=keys.clamp(max=segment.num_keys - 1) + segment.keys[0],
        visible=visible,
        alive=visible.any(-1),
        free=free,
    )
