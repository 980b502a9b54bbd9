"""StreamingLLM (Xiao et al. 2023, arXiv 2309.17453): the first tokens and a sliding window.

The rest is forgotten. The paper numbers keys by their place in the cache: a query that has a full cache
before it stands at place ``num_sinks + window_size - 1``, however far the text has come. Inside the window
this changes no distance, and the sinks stand where they stood in the text. So it is ordinary rotation with
one change: for the sinks the query is turned to that place (``positions: cache``). With ``positions:
absolute`` it is not; that is the mask form, which kernels for prompts and most other code have.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from nsa_convert.kernels.attention import dense_attention, sparse_attention
from nsa_convert.kernels.common.merge import merge_lse
from nsa_convert.methods.parts.base import (
    AttentionInputs,
    CacheNeeds,
    MethodSpec,
    Reach,
    SparseMethod,
    is_within_budget,
    record,
)
from nsa_convert.methods.parts.budget import band_of
from nsa_convert.methods.parts.cache_policy import KeepRecent
from nsa_convert.patterns import SinkWindow, TokenSelection
from nsa_convert.settings import at_least, raise_problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingSettings:
    """Settings of streaming heads.

    Attributes:
        num_sinks: Leading tokens every query sees.
        window_size: Trailing tokens every query sees, its own included.
        positions: ``"absolute"`` keeps the positions of the text; ``"cache"`` counts them in the cache, so
            that no distance exceeds ``num_sinks + window_size - 1``.
        cache: ``"evict"`` keeps in memory what a later query can see; ``"keep"`` keeps every token.
    """

    num_sinks: int = 4
    window_size: int = 1020
    positions: Literal["absolute", "cache"] = "absolute"
    cache: Literal["evict", "keep"] = "evict"

    def __post_init__(self) -> None:
        problems = at_least(0, num_sinks=self.num_sinks) + at_least(1, window_size=self.window_size)
        raise_problems(problems, code="CF22")

    @classmethod
    def at_budget(cls, budget: int) -> dict[str, Any]:
        """Return the settings under which a query sees ``budget`` keys.

        Four first tokens, the rest is window.
        """
        return band_of(budget)


class Streaming(SparseMethod):
    """A static band: sinks and a window."""

    spec = MethodSpec(
        name="streaming",
        title="StreamingLLM",
        paper="arXiv:2309.17453",
        summary="the first tokens and a sliding window, in constant memory",
        trainable=True,
        phases=("train", "prefill", "decode"),
        granularity="tokens, the same for every head",
        sources={
            "num_sinks": "paper section 3.2",
            "window_size": "paper section 4 (cache of 1024)",
            "positions": "the mask form; the paper's section 3.2 counts in the cache",
            "cache": "paper section 3.2",
        },
        parallel=("tensor",),
    )
    Settings = StreamingSettings

    def cache_needs(self) -> CacheNeeds:
        """Keep the sinks and what the next query's window holds."""
        if self.settings.cache == "keep":
            return CacheNeeds()
        return CacheNeeds(policy=KeepRecent(num_sinks=self.settings.num_sinks, num_recent=self._window() - 1))

    def reach(self) -> Reach:
        """Every query reads sinks and window."""
        budget = self.settings.num_sinks + self.settings.window_size
        return Reach(visible_budget=budget, decode_keys=budget, prompt_keys=budget)

    def forward(self, x: AttentionInputs) -> Tensor:
        """Attend to the band; returns ``[B, TQ, HQ, D]``."""
        s = self.settings
        fits = is_within_budget(self, x, s.num_sinks + s.window_size)
        moved = s.positions == "cache" and s.num_sinks > 0 and (x.dropped is not None or not fits)

        if fits and not moved:
            record(self, x, x.k, {})
            return dense_attention(x.q, x.k, x.v, layout=x.layout, scale=x.scale)

        band = SinkWindow(num_sinks=s.num_sinks, window_size=self._window())
        record(self, x, x.k, {"window": band})
        if moved:
            return self._attend_in_cache(x)
        return sparse_attention(x.q, x.k, x.v, band, layout=x.layout, scale=x.scale)[0]

    def _window(self) -> int:
        return max(self.settings.window_size, self.forced_budget or 0)

    def _attend_in_cache(self, x: AttentionInputs) -> Tensor:
        """Attend to the window, and to the sinks outside of it with the query turned to its place."""
        s, window = self.settings, self._window()

        # The place in a full cache at which the query stands for the sinks.
        position = x.positions()  # [B or 1, TQ]
        place = position.clamp(max=s.num_sinks + window - 1)
        assert x.move is not None
        q = x.move(x.q, position.clamp(min=0), place.clamp(min=0))

        # The sinks that lie outside of each query's window.
        length = x.q.shape[1]
        device = x.q.device
        behind = x.layout.positions(length, device) - x.layout.row_starts(length, device) - window
        sinks = torch.arange(s.num_sinks, device=device).expand(*behind.shape, -1)
        listed = sinks.where(sinks <= behind[..., None], -1)[:, None]  # [B or 1, 1, TQ, num_sinks]
        far = TokenSelection(token_indices=listed.expand(x.q.shape[0], -1, -1, -1))

        # Window and sinks are disjoint and share one softmax.
        near = SinkWindow(num_sinks=0, window_size=window)
        parts = [
            sparse_attention(queries, x.k, x.v, pattern, layout=x.layout, scale=x.scale)
            for queries, pattern in ((x.q, near), (q, far))
        ]
        return merge_lse(*zip(*parts, strict=True))[0]
