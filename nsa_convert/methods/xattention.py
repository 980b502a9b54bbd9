"""XAttention (Xu et al. 2025, arXiv 2503.16428): blocks by the sums of their antidiagonals, untrained.

Every S-th key is compared with every S-th query, running against each other, so that each sum crosses all
antidiagonals of an S x S patch. A tile of queries keeps the fewest blocks that hold a share of the estimated
attention; the first block and its own are always kept.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from nsa_convert.methods.parts.base import AttentionInputs, MethodSpec
from nsa_convert.methods.parts.prefill import BlockPrefillMethod
from nsa_convert.methods.parts.tile_budgets import (
    BlockGrid,
    keep_mass,
    share_in_group,
    sum_runs,
)
from nsa_convert.settings import at_least, between, one_or_more, raise_problems

SCORE_BYTES = 1 << 25
"""Scores of token groups that are held at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class XAttentionSettings:
    """Settings of XAttention.

    Attributes:
        block_size: Tokens in a block of keys, and queries in a tile; a multiple of ``stride``.
        stride: S, tokens in a group: the cost of choosing is 1 / S of that of dense scores.
        threshold: tau, share of the estimated attention that the kept blocks hold.
        num_sink_blocks: First blocks always kept.
        num_local_blocks: Last blocks always kept, the tile's own included.
        share: ``"none"`` lets every query head choose (the paper); ``"group"`` sums the estimates of the
            heads that share a key head.
    """

    block_size: int = 128
    stride: int = 16
    threshold: float = 0.9
    num_sink_blocks: int = 1
    num_local_blocks: int = 1
    share: Literal["none", "group"] = "none"

    def __post_init__(self) -> None:
        problems = one_or_more(("block_size", "stride", "num_local_blocks"), self)
        problems += at_least(0, num_sink_blocks=self.num_sink_blocks)
        problems += between("threshold", self.threshold, 0, 1)

        if not problems and self.block_size % self.stride:
            problems.append(f"block_size {self.block_size} must be a multiple of stride {self.stride}")

        raise_problems(problems, code="CF22")

    @property
    def query_block(self) -> int:
        """Queries in a tile."""
        return self.block_size

    @classmethod
    def at_share(cls, share: float, length: int) -> dict[str, Any]:
        """Return settings for a number in 0 .. 1, larger for more pairs of a prompt of ``length`` tokens."""
        return {"threshold": share, "stride": 8}


class XAttention(BlockPrefillMethod):
    """Antidiagonal block scores with a threshold on their sum, while reading the prompt."""

    spec = MethodSpec(
        name="xattention",
        title="XAttention",
        paper="arXiv:2503.16428",
        summary="the prompt is read by blocks that hold most of the antidiagonal scores; no training",
        trainable=False,
        phases=("prefill",),
        granularity="blocks per tile of queries and query head",
        sources={
            "block_size": "the released code",
            "stride": "the released code's class default; its benchmarks use 8 and 16",
            "threshold": "the released code's scripts",
            "num_sink_blocks": "the released code keeps the first block",
            "num_local_blocks": "the released code keeps the diagonal",
            "share": "the released code selects per query head",
        },
        causal_selection=False,
    )
    Settings = XAttentionSettings

    def least_budget(self) -> int:
        """Return the blocks that are always kept."""
        s = self.settings
        return (s.num_sink_blocks + s.num_local_blocks) * s.block_size

    def keep(self, x: AttentionInputs, grid: BlockGrid) -> Tensor:
        """Return the chosen blocks, bool ``[B, Hs, NQ, NK]``."""
        s = self.settings
        device = x.q.device
        scores = antidiagonal_scores(x.q, x.k, grid, s.stride, x.scale)

        if s.share == "group":
            scores = share_in_group(scores, self.geometry.group_size)

        forced = grid.forced(s.num_sink_blocks, s.num_local_blocks, device)
        return keep_mass(scores, s.threshold, forced, grid.reach(device))


def antidiagonal_scores(q: Tensor, k: Tensor, grid: BlockGrid, stride: int, scale: float) -> Tensor:
    """Return the attention that tiles are estimated to give blocks.

    Group i of queries and group j of keys score ``sum_r q[i S + S - 1 - r] k[j S + r] scale / S``; tokens
    after the end count as 0. A group of queries has one softmax over the key groups that begin in its past.

    Args:
        q: ``[B, TQ, HQ, D]``.
        k: ``[B, TK, H, D]``.
        grid: Tiles and blocks; ``stride`` divides both sizes.
        stride: S.
        scale: Factor on the scores.

    Returns:
        ``[B, HQ, NQ, NK]`` float32 or float64; the rows of a whole tile sum to query_block / S.
    """
    # A group of S tokens is one vector of S * D numbers, that of queries in reverse order.
    heads = k.shape[2]
    rows = grid.query_block // stride
    qg = _groups(q, stride).flip(2).unflatten(3, (heads, -1))  # [B, NG, S, H, G, D]
    qg = qg.permute(0, 3, 4, 1, 2, 5).flatten(4)  # [B, H, G, NG, S * D]
    kg = _groups(k, stride).permute(0, 3, 1, 2, 4).flatten(3)  # [B, H, CG, S * D]

    # As many groups of queries at once as the limit allows, in whole tiles.
    out = q.new_zeros(q.shape[0], q.shape[2], grid.num_tiles, grid.num_blocks, dtype=_wide(q.dtype))
    item = out.dtype.itemsize * q.shape[0] * q.shape[2] * kg.shape[2]
    step = max(1, SCORE_BYTES // (item * rows)) * rows

    begins = stride * torch.arange(kg.shape[2], device=q.device)
    for i in range(0, qg.shape[3], step):
        part = qg[:, :, :, i : i + step]

        # Key groups that begin in the past of the last query of some group of this part.
        last = grid.offset + stride * (i + torch.arange(part.shape[3], device=q.device)) + stride - 1
        seen = min(kg.shape[2], int(last[-1]) // stride + 1)
        scores = torch.matmul(part, kg[:, :, None, :seen].mT).flatten(1, 2)  # [B, HQ, n, seen]

        # One softmax for each group of queries, then sums over the groups of blocks and tiles.
        scores = scores.to(out.dtype).mul_(scale / stride)
        scores.masked_fill_(begins[:seen] > last[:, None], -torch.inf)
        summed = sum_runs(sum_runs(scores.softmax(-1), grid.block_size // stride, 3), rows, 2)
        out[:, :, i // rows : i // rows + summed.shape[2], : summed.shape[3]] = summed

    return out


def _groups(x: Tensor, size: int) -> Tensor:
    """Return ``[B, T, H, D]`` as groups of tokens ``[B, ceil(T / size), size, H, D]``, zeros at the end."""
    short = -x.shape[1] % size
    return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, short)).unflatten(1, (-1, size))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
