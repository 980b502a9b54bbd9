"""Selected blocks for many queries: a tile of neighbouring queries walks the union of its blocks once.

Neighbouring queries choose nearly the same blocks, so the union over 16 to 64 of them is about twice one
list. Every query still sees its own blocks only, token by token: the result is exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from nsa_convert.kernels.common.segments import Segment, segments
from nsa_convert.kernels.common.tiles import TilePlan, Tiles, attend_tiles
from nsa_convert.kernels.interval.causal import plan_causal
from nsa_convert.kernels.union.lists import CHUNK_BYTES, Lists, batches, runs, segment_lists
from nsa_convert.kernels.union.shared import shared_tiles, tile_width
from nsa_convert.patterns import BlockSelection, SequenceLayout, query_tiles

WIDTHS = (64, 32, 16, 8, 4, 2, 1)
SAMPLES = 32
PLAN_ENTRIES = 1 << 16
"""List entries whose unions are worked out at once."""

GATHER_ROWS = 12
"""Fetching one key and value for a tile costs about as much as this many rows of its matrix products."""


def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockSelection, layout: SequenceLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """Return ``(o [B, TQ, HQ, D], lse [B, TQ, HQ])``; time and memory O(T * S * block_size)."""
    return attend_tiles(q, k, v, plan_blocks(q, k, pattern, layout), scale)


def plan_blocks(q: Tensor, k: Tensor, pattern: BlockSelection, layout: SequenceLayout) -> TilePlan:
    """Return the tiles of listed blocks for ``q [B, TQ, HQ, D]`` and ``k [B, TK, H, D]``."""
    parts = list(segments(layout, q.shape[0], q.shape[1], k.shape[1]))
    tiles = query_tiles(q.shape[1], pattern.query_block, layout, q.device)

    if _lists_everything(pattern, tiles, parts):
        return plan_causal(q, k, layout)

    num_heads = q.shape[2]
    num_lists = pattern.block_indices.shape[1]
    group = num_heads // k.shape[2]
    readers = group if num_lists <= k.shape[2] else 1  # query heads that share a list and a key head

    token_bytes = 2 * k.shape[3] * k.element_size()
    width = tile_width(pattern.query_block)

    def plan() -> Iterator[Tiles]:
        for segment in parts:
            for i in range(num_lists):
                lists = segment_lists(pattern, tiles, segment, i)

                served = range(0, num_heads, readers)
                heads = [x for x in served if x * num_lists // num_heads == i]
                shared = shared_tiles(lists, width, token_bytes) if width else None
                for chunk in shared or _united(lists, choose_width(lists, readers), token_bytes):
                    for x in heads:
                        yield dataclasses.replace(chunk, head=x // group, heads=(x, x + readers))

    return plan


def _lists_everything(pattern: BlockSelection, tiles: Tensor, parts: list[Segment]) -> bool:
    """Return whether every query lists every block up to its own: then this is dense attention."""
    size = pattern.block_size
    if any(part.num_keys > pattern.budget for part in parts):
        return False

    for part in parts:
        begin, end = part.queries

        # A list that shows its last query everything shows it to all its queries.
        last = tiles[begin:end].diff(append=tiles[end - 1 : end] + 1).nonzero()[:, 0]
        indices = pattern.block_indices[part.row][:, tiles[begin + last]]

        own = (part.offset + last)[:, None].clamp(max=max(0, part.num_keys - 1)) // size
        listed = ((indices >= 0) & (indices <= own)).sum(-1, keepdim=True)
        if not torch.equal(listed, (own + 1).expand_as(listed)):
            return False
    return True


def choose_width(lists: Lists, readers: int) -> int:
    """Return how many neighbouring queries form a tile, from the unions of a sample of tiles.

    A key of the union costs one fetch for the tile and one row of matrix products for each query and head.
    """
    total = lists.positions.shape[0]
    wide = WIDTHS[0]
    if total <= wide:
        return total

    # Lists of every query in a sample of the widest tiles
    first = lists.aligned % wide
    steps = (total - first) // wide
    starts = first + wide * torch.arange(0, steps, max(1, steps // SAMPLES), device=lists.positions.device)
    queries = starts[:, None] + torch.arange(wide, device=starts.device)
    sample = lists.indices[lists.list_of[queries]]  # [n, wide, S]

    costs = []
    for width in WIDTHS:
        union = union_sizes(sample.reshape(-1, width * sample.shape[2])).double().mean().item()
        costs.append(union * (1 + GATHER_ROWS / (width * readers)))
    return WIDTHS[costs.index(min(costs))]


def union_sizes(indices: Tensor) -> Tensor:
    """Return how many different blocks each row ``[n, M]`` lists, ``[n]``."""
    ordered = indices.sort(-1).values
    fresh = ordered[:, 1:] != ordered[:, :-1]
    return fresh.sum(-1) + (ordered[:, 0] >= 0) - (fresh & (ordered[:, 1:] < 0)).sum(-1)


def _united(lists: Lists, width: int, token_bytes: int) -> Iterator[Tiles]:
    """Yield the tiles of one segment and one selecting head; head and heads are set by the caller."""
    step = max(1, PLAN_ENTRIES // (width * max(1, lists.indices.shape[1])))
    for run in runs(lists, width, step):
        yield from _chunks(lists, *run, token_bytes)


def _chunks(lists: Lists, begin: int, count: int, width: int, token_bytes: int) -> Iterator[Tiles]:
    """Yield tiles whose gathered keys fit the memory bound; head and heads are set by the caller."""
    where = slice(begin, begin + count * width)
    position = lists.positions[where].view(count, width, 1)
    chosen = lists.indices[lists.list_of[where]].view(count, width, -1)  # [n, W, S]
    chosen = chosen.masked_fill(chosen > position // lists.block_size, -1)
    if not chosen.shape[-1]:  # lists of no block
        chosen = chosen.new_full((*chosen.shape[:2], 1), -1)

    blocks, member, sizes = union(chosen)  # [n, U], [n, W, U], n integers

    block_bytes = lists.block_size * (token_bytes + 3 * width)
    for part, largest in batches(sizes, block_bytes, CHUNK_BYTES):
        known = blocks[part, :largest], member[part, :, :largest]
        yield _tiles(lists, begin + part.start * width, position[part], *known)


def _tiles(lists: Lists, begin: int, position: Tensor, blocks: Tensor, member: Tensor) -> Tiles:
    """Turn ``blocks [n, U]`` and ``member [n, W, U]`` into tiles of keys, causal token by token."""
    size = lists.block_size
    segment = lists.segment

    keys = (blocks[..., None] * size + torch.arange(size, device=blocks.device)).flatten(1)  # [n, L]
    visible = member[..., None].expand(-1, -1, -1, size).flatten(2) & (keys[:, None] <= position)
    if segment.offset + segment.num_queries > segment.num_keys:
        visible &= keys[:, None] < segment.num_keys

    return Tiles(
        rows=(segment.row, segment.row + 1),
        head=0,
        heads=(0, 0),
        begin=segment.queries[0] + begin,
        count=member.shape[0],
        width=member.shape[1],
        keys=keys.clamp(max=segment.num_keys - 1) + segment.keys[0],
        visible=visible,
        alive=member.any(-1),
    )


def union(chosen: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Return the blocks that any query of a tile lists, and who lists which.

    Args:
        chosen: ``[n, W, S]`` int64, -1 where unused.

    Returns:
        ``(blocks [n, U] int64, member [n, W, U] bool, sizes)``; U is the largest union of the n tiles, its
        size for each tile is in ``sizes``; the slots after it hold block 0 and have no member.
    """
    n, width, size = chosen.shape
    ordered, order = chosen.flatten(1).sort(-1)  # unused entries first

    # The first of each run of equal blocks gets the next slot.
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    fresh &= ordered >= 0

    slot = fresh.cumsum(-1)  # 1, 2, ... for the blocks, 0 for unused entries
    sizes = slot[:, -1].tolist()
    largest = max(1, *sizes)
    blocks = ordered.new_zeros(n, largest + 1).scatter_(1, slot, ordered)[:, 1:]

    # Back in the order of the lists, a query is a member of the slot of each block it lists.
    slot_of = torch.empty_like(slot).scatter_(1, order, slot).view(n, width, size)
    member = torch.zeros(n, width, largest + 1, dtype=torch.bool, device=chosen.device)
    return blocks, member.scatter_(2, slot_of, True)[..., 1:], sizes
