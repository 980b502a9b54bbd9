"""FlexPrefill (Lai et al. 2025, arXiv 2502.20766): block columns and diagonals, as many as a head needs.

The last tile of queries attends to everything. Each head keeps the block columns (verticals) and block
diagonals (slashes) that hold a share gamma of that attention. Where attention between block means predicts
the columns well (Jensen-Shannon distance below tau), the head is query-aware: it adds the blocks of the whole
map that hold a share gamma of the attention between block means.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from nsa_convert.methods.parts.base import AttentionInputs, MethodSpec
from nsa_convert.methods.parts.last_queries import last_attention
from nsa_convert.methods.parts.prefill import BlockPrefillMethod
from nsa_convert.methods.parts.tile_budgets import (
    BlockGrid,
    block_softmax,
    keep_mass,
    mean_rows,
    sum_runs,
)
from nsa_convert.settings import at_least, between, one_or_more, raise_problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlexPrefillSettings:
    """Settings of FlexPrefill.

    Attributes:
        block_size: Tokens in a block of keys, and queries in a tile.
        gamma: Share of the attention that the kept parts hold.
        tau: Jensen-Shannon distance below which a head is query-aware.
        min_budget: Least tokens of verticals, and of slashes; a shorter prompt is attended to densely.
        max_budget: Most tokens of verticals, and of slashes; 0 for no limit.
        chunks: ``"refuse"`` a prompt that arrives in chunks; ``"own"`` lets each call choose from its own
            last queries.
    """

    block_size: int = 128
    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 1024
    max_budget: int = 0
    chunks: Literal["refuse", "own"] = "refuse"

    def __post_init__(self) -> None:
        problems = one_or_more(("block_size", "min_budget"), self)
        problems += at_least(0, max_budget=self.max_budget)
        problems += between("gamma", self.gamma, 0, 1) + between("tau", self.tau, 0, 1)

        if 0 < self.max_budget < self.min_budget:
            problems.append(f"max_budget {self.max_budget} is smaller than min_budget {self.min_budget}")

        raise_problems(problems, code="CF22")

    @property
    def query_block(self) -> int:
        """Queries in a tile."""
        return self.block_size

    @classmethod
    def at_share(cls, share: float, length: int) -> dict[str, Any]:
        """Return settings for a number in 0 .. 1, larger for more pairs of a prompt of ``length`` tokens."""
        return {"gamma": share, "min_budget": 128}


class FlexPrefill(BlockPrefillMethod):
    """Query-aware or vertical-slash blocks for each head, while reading the prompt."""

    needs_prompt_end = True
    spec = MethodSpec(
        name="flexprefill",
        title="FlexPrefill",
        paper="arXiv:2502.20766",
        summary="each head reads the prompt by the block columns and diagonals it needs; no training",
        trainable=False,
        phases=("prefill",),
        granularity="blocks per tile of queries and query head",
        sources={
            "block_size": "the released code",
            "gamma": "the released code; its scripts take 0.95 for Llama 3.1 and GLM-4",
            "tau": "the released code",
            "min_budget": "the released code",
            "max_budget": "the released code sets none",
            "chunks": "the choice is made from the last queries of the prompt",
        },
        causal_selection=False,
    )
    Settings = FlexPrefillSettings

    def least_budget(self) -> int:
        """Return the longest prompt that is attended to densely."""
        return max(2 * self.settings.block_size, self.settings.min_budget)

    def keep(self, x: AttentionInputs, grid: BlockGrid) -> Tensor:
        """Return the chosen blocks, bool ``[B, HQ, NQ, NK]``."""
        s = self.settings
        reach = grid.reach(x.q.device)

        # Attention of the last tile of queries, summed over block columns and block diagonals.
        columns, diagonals = last_attention(x.q, x.k, grid.block_size, x.scale)
        verticals, slashes = (sum_runs(y, grid.block_size, 2) for y in (columns, diagonals))  # [B, HQ, NK]

        # A query-aware head keeps the minimum of each, any other head as many as hold gamma.
        aware = self._distance(x, verticals) < s.tau  # [B, HQ]
        least = torch.full_like(aware, max(1, s.min_budget // grid.block_size), dtype=torch.long)
        counts = [torch.where(aware, least, self._needed(y, grid)) for y in (columns, diagonals)]
        kept_columns = _best(verticals, counts[0])
        kept_diagonals = _best(slashes, counts[1])

        # The map of these blocks; query-aware heads add the blocks of the pooled map that hold gamma.
        kept = kept_columns[:, :, None] | on_diagonals(kept_diagonals, grid)
        pooled = mean_rows(x.q, grid.query_block), mean_rows(x.k, grid.block_size)
        scores = block_softmax(*pooled, reach, x.scale)
        by_query = keep_mass(scores, s.gamma, torch.zeros_like(reach), reach, scope="map")

        # The blocks that the tile itself lies in are always kept.
        return (kept | by_query & aware[..., None, None]) & reach | grid.forced(0, 1, x.q.device)

    def _needed(self, shares: Tensor, grid: BlockGrid) -> Tensor:
        """Return how many blocks the tokens fill that hold gamma of ``[B, HQ, N]``, within the budgets."""
        s = self.settings
        ordered = shares.sort(-1, descending=True).values
        tokens = (ordered.cumsum(-1) < s.gamma * shares.sum(-1, keepdim=True)).sum(-1)

        # Whole blocks, within the budgets.
        blocks = tokens // grid.block_size + 1
        most = s.max_budget // grid.block_size if s.max_budget else grid.num_blocks
        return blocks.clamp(min=max(1, s.min_budget // grid.block_size)).clamp(max=max(1, most))

    def _distance(self, x: AttentionInputs, verticals: Tensor) -> Tensor:
        """Return the Jensen-Shannon distance of true and pooled attention of the last tile, ``[B, HQ]``."""
        size = self.settings.block_size
        q, everything = x.q[:, -size:].mean(1, keepdim=True), torch.ones((), dtype=torch.bool).to(x.q.device)

        # The attention of the mean query to the block means, against the true share of each block column.
        guess = block_softmax(q, mean_rows(x.k, size), everything, x.scale)[:, :, 0]

        mean = (guess + verticals) / 2
        parts = (torch.special.xlogy(p, p / mean).nan_to_num(0.0).sum(-1) for p in (guess, verticals))
        return (sum(parts) / 2).clamp(min=0).sqrt()


def _best(scores: Tensor, counts: Tensor) -> Tensor:
    """Return the ``counts`` best entries of each row, the first one always among them."""
    first = torch.nn.functional.pad(scores[..., 1:], (1, 0), value=torch.inf)
    order = first.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.arange(scores.shape[-1], device=scores.device)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, rank < counts[..., None])


def on_diagonals(kept: Tensor, grid: BlockGrid) -> Tensor:
    """Return the blocks on block diagonals, bool ``[B, HQ, NQ, NK]``.

    Args:
        kept: Bool ``[B, HQ, NK]``, by the number of blocks between a query and a key.
        grid: Tiles and blocks; a tile that lies in two blocks has two diagonals of each number.
    """
    block = torch.arange(grid.num_blocks, device=kept.device)
    out = torch.zeros(*kept.shape[:2], grid.num_tiles, grid.num_blocks, dtype=torch.bool, device=kept.device)
    for position in grid.tiles(kept.device):
        distance = position[:, None] // grid.block_size - block
        out |= kept[:, :, distance.clamp(min=0)] & (distance >= 0)
    return out
