"""H2O (Zhang et al. 2023, arXiv 2306.14048): keep the tokens that received most attention, and the last ones.

Every cached token carries the probability it has received from all queries so far. After each call the
``num_recent`` last tokens stay and, of the others, the ``num_heavy`` with the largest sum; what leaves is
gone, its sum too (greedy eviction, section 4). The query heads that share a key/value head add up their
probabilities and keep one set. Prompts are attended to densely. Positions are those of the text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from nsa_convert.config import AttentionGeometry
from nsa_convert.kernels.attention import dense_attention
from nsa_convert.methods.parts.base import (
    AttentionInputs,
    CacheNeeds,
    MethodSpec,
    Reach,
    SparseMethod,
    TrainingSpec,
    record,
)
from nsa_convert.methods.parts.budget import parts_of
from nsa_convert.methods.parts.cache_policy import CachePolicy
from nsa_convert.methods.parts.column_sums import attend_and_sum
from nsa_convert.settings import at_least, raise_problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeavyHitters(CachePolicy):
    """Keeps the last tokens and those with the largest ``memory["mass"] [B, N, H]``.

    Attributes:
        num_heavy: Earlier tokens that stay.
        num_recent: Trailing tokens that stay.
    """

    num_heavy: int
    num_recent: int
    per_token: ClassVar[tuple[str, ...]] = ("mass",)
    asks_attention: ClassVar[bool] = True

    def size(self, seen: int) -> int:
        """Return ``num_heavy + num_recent``, or all tokens while there are fewer."""
        return min(seen, self.num_heavy + self.num_recent)

    def keep(self, memory: Mapping[str, Tensor], start: Tensor, stay: Tensor, num_keys: int) -> Tensor:
        """Keep the last tokens and the heaviest others; equal sums go to the earlier token."""
        mass = memory["mass"]
        slots = torch.arange(num_keys, device=mass.device)

        # The last tokens come first; what lies before a row's first token comes last.
        mass = mass.masked_fill((slots >= num_keys - self.num_recent)[:, None], torch.inf)
        mass = mass.masked_fill((slots < start[:, None])[..., None], -torch.inf)

        # The rank of each token; a stable sort prefers the earlier of equal sums.
        order = mass.argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(1, order, slots[:, None].expand_as(order))
        return rank < stay[:, None, None]

    def numbers(self, seen: int, geometry: AttentionGeometry) -> int:
        """Return one sum for each kept token and head."""
        return self.size(seen) * geometry.num_kv_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class H2OSettings:
    """Settings of H2O.

    Attributes:
        num_heavy: Tokens that stay because of the attention they received.
        num_recent: Last tokens that stay.
    """

    num_heavy: int = 1024
    num_recent: int = 1024

    def __post_init__(self) -> None:
        problems = at_least(0, num_heavy=self.num_heavy) + at_least(1, num_recent=self.num_recent)
        raise_problems(problems, code="CF22")

    @classmethod
    def at_budget(cls, budget: int) -> dict[str, Any]:
        """Return the settings under which a query sees ``budget`` keys.

        Half of the budget is heavy, half is recent.
        """
        half = parts_of(budget, 2)
        return {"num_heavy": half, "num_recent": half}


class H2O(SparseMethod):
    """Dense attention over a cache that keeps heavy hitters."""

    spec = MethodSpec(
        name="h2o",
        title="H2O",
        paper="arXiv:2306.14048",
        summary="the cache keeps the tokens that received most attention, and the last ones; no training",
        trainable=False,
        phases=("decode",),
        granularity="cached tokens per key/value head",
        sources={
            "num_heavy": "the authors' summarisation scripts (1024 + 1024)",
            "num_recent": "the authors' summarisation scripts (1024 + 1024)",
        },
    )
    Settings = H2OSettings
    training_spec = TrainingSpec(stage_losses={})

    def cache_needs(self) -> CacheNeeds:
        """Keep heavy hitters and the last tokens."""
        recent = max(self.settings.num_recent, self.forced_budget or 0)
        return CacheNeeds(policy=HeavyHitters(num_heavy=self.settings.num_heavy, num_recent=recent))

    def reach(self) -> Reach:
        """Decoding reads what is kept and the query's own token; a prompt is read densely."""
        budget = self.settings.num_heavy + self.settings.num_recent
        return Reach(visible_budget=budget, decode_keys=budget + 1, prompt_keys=None)

    def forward(self, x: AttentionInputs) -> Tensor:
        """Attend to all that is left, and note who received how much; returns ``[B, TQ, HQ, D]``."""
        record(self, x, x.k, {})

        # Without a cache nothing is remembered.
        if x.memory is None:
            return dense_attention(x.q, x.k, x.v, layout=x.layout, scale=x.scale)

        # The query heads that share a key head add up their probabilities.
        o, received = attend_and_sum(x.q, x.k, x.v, layout=x.layout, scale=x.scale)
        mass = received.unflatten(2, (self.geometry.num_kv_heads, -1)).sum(3)  # [B, TK, H]

        # Add the sums of earlier calls, in which the tokens of this call have none.
        if "mass" in x.memory:
            mass = mass + functional.pad(x.memory["mass"], (0, 0, 0, x.q.shape[1]))
        x.memory["mass"] = mass

        return o
