"""RazorAttention (Tang et al. 2024, arXiv 2407.15891): heads that do not retrieve keep a window and a mean.

A head keeps its first tokens and its last ones; the others leave one compensation token behind, the mean of
their rotated keys and of their values, which counts as often as there were tokens: its score gets
``log(count)``. Retrieval heads keep everything; a head profile names them. Prompts are attended to densely.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from nsa_convert.config import AttentionGeometry
from nsa_convert.kernels.attention import dense_attention, sparse_attention
from nsa_convert.kernels.common.merge import merge_lse
from nsa_convert.methods.parts.base import (
    AttentionInputs,
    CacheNeeds,
    MethodSpec,
    Reach,
    SparseMethod,
    TrainingSpec,
    record,
)
from nsa_convert.methods.parts.budget import band_of
from nsa_convert.methods.parts.cache_policy import KeepRecent
from nsa_convert.patterns import SinkWindow
from nsa_convert.settings import at_least, raise_problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepRecentAndSums(KeepRecent):
    """Keeps the first and last tokens, and sums of the keys and values that left: ``[B, H, D]`` each.

    Attributes:
        share: The window holds at least one in ``share`` of the tokens seen; 0 for a constant window.
    """

    share: int

    def size(self, seen: int) -> int:
        """Return ``num_sinks + max(num_recent, seen / share)``, or all tokens while there are fewer."""
        grown = seen // self.share if self.share else 0
        return min(seen, self.num_sinks + max(self.num_recent, grown))

    def fold(self, memory: Mapping[str, Tensor], k: Tensor, v: Tensor, leaving: Tensor) -> dict[str, Tensor]:
        """Add what leaves to the sums."""
        sums = dict(memory)

        for name, x in (("key_sum", k), ("value_sum", v)):
            wide = torch.promote_types(x.dtype, torch.float32)
            left = torch.where(leaving[..., None], x.to(wide), 0.0).sum(1)
            sums[name] = left + sums[name] if name in sums else left

        return sums

    def numbers(self, seen: int, geometry: AttentionGeometry) -> int:
        """Return two sums for each head, once a token has left."""
        return 2 * geometry.num_kv_heads * geometry.head_dim if self.size(seen) < seen else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RazorSettings:
    """Settings of heads that do not retrieve.

    Attributes:
        num_sinks: First tokens that stay.
        window_size: Last tokens that stay, at least.
        window_share: The window holds at least one in so many of the tokens seen; 0 for a constant window.
        comp_bias: ``"log_count"`` weighs the compensation token with the number of tokens it stands for;
            ``"none"`` counts it once.
    """

    num_sinks: int = 4
    window_size: int = 4000
    window_share: int = 5
    comp_bias: Literal["log_count", "none"] = "log_count"

    def __post_init__(self) -> None:
        problems = at_least(0, num_sinks=self.num_sinks) + at_least(1, window_size=self.window_size)

        if self.window_share < 0 or self.window_share == 1:
            problems.append(f"window_share must be 0 or at least 2, got {self.window_share}")

        raise_problems(problems, code="CF22")

    @classmethod
    def at_budget(cls, budget: int) -> dict[str, Any]:
        """Return the settings under which a query sees ``budget`` keys.

        Four first tokens and a constant window.
        """
        return {**band_of(budget), "window_share": 0}


class Razor(SparseMethod):
    """Dense attention over sinks, a window and one compensation token."""

    spec = MethodSpec(
        name="razor",
        title="RazorAttention",
        paper="arXiv:2407.15891",
        summary="the cache keeps first and last tokens, and the mean of the others",
        trainable=False,
        phases=("decode",),
        granularity="cached tokens, the same for every head",
        sources={
            "num_sinks": "golden-stick (sink 4)",
            "window_size": "paper: buffer max(4000, N/5)",
            "window_share": "paper: buffer max(4000, N/5)",
            "comp_bias": "paper eqs. 4-5",
        },
    )
    Settings = RazorSettings
    training_spec = TrainingSpec(stage_losses={})

    def cache_needs(self) -> CacheNeeds:
        """Keep sinks, window and sums."""
        s = self.settings
        recent = max(s.window_size, self.forced_budget or 0)
        return CacheNeeds(
            policy=KeepRecentAndSums(num_sinks=s.num_sinks, num_recent=recent, share=s.window_share)
        )

    def reach(self) -> Reach:
        """Decoding reads what is kept of a short text, the own token and the compensation token."""
        budget = self.settings.num_sinks + self.settings.window_size
        return Reach(visible_budget=budget, decode_keys=budget + 2, prompt_keys=None)

    def forward(self, x: AttentionInputs) -> Tensor:
        """Attend to what is left and to the compensation token; returns ``[B, TQ, HQ, D]``."""
        record(self, x, x.k, {})

        # Nothing has been forgotten: a prompt, or a short text.
        if x.dropped is None:
            return dense_attention(x.q, x.k, x.v, layout=x.layout, scale=x.scale)

        # The kept tokens and the compensation token share one softmax.
        everything = SinkWindow(window_size=x.k.shape[1])
        parts = [sparse_attention(x.q, x.k, x.v, everything, layout=x.layout, scale=x.scale)]
        parts.append(self._compensation(x))
        return merge_lse(*zip(*parts, strict=True))[0]

    def _compensation(self, x: AttentionInputs) -> tuple[Tensor, Tensor]:
        """Return the attention to the compensation token alone: its value, and its score as lse."""
        dropped = x.dropped
        memory = x.memory
        assert dropped is not None
        assert memory is not None

        # The means of the keys and values that left, for each query head.
        count = dropped.to(memory["key_sum"].dtype)[:, None, None]  # [B, 1, 1]
        group = self.geometry.group_size
        key, value = (
            (memory[name] / count.clamp(min=1)).repeat_interleave(group, 1)
            for name in ("key_sum", "value_sum")
        )  # [B, HQ, D]

        # A single key: its score is the lse. It counts as often as there were tokens, and not at all if none.
        lse = torch.einsum("bthd,bhd->bth", x.q.to(key.dtype), key) * x.scale
        weight = count.log() if self.settings.comp_bias == "log_count" else torch.zeros_like(count)
        lse = lse + weight.masked_fill(count == 0, -torch.inf)

        return value[:, None].expand(*lse.shape, -1).to(x.q.dtype), lse
