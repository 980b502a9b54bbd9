"""The block lists of one sequence, and how its queries are cut into tiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nsa_convert.kernels.common.segments import Segment
from nsa_convert.patterns import BlockSelection

CHUNK_BYTES = 1 << 23
"""Keys, values and mask held at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lists:
    """The block lists of one segment for one selecting head.

    Attributes:
        indices: ``[NL, S]`` int64 block numbers, -1 where unused or out of reach.
        list_of: ``[TQ]`` which list each query of the segment uses.
        positions: ``[TQ]`` position of each query in its document.
        aligned: First query of the segment that begins a list; tiles start there.
        block_size: Keys in a block.
        segment: Where queries and keys lie.
    """

    indices: Tensor
    list_of: Tensor
    positions: Tensor
    aligned: int
    block_size: int
    segment: Segment


def segment_lists(pattern: BlockSelection, tiles: Tensor, segment: Segment, head: int) -> Lists:
    """Return the lists that one selecting head has for the queries of a segment."""
    begin, end = segment.queries
    positions = torch.arange(segment.offset, segment.offset + end - begin, device=tiles.device)
    list_of = tiles[begin:end] - tiles[begin]

    # The lists that the queries of the segment use
    first = int(tiles[begin])
    last = int(tiles[end - 1])
    indices = pattern.block_indices[segment.row, head, first : last + 1].long()
    num_blocks = -(-segment.num_keys // pattern.block_size)

    later = (list_of > 0).nonzero()  # a left-padded row may begin inside a tile of queries
    aligned = 0 if begin == 0 or segment.document or not len(later) else int(later[0])

    return Lists(
        indices=indices.masked_fill(indices >= num_blocks, -1),
        list_of=list_of,
        positions=positions,
        aligned=aligned,
        block_size=pattern.block_size,
        segment=segment,
    )


def runs(lists: Lists, width: int, step: int) -> Iterator[tuple[int, int, int]]:
    """Yield ``(first query of the segment, tiles, tile width)``; full tiles are aligned to lists.

    At most ``step`` tiles come at once.
    """
    total = lists.positions.shape[0]
    begin = min(total, lists.aligned % width)
    if begin:
        yield 0, 1, begin

    full = (total - begin) // width
    for i in range(0, full, step):
        yield begin + i * width, min(step, full - i), width

    rest = begin + full * width
    if rest < total:
        yield rest, 1, total - rest


def batches(sizes: Sequence[int], block_bytes: int, most: int) -> Iterator[tuple[slice, int]]:
    """Group neighbouring tiles whose lists, padded to the longest of a group, fit a memory bound.

    Args:
        sizes: Blocks in the list of each tile.
        block_bytes: Bytes that one block of one tile takes.
        most: Bytes a group may take; a single tile may take more.

    Yields:
        The tiles of a group, and the length of its longest list, at least 1.
    """
    first = 0
    while first < len(sizes):
        largest = max(1, sizes[first])
        last = first + 1
        while last < len(sizes) and max(largest, sizes[last]) * block_bytes * (last + 1 - first) <= most:
            largest = max(largest, sizes[last])
            last = last + 1
        yield slice(first, last), largest
        first = last
