"""MInference (Jiang et al. 2024, arXiv 2407.02490): one of three patterns for each query head, untrained.

- vertical-slash: the key tokens (verticals) and the diagonals (slashes) with most attention from the last
  queries of the prompt. Diagonals are read as the blocks they touch, tokens outside of these one by one.
- A-shape: the first tokens and a window, as the blocks they touch.
- block-sparse: the blocks with the largest product of mean query and mean key.

Which head has which pattern is searched offline (:mod:`nsa_convert.evaluation.heads.pattern_search`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from nsa_convert.methods.parts.base import AttentionInputs, MethodSpec
from nsa_convert.methods.parts.last_queries import last_attention
from nsa_convert.methods.parts.prefill import PrefillMethod
from nsa_convert.methods.parts.tile_budgets import (
    BlockGrid,
    block_softmax,
    blocks_of,
    compact_lists,
    keep_top,
    mean_rows,
)
from nsa_convert.patterns import Pattern, TokenSelection
from nsa_convert.settings import at_least, one_or_more, raise_problems

KINDS = ("vertical_and_slash", "stream_llm", "block_sparse")
"""Names of the patterns, as the published head files spell them."""

LAST_QUERIES = 64
SURE_VERTICALS = 30
"""First tokens that are always among the best."""
SURE_SLASHES = 100
"""Nearest diagonals that are always among the best."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MInferenceSettings:
    """Settings of MInference.

    Attributes:
        block_size: Tokens in a block of keys, and queries in a tile.
        vertical_size: Key tokens a vertical-slash head keeps.
        slash_size: Diagonals it keeps.
        head_patterns: For each query head ``[pattern, first, second]``: ``vertical_and_slash`` with numbers
            of tokens and diagonals, ``stream_llm`` with first tokens and window, ``block_sparse`` with a
            number of blocks and an unused one. Empty: every head is vertical-slash with the sizes above.
        chunks: ``"refuse"`` a prompt that arrives in chunks; ``"own"`` lets each call choose from its own
            last queries.
    """

    block_size: int = 64
    vertical_size: int = 1000
    slash_size: int = 6096
    head_patterns: list = ()  # type: ignore[assignment]  # a list in JSON, frozen as a tuple below
    chunks: Literal["refuse", "own"] = "refuse"

    def __post_init__(self) -> None:
        object.__setattr__(self, "head_patterns", _frozen(self.head_patterns))

        problems = one_or_more(("block_size",), self)
        problems += at_least(SURE_VERTICALS, vertical_size=self.vertical_size)
        problems += at_least(SURE_SLASHES, slash_size=self.slash_size)
        for i, head in enumerate(self.head_patterns):
            problems += [f"head_patterns[{i}]: {problem}" for problem in head_problems(head)]

        raise_problems(problems, code="CF22")

    @property
    def default_head(self) -> tuple[str, int, int]:
        """Pattern of heads that none is listed for."""
        return ("vertical_and_slash", self.vertical_size, self.slash_size)

    @classmethod
    def at_share(cls, share: float, length: int) -> dict[str, Any]:
        """Return settings for a number in 0 .. 1, larger for more pairs of a prompt of ``length`` tokens."""
        return {"vertical_size": 64, "slash_size": max(100, round(share * length))}


def head_problems(head: Any) -> list[str]:
    """Return what is wrong with the pattern of a head."""
    if not _is_list(head) or len(head) != 3 or head[0] not in KINDS:
        return [f"expected [pattern, number, number] with a pattern of {', '.join(KINDS)}, got {head!r}"]

    # The second number of a block-sparse head is not used; any number may stand there.
    least = (1, 1) if head[0] != "block_sparse" else (1, 0)
    whole = all(isinstance(x, int) and not isinstance(x, bool) for x in head[1:])
    if whole and all(x >= limit for x, limit in zip(head[1:], least, strict=True)):
        return []
    return [f"sizes must be whole numbers from 1, got {head!r}"]


def _frozen(patterns: Any) -> tuple[Any, ...]:
    return tuple(tuple(x) if _is_list(x) else x for x in patterns)


def _is_list(x: Any) -> bool:
    return isinstance(x, (list, tuple))


class MInference(PrefillMethod):
    """Vertical-slash, A-shape or block-sparse for each query head, while reading the prompt."""

    needs_prompt_end = True
    spec = MethodSpec(
        name="minference",
        title="MInference",
        paper="arXiv:2407.02490",
        summary="each head reads the prompt by tokens and diagonals or another fixed pattern; no training",
        trainable=False,
        phases=("prefill",),
        granularity="tokens and blocks per query head",
        sources={
            "block_size": "the released code",
            "vertical_size": "the released code, for heads that were not searched",
            "slash_size": "the released code, for heads that were not searched",
            "head_patterns": "searched per model; the published files can be imported",
            "chunks": "the choice is made from the last queries of the prompt",
        },
        causal_selection=False,
    )
    Settings = MInferenceSettings

    def __init__(self, settings: MInferenceSettings, geometry: Any, layer_index: int) -> None:
        super().__init__(settings, geometry, layer_index)

        listed = len(settings.head_patterns)
        wanted = geometry.num_query_heads
        if listed not in (0, wanted):
            raise_problems([f"head_patterns lists {listed} query heads, the layer has {wanted}"], code="CF22")

        self.patterns_by_head = settings.head_patterns or (settings.default_head,) * wanted

    def least_budget(self) -> int:
        """Return the longest prompt of which every head sees everything."""
        return min(least_budget(head, self.settings.block_size) for head in self.patterns_by_head)

    def patterns(self, x: AttentionInputs) -> dict[str, Pattern]:
        """Return blocks for all heads, and the single tokens of vertical-slash heads."""
        grid = BlockGrid(
            num_queries=x.q.shape[1],
            offset=int(x.layout.offset),
            query_block=self.settings.block_size,
            block_size=self.settings.block_size,
        )
        reach = grid.reach(x.q.device)

        # While a budget is forced every head sees all blocks.
        if self.forced_budget is not None:
            return {"selected": blocks_of(reach.expand(x.q.shape[0], x.q.shape[2], -1, -1), grid)}

        with torch.no_grad():
            keep, columns = self.choose(x, grid)
            keep = (keep | grid.forced(0, 1, x.q.device)) & reach
            patterns: dict[str, Pattern] = {"selected": blocks_of(keep, grid)}
            if columns is not None:
                patterns["columns"] = outside_tokens(columns, keep, grid)

        return patterns

    def choose(self, x: AttentionInputs, grid: BlockGrid) -> tuple[Tensor, Tensor | None]:
        """Return blocks, bool ``[B, HQ, NQ, NK]``, and tokens for all tiles, bool ``[B, HQ, TK]`` or None."""
        batch = x.q.shape[0]
        heads = x.q.shape[2]
        keep = torch.zeros(batch, heads, grid.num_tiles, grid.num_blocks, dtype=torch.bool, device=x.q.device)

        # Heads of one pattern at a time; the attention of the last queries is computed once for all heads.
        columns = by_token = by_distance = None
        for pattern in sorted(set(self.patterns_by_head)):
            kind, first, second = pattern
            served = [i for i, other in enumerate(self.patterns_by_head) if other == pattern]
            if kind == "vertical_and_slash":
                if by_token is None or by_distance is None or columns is None:
                    by_token, by_distance = last_attention(x.q, x.k, LAST_QUERIES, x.scale)
                    columns = torch.zeros_like(by_token, dtype=torch.bool)
                columns[:, served] = largest_shares(by_token[:, served], first, SURE_VERTICALS)
                slashes = largest_shares(by_distance[:, served], second, SURE_SLASHES)
                keep[:, served] = slash_blocks(slashes, grid)
            elif kind == "stream_llm":
                keep[:, served] = band_blocks(grid, first, second, x.q.device)
            else:
                keep[:, served] = self._best_blocks(x, grid, first)[:, served]

        return keep, columns

    def _best_blocks(self, x: AttentionInputs, grid: BlockGrid, count: int) -> Tensor:
        """Return the blocks with the best means, bool ``[B, HQ, NQ, NK]``."""
        reach = grid.reach(x.q.device)
        means = mean_rows(x.q, grid.query_block), mean_rows(x.k, grid.block_size)
        scores = block_softmax(*means, reach, x.scale)
        return keep_top(scores, count, grid.forced(0, 1, x.q.device), reach)


def least_budget(head: tuple[str, int, int], block_size: int) -> int:
    """Return the longest prompt of which a head sees everything."""
    kind, first, second = head
    budgets: dict[str, Callable[[], int]] = {
        # Every token is a vertical, or every diagonal a slash.
        "vertical_and_slash": lambda: max(first, second),
        "stream_llm": lambda: first + second,
        "block_sparse": lambda: first * block_size,
    }
    return budgets[kind]()


def largest_shares(shares: Tensor, count: int, sure: int) -> Tensor:
    """Return the ``count`` largest entries of each row, the first ``sure`` among them, as booleans."""
    total = shares.shape[-1]
    ranked = shares.clone()
    ranked[..., :sure] = torch.inf

    best = ranked.sort(dim=-1, descending=True, stable=True).indices[..., : min(count, total)]
    return torch.zeros_like(shares, dtype=torch.bool).scatter_(-1, best, True)


def slash_blocks(slashes: Tensor, grid: BlockGrid) -> Tensor:
    """Return the blocks that the diagonals touch.

    Args:
        slashes: Bool ``[B, Hs, TK]``, by the number of tokens between query and key.
        grid: Tiles and blocks.

    Returns:
        Bool ``[B, Hs, NQ, NK]``.
    """
    first, last = (y[:, None] for y in grid.tiles(slashes.device))
    begin = grid.block_size * torch.arange(grid.num_blocks, device=slashes.device)
    # Query p and key c are on diagonal p - c: the tile and the block share the diagonals low .. high.
    low = first - (begin + grid.block_size - 1)
    high = last - begin

    # Count the kept diagonals up to each one: a range holds one where the counts at its ends differ.
    below = torch.nn.functional.pad(slashes.cumsum(-1, dtype=torch.int32), (1, 0))
    size = slashes.shape[-1]
    return below[:, :, (high + 1).clamp(0, size)] > below[:, :, low.clamp(0, size)]


def band_blocks(grid: BlockGrid, num_sinks: int, window: int, device: torch.device) -> Tensor:
    """Return the blocks that first tokens and a window touch, bool ``[NQ, NK]``."""
    first, last = (y[:, None] for y in grid.tiles(device))
    begin = grid.block_size * torch.arange(grid.num_blocks, device=device)
    in_window = begin + grid.block_size - 1 > first - window
    return ((begin < num_sinks) | in_window) & (begin <= last)


def outside_tokens(columns: Tensor, keep: Tensor, grid: BlockGrid) -> TokenSelection:
    """Return for each tile the tokens that no kept block holds.

    Args:
        columns: Bool ``[B, HQ, TK]``.
        keep: Bool ``[B, HQ, NQ, NK]``.
        grid: Tiles and blocks.
    """
    tokens = compact_lists(columns)  # [B, HQ, V]
    listed = (tokens >= 0)[:, :, None]

    # A tile reads the tokens that lie in its past and in none of its kept blocks.
    place = tokens.clamp(min=0).long()
    block = (place // grid.block_size)[:, :, None].expand(-1, -1, grid.num_tiles, -1)
    past = place[:, :, None] <= grid.tiles(columns.device)[1][:, None]
    wanted = listed & past & ~keep.gather(3, block)

    lists = torch.where(wanted, tokens[:, :, None], -1)
    return TokenSelection(token_indices=lists, query_block=grid.query_block)
