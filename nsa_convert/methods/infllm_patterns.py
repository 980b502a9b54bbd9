"""Which keys of the far past InfLLM has read, as patterns: for measurement, the computation needs none."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nsa_convert.patterns import BlockSelection, Pattern, TokenSelection


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lookup:
    """What one tile of queries found in the far past.

    Attributes:
        position: Of the first query in its document.
        num_queries: Queries of the tile.
        blocks: ``[n]`` int64, numbers of the blocks that were looked up.
        behind: First token behind all blocks; from there to the window every token is read.
    """

    position: int
    num_queries: int
    blocks: Tensor
    behind: int


def far_patterns(
    tiles: Sequence[Lookup], *, num_sinks: int, window_size: int, block_size: int
) -> dict[str, Pattern]:
    """Return what the queries of a document read beside first tokens and window.

    Args:
        tiles: The tiles of the queries in their order, all of one size but for the last.
        num_sinks: Tokens before the first block.
        window_size: Last tokens each query sees, its own included.
        block_size: Tokens of a block.

    Returns:
        ``"blocks"``, one list for each tile, and ``"between"``, for each query the tokens between the last
        block and its window. Each token is in one of them at most; what is empty is left out.
    """
    found = {
        "blocks": _looked_up(tiles, num_sinks, block_size),
        "between": _between(tiles, window_size),
    }
    return {name: pattern for name, pattern in found.items() if pattern.budget}


def _looked_up(tiles: Sequence[Lookup], num_sinks: int, block_size: int) -> BlockSelection:
    # Blocks begin behind the first tokens, those of a pattern at 0: this size divides both.
    size = math.gcd(num_sinks, block_size)
    inside = torch.arange(block_size // size, device=tiles[0].blocks.device)
    lists = [((num_sinks + tile.blocks[:, None] * block_size) // size + inside).flatten() for tile in tiles]
    padded = torch.nn.utils.rnn.pad_sequence(lists, batch_first=True, padding_value=-1)  # [NQ, S]
    return BlockSelection(block_indices=padded[None, None], block_size=size, query_block=tiles[0].num_queries)


def _between(tiles: Sequence[Lookup], window_size: int) -> TokenSelection:
    device = tiles[0].blocks.device
    counts = torch.tensor([tile.num_queries for tile in tiles], device=device)
    behind = torch.tensor([tile.behind for tile in tiles], device=device).repeat_interleave(counts)
    positions = torch.arange(len(behind), device=device) + tiles[0].position
    read = (positions - window_size + 1 - behind).clamp(min=0)  # [TQ]
    inside = torch.arange(int(read.max()), device=device)
    tokens = (behind[:, None] + inside).where(inside < read[:, None], -1)
    return TokenSelection(token_indices=tokens.int()[None, None])
