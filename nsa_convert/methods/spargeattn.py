"""SpargeAttention (Zhang et al. 2025, arXiv 2502.18137): blocks by their means where a mean says enough.

A tile of queries and a block of keys are each replaced by their mean. Blocks whose tokens resemble each other
(mean cosine above a limit) are ranked by the product of the means; a block that does not is always read, and
a tile that does not reads everything. Written for causal models: the first block and those the
tile lies in are kept too. Values of a kept block are left out where its scores lie far below what a tile has
seen (``value_skip``). Nothing is quantised.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from nsa_convert.kernels.union.skipping import LEAST_ROWS, skipping_attention
from nsa_convert.methods.parts.base import AttentionInputs, MethodSpec, record
from nsa_convert.methods.parts.prefill import BlockPrefillMethod
from nsa_convert.methods.parts.tile_budgets import (
    BlockGrid,
    block_softmax,
    fraction,
    keep_mass,
    keep_top,
    mean_rows,
    share_in_group,
)
from nsa_convert.settings import at_least, between, one_or_more, raise_problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpargeAttnSettings:
    """Settings of SpargeAttention.

    Attributes:
        query_block: Queries in a tile.
        block_size: Keys in a block.
        budget: ``"top"`` keeps a part of all blocks, ``"mass"`` the fewest that hold a share of the softmax
            over the block means.
        top: Part of all key blocks of the call that each tile keeps; those always kept come on top.
        mass: Share of the softmax that the kept blocks hold.
        similarity: Least mean cosine of the tokens of a block, from -1 to 1.
        num_sink_blocks: First blocks always kept.
        share: ``"none"`` lets every query head choose (the paper); ``"group"`` sums the scores of the heads
            that share a key head.
        value_skip: The paper's lambda: values of a block are left out for a tile when its largest score lies
            further than this below the largest one before it, in every row. Negative; 0 leaves nothing out.
            Rounding may decide where a block lies exactly at the limit.
    """

    query_block: int = 128
    block_size: int = 64
    budget: Literal["top", "mass"] = "top"
    top: float = 0.5
    mass: float = 0.98
    similarity: float = -0.1
    num_sink_blocks: int = 1
    share: Literal["none", "group"] = "none"
    value_skip: float = 0.0

    def __post_init__(self) -> None:
        problems = one_or_more(("query_block", "block_size"), self)
        problems += at_least(0, num_sink_blocks=self.num_sink_blocks)
        problems += between("top", self.top, 0, 1) + between("mass", self.mass, 0, 1)
        problems += between("similarity", self.similarity, -1, 1)

        if not self.value_skip <= 0:
            problems.append(f"value_skip must be negative, or 0 to leave nothing out, got {self.value_skip}")
        if self.value_skip and self.query_block % LEAST_ROWS:
            problems.append(
                f"value_skip needs query_block to be a multiple of {LEAST_ROWS}, got {self.query_block}"
            )

        raise_problems(problems, code="CF22")

    @classmethod
    def at_share(cls, share: float, length: int) -> dict[str, Any]:
        """Return settings for a number in 0 .. 1, larger for more pairs of a prompt of ``length`` tokens."""
        return {"top": share}


class SpargeAttn(BlockPrefillMethod):
    """Block means, except where a block is not like its mean, while reading the prompt."""

    spec = MethodSpec(
        name="spargeattn",
        title="SpargeAttention",
        paper="arXiv:2502.18137",
        summary="the prompt is read by the best block means, and by blocks no mean stands for; no training",
        trainable=False,
        phases=("prefill",),
        granularity="blocks per tile of queries and query head",
        sources={
            "query_block": "the released code",
            "block_size": "the released code",
            "budget": "the released code recommends its top-k entry point",
            "top": "the released code's recommendation",
            "mass": "the released code's default (cdfthreshd)",
            "similarity": "the released code's recommendation (simthreshd1); 0.6 with mass",
            "num_sink_blocks": "the released code's attention_sink",
            "share": "the paper selects per query head",
            "value_skip": "off; the paper tunes it for each layer",
        },
        causal_selection=False,
    )
    Settings = SpargeAttnSettings

    def least_budget(self) -> int:
        """Return the blocks that are always kept."""
        return (self.settings.num_sink_blocks + 1) * self.settings.block_size

    def attend(self, x: AttentionInputs) -> Tensor:
        """Attend sparsely; with ``value_skip`` without values that can hardly count."""
        skip = self.settings.value_skip
        if not skip:
            return super().attend(x)

        patterns = self.patterns(x)
        record(self, x, x.k, patterns)
        (pattern,) = patterns.values()
        return skipping_attention(x.q, x.k, x.v, pattern, value_skip=skip, layout=x.layout, scale=x.scale)[0]

    def keep(self, x: AttentionInputs, grid: BlockGrid) -> Tensor:
        """Return the chosen blocks, bool ``[B, Hs, NQ, NK]``."""
        s, device, group = self.settings, x.q.device, self.geometry.group_size
        reach = grid.reach(device)

        # Which key blocks and query tiles resemble their mean.
        plain_keys = _self_similarity(x.k, grid.block_size) > s.similarity  # [B, H, NK]
        plain_queries = _self_similarity(x.q, grid.query_block) > s.similarity  # [B, HQ, NQ]
        ranked = reach & plain_keys.repeat_interleave(group, 1)[:, :, None]

        # A row without a block to rank reads what is always read.
        means = mean_rows(x.q, grid.query_block), mean_rows(x.k, grid.block_size)
        scores = block_softmax(*means, ranked, x.scale).nan_to_num(0.0)

        # Heads that choose together rank a block where one does, and read a whole tile where one does.
        if s.share == "group":
            scores = share_in_group(scores, group)
            ranked, plain_queries = (x.unflatten(1, (-1, group)) for x in (ranked, plain_queries))
            ranked = ranked.any(2)
            plain_queries = plain_queries.all(2)

        # The best of the ranked blocks.
        free = torch.zeros_like(reach)
        if s.budget == "top":
            kept = keep_top(scores, fraction(s.top, grid.num_blocks), free, ranked)
        else:
            kept = keep_mass(scores, s.mass, free, ranked)

        # Always read: forced blocks, blocks unlike their mean, and everything for tiles unlike theirs.
        forced = grid.forced(s.num_sink_blocks, 1, device)
        return (kept | ~ranked | ~plain_queries[..., None] | forced) & reach


def _self_similarity(x: Tensor, size: int) -> Tensor:
    """Return the mean cosine over all pairs of tokens of each run, ``[B, T, H, D]`` to ``[B, H, N]``.

    The mean over pairs of unit vectors is the squared length of their mean.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    unit = torch.nn.functional.normalize(wide, dim=-1)
    return mean_rows(unit, size).square().sum(-1).transpose(1, 2)
