"""From scores of key blocks for tiles of queries to block lists: the budgets that prefill methods share.

A block map ``[B, Hs, NQ, NK]`` has one entry for each selecting head, tile of queries and block of keys.
Scores are such a map of numbers, a choice is one of booleans. Forced blocks come first in every budget.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

from nsa_convert.patterns import BlockSelection


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockGrid:
    """How one unpadded sequence is cut into tiles of queries and blocks of keys.

    Tiles count from the first query of the call, blocks from the first key.

    Attributes:
        num_queries: TQ.
        offset: Keys before the first query; TK = offset + TQ.
        query_block: Queries in a tile.
        block_size: Keys in a block.
    """

    num_queries: int
    offset: int
    query_block: int
    block_size: int

    @property
    def num_keys(self) -> int:
        """TK."""
        return self.offset + self.num_queries

    @property
    def num_tiles(self) -> int:
        """NQ."""
        return -(-self.num_queries // self.query_block)

    @property
    def num_blocks(self) -> int:
        """NK."""
        return -(-self.num_keys // self.block_size)

    def tiles(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the positions of the first and the last query of each tile, ``[NQ]`` each."""
        first = self.offset + self.query_block * torch.arange(self.num_tiles, device=device)
        return first, (first + self.query_block - 1).clamp(max=self.num_keys - 1)

    def reach(self, device: torch.device) -> Tensor:
        """Return the blocks that hold a key for some query of the tile, bool ``[NQ, NK]``."""
        last = self.tiles(device)[1]
        return torch.arange(self.num_blocks, device=device) <= last[:, None] // self.block_size

    def forced(self, num_sinks: int, num_local: int, device: torch.device) -> Tensor:
        """Return the blocks that are always chosen, bool ``[NQ, NK]``.

        Args:
            num_sinks: First blocks of the sequence.
            num_local: Last blocks before the tile, those the tile lies in counted as one.
            device: Where to put the map.
        """
        first, last = (x[:, None] // self.block_size for x in self.tiles(device))
        block = torch.arange(self.num_blocks, device=device)
        return ((block < num_sinks) | (block > first - num_local)) & (block <= last)


def mean_rows(x: Tensor, size: int) -> Tensor:
    """Return the means of runs of ``size`` tokens of ``[B, T, H, D]``, the last run as long as it is.

    Returns:
        ``[B, ceil(T / size), H, D]``.
    """
    return sum_runs(x, size, 1) / run_lengths(x.shape[1], size, x.device).to(x.dtype)[:, None, None]


def sum_runs(x: Tensor, size: int, dim: int) -> Tensor:
    """Return the sums over runs of ``size`` entries along ``dim``, the last run as long as it is."""
    x = x.movedim(dim, -1)
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % size))
    return x.unflatten(-1, (-1, size)).sum(-1).movedim(-1, dim)


def run_lengths(total: int, size: int, device: torch.device) -> Tensor:
    """Return how many of ``total`` tokens lie in each run of ``size``, int64."""
    begin = size * torch.arange(-(-total // size), device=device)
    return (total - begin).clamp(max=size)


def block_softmax(q: Tensor, k: Tensor, reach: Tensor, scale: float) -> Tensor:
    """Return the attention of pooled queries to pooled keys, float32 or float64.

    Args:
        q: ``[B, NQ, HQ, D]``.
        k: ``[B, NK, H, D]``.
        reach: Entries of the softmax, bool; broadcasts to ``[B, HQ, NQ, NK]``; each row has one.
        scale: Factor on the scores.

    Returns:
        ``[B, HQ, NQ, NK]``, 0 outside of ``reach``.
    """
    rows = q.unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4)  # [B, H, G, NQ, D]
    keys = k.permute(0, 2, 3, 1)[:, :, None]  # [B, H, 1, D, NK]
    scores = torch.matmul(rows, keys).flatten(1, 2)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return (scores * scale).masked_fill(~reach, -torch.inf).softmax(-1)


def keep_top(scores: Tensor, count: int, forced: Tensor, reach: Tensor) -> Tensor:
    """Keep the best blocks of each row, forced ones counted; equal scores go to the earlier block.

    Args:
        scores: ``[B, Hs, NQ, NK]``.
        count: Blocks of a row; more where more are forced.
        forced: Bool, broadcasts to the scores.
        reach: Bool, broadcasts to the scores.

    Returns:
        Bool ``[B, Hs, NQ, NK]``.
    """
    ranked = scores.masked_fill(forced, torch.inf).masked_fill(~reach, -torch.inf)
    best = ranked.sort(dim=-1, descending=True, stable=True).indices[..., : max(0, count)]
    return torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, best, True) & reach | forced & reach


def keep_mass(
    scores: Tensor, share: float | Tensor, forced: Tensor, reach: Tensor, scope: Literal["row", "map"] = "row"
) -> Tensor:
    """Keep the fewest blocks that, with the forced ones, hold a share of the scores.

    Args:
        scores: ``[B, Hs, NQ, NK]``, not negative, 0 outside of ``reach``.
        share: Part of the sum to reach; broadcasts to ``[B, Hs, NQ]`` (``[B, Hs]`` for a map).
        forced: Bool, broadcasts to the scores.
        reach: Bool, broadcasts to the scores.
        scope: Sum over each row, or over the whole map of a head.

    Returns:
        Bool ``[B, Hs, NQ, NK]``.
    """
    forced, reach = (x.expand(scores.shape) for x in (forced & reach, reach))
    free = scores.masked_fill(forced | ~reach, 0.0)
    if scope == "map":
        free = free.flatten(2)
        forced_sum = (scores * forced).sum((2, 3))
        total = scores.sum((2, 3))
    else:
        forced_sum = (scores * forced).sum(-1)
        total = scores.sum(-1)

    # From the best on, a block is kept while those before it hold less than the share.
    ordered, order = free.sort(dim=-1, descending=True, stable=True)
    before = forced_sum[..., None] + ordered.cumsum(-1) - ordered
    wanted = (before < (total * share)[..., None]) & (ordered > 0)

    kept = torch.zeros_like(wanted).scatter_(-1, order, wanted).view(scores.shape)
    return kept & reach | forced


def share_in_group(scores: Tensor, group: int) -> Tensor:
    """Sum the scores of the query heads that share a key head, ``[B, HQ, ...]`` to ``[B, H, ...]``."""
    return scores.unflatten(1, (-1, group)).sum(2)


def blocks_of(keep: Tensor, grid: BlockGrid) -> BlockSelection:
    """Return the blocks of a map as ascending lists.

    Args:
        keep: Bool ``[B, Hs, NQ, NK]``.
        grid: How the map was made.
    """
    return BlockSelection(
        block_indices=compact_lists(keep), block_size=grid.block_size, query_block=grid.query_block
    )


def compact_lists(keep: Tensor) -> Tensor:
    """Return the places of the true entries of each row in ascending order, then -1.

    Args:
        keep: Bool ``[..., N]``.

    Returns:
        ``[..., S]`` int32, S the most entries of a row, at least 1.
    """
    slot = keep.cumsum(-1, dtype=torch.int32)
    size = max(1, int(slot[..., -1].max())) if slot.numel() else 1
    lists = torch.full((*keep.shape[:-1], size + 1), -1, dtype=torch.int32, device=keep.device)

    # Each true entry writes its place to the next slot of its row, the others to a slot that is cut off.
    places = torch.arange(keep.shape[-1], dtype=torch.int32, device=keep.device).expand(keep.shape)
    target = torch.where(keep, slot - 1, size).long()
    return lists.scatter_(-1, target, places)[..., :size].contiguous()


def fraction(part: float, whole: int) -> int:
    """Return a part of a number of blocks, at least one."""
    return max(1, math.ceil(part * whole))
