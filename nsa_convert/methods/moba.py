"""MoBA, Mixture of Block Attention (Lu et al. 2025, arXiv 2502.13189): every query head picks its own blocks.

A block's key is the mean of its token keys; a query head keeps the blocks with the largest product and always
its own block, which counts as one of the k (section 2.2 and the released code). Here the first block is kept
too: a dense model needs its attention sink. One softmax joins the blocks. There is nothing to initialise,
unless a short convolution mixes neighbouring keys (FlashMoBA, Xiao et al. 2025, arXiv 2511.11571).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from nsa_convert.config import AttentionGeometry
from nsa_convert.kernels.compressed import block_topk
from nsa_convert.methods.parts.base import (
    AttentionInputs,
    CacheNeeds,
    InitialisedModule,
    MethodSpec,
    Pool,
    Reach,
)
from nsa_convert.methods.parts.budget import HeadBudget, widened
from nsa_convert.methods.parts.selection import NO_REUSE, SelectingMethod
from nsa_convert.patterns import BlockSelection

MAX_TAPS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoBASettings(HeadBudget):
    """Settings of MoBA.

    Attributes:
        block_size: Tokens in a block.
        num_blocks: k, blocks a query sees, its own and other forced ones included.
        num_sink_blocks: First blocks always selected.
        num_local_blocks: Last blocks always selected, the query's own included.
        share: ``"none"`` lets every query head choose (the paper); ``"group"`` sums the scores of the heads
            that share a key head, which costs one list per key head.
        key_conv: Neighbouring tokens whose keys are mixed before RoPE (FlashMoBA, section 4: 3 or 5); 0 for
            none. The convolution starts at the dense model.
        decode: ``"sparse"``, or ``"dense"`` as published: a step of one token attends to everything.
        reuse_from: Earlier layer whose selection this one attends to; -1 for its own.
        mode: ``"sparse"``, or ``"full"`` for dense attention with the same weights.
    """

    block_size: int = 128
    num_blocks: int = 16
    num_sink_blocks: int = 1
    num_local_blocks: int = 1
    key_conv: int = 0
    decode: Literal["sparse", "dense"] = "sparse"
    mode: Literal["sparse", "full"] = "sparse"
    reuse_from: int = NO_REUSE

    def problems(self) -> list[str]:
        """Return what is wrong with the convolution."""
        allowed = self.key_conv == 0 or 2 <= self.key_conv <= MAX_TAPS
        return [] if allowed else [f"key_conv must be 0 or 2 to {MAX_TAPS}, got {self.key_conv}"]


class KeyConv(InitialisedModule):
    """A causal convolution over the keys of each head and coordinate, added to the key (arXiv:2511.11571).

    ``k'_t = k_t + SiLU(sum_l w_l * k_{t - l})``. The weight starts at 0, so keys start unchanged; SiLU has
    slope 1/2 there.

    Args:
        num_heads: H.
        head_dim: D.
        taps: Tokens it reaches, the own one included.
    """

    def __init__(self, num_heads: int, head_dim: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, taps))
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        """Return zeros."""
        return {"weight": torch.zeros(self.weight.shape)}

    def forward(self, taps: Sequence[Tensor]) -> Tensor:
        """Return the mixed keys ``[B, T, H, D]``."""
        own, *before = (w * x for w, x in zip(self.weight.unbind(-1), taps, strict=True))
        return taps[0] + functional.silu(sum(before, start=own))


class MoBA(SelectingMethod):
    """Mean-pooled block selection per query head with one softmax."""

    spec = MethodSpec(
        name="moba",
        title="MoBA",
        paper="arXiv:2502.13189",
        summary="every query head attends to its own best mean-pooled blocks; no new weights",
        trainable=True,
        phases=("train", "prefill", "decode"),
        granularity="blocks per query token and query head",
        sources={
            "block_size": "FlashMoBA (arXiv:2511.11571) section 5",
            "num_blocks": "receptive field 2048",
            "num_sink_blocks": "added for conversion: a dense model needs its attention sink",
            "num_local_blocks": "paper section 2.2 (the current block)",
            "share": "paper section 2.2",
            "key_conv": "off; FlashMoBA trains with 3 or 5",
            "decode": "the paper decodes densely; sparse here",
            "mode": "paper section 3.2 (hybrid training)",
            "reuse_from": "every layer chooses; GLM-5.2 shares an index among 4 layers",
        },
        parallel=("tensor", "context"),
    )
    Settings = MoBASettings

    def __init__(self, settings: MoBASettings, geometry: AttentionGeometry, layer_index: int) -> None:
        super().__init__(settings, geometry, layer_index)

        sizes = geometry.num_kv_heads, geometry.head_dim, settings.key_conv
        self.key_conv = KeyConv(*sizes) if settings.key_conv else None

    def mix_keys(self, taps: Sequence[Tensor]) -> Tensor:
        """Return the keys through the convolution."""
        return taps[0] if self.key_conv is None or self.forced_budget is not None else self.key_conv(taps)

    def pools(self) -> tuple[Pool, ...]:
        """Return the block means of the keys."""
        size = self.settings.block_size
        heads = range(self.geometry.num_kv_heads)
        return (Pool(name="key", source="key", heads=heads, width=size, stride=size),)

    def cache_needs(self) -> CacheNeeds:
        """Return the block means, and the neighbours that the convolution mixes."""
        return dataclasses.replace(super().cache_needs(), key_taps=max(1, self.settings.key_conv))

    def reach(self) -> Reach:
        """Dense decoding reads everything, and leaves the prompt sparse."""
        reach = super().reach()
        return dataclasses.replace(reach, decode_keys=None) if self.settings.decode == "dense" else reach

    def compress(self, name: str, windows: Tensor) -> Tensor:
        """Return the mean key of each block."""
        return windows.mean(2)

    def is_dense(self, x: AttentionInputs) -> bool:
        """Return whether this call attends to everything: also a step of one token if decoding is dense."""
        step = self.settings.decode == "dense" and x.q.shape[1] == 1 and self.forced_budget is None
        return step or super().is_dense(x)

    def choose(self, x: AttentionInputs) -> BlockSelection:
        """Rank by softmax over the blocks: the order of the products, since the choice is per head."""
        ck, size = x.pooled["key"], self.settings.block_size
        rule = widened(self.settings.rule, self.forced_budget)
        return block_topk(x.q, ck, width=size, stride=size, rule=rule, layout=x.layout, scale=x.scale)
