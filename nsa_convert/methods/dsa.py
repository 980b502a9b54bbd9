"""DSA, DeepSeek Sparse Attention (DeepSeek-V3.2-Exp, arXiv 2512.02556), on grouped-query attention.

A lightning indexer scores every earlier token, ``I = sum_j w_j relu(q_j k)``; all heads attend to the same
best tokens. The indexer learns by KL to the attention mass summed over the heads: first over all tokens with
the model frozen and dense (``mode: full``), then over the selected ones while the model trains sparse.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from nsa_convert.config import AttentionGeometry
from nsa_convert.errors import ConfigError
from nsa_convert.kernels.indexed import token_topk
from nsa_convert.methods.parts.base import AttentionInputs, MethodSpec
from nsa_convert.methods.parts.index import INDEX_TRAINING, Index, IndexKey, index_weights
from nsa_convert.methods.parts.selection import NO_REUSE, SelectingMethod
from nsa_convert.patterns import TokenSelection
from nsa_convert.settings import raise_problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class DSASettings:
    """Settings of DSA.

    Attributes:
        num_tokens: Tokens a query sees, forced ones included.
        num_sinks: First tokens always selected.
        window_size: Last tokens always selected, the query's own included.
        index_key: ``"cached"`` scores with the layer's own keys and adds nothing to the cache; ``"shared"``
            has the published single key head (LayerNorm, RoPE), one more cached vector per token.
        index_heads: Index heads with ``"shared"`` keys; 0 stands for the number of key/value heads, which is
            what ``"cached"`` always has. Must divide the query heads.
        reuse_from: Earlier layer whose selection this one attends to; -1 for its own.
        mode: ``"sparse"``, or ``"full"`` for dense attention with the same weights (warm-up).
    """

    num_tokens: int = 2048
    num_sinks: int = 1
    window_size: int = 64
    index_key: IndexKey = "cached"
    index_heads: int = 0
    mode: Literal["sparse", "full"] = "sparse"
    reuse_from: int = NO_REUSE

    def __post_init__(self) -> None:
        problems = []

        if self.num_sinks < 0 or self.window_size < 1:
            problems.append(
                "num_sinks must be >= 0 and window_size >= 1 (a query always sees itself), "
                f"got {self.num_sinks} and {self.window_size}"
            )
        elif self.num_tokens < self.num_sinks + self.window_size:
            problems.append(
                f"num_tokens {self.num_tokens} is smaller than the forced tokens "
                f"({self.num_sinks} sinks + {self.window_size} window)"
            )

        if self.index_heads < 0:
            problems.append(f"index_heads must be >= 0, got {self.index_heads}")
        if self.index_heads and self.index_key == "cached":
            problems.append('index_heads belongs to index_key "shared"; cached keys have one index head each')

        raise_problems(problems, code="CF22")

    @classmethod
    def at_budget(cls, budget: int) -> dict[str, Any]:
        """Return the settings under which a query sees ``budget`` keys.

        Single tokens.
        """
        return {"num_tokens": budget}


class DSA(SelectingMethod):
    """A token-level lightning indexer shared by all heads."""

    spec = MethodSpec(
        name="dsa",
        title="DSA",
        paper="arXiv:2512.02556",
        summary="a learned index picks single tokens for all heads",
        trainable=True,
        phases=("train", "prefill", "decode"),
        granularity="tokens per query, the same for all heads",
        sources={
            "num_tokens": "paper section 2.2",
            "num_sinks": "added for conversion: a dense model needs its attention sink",
            "window_size": "added for conversion: the index knows no nearness",
            "index_key": "starts near the dense model; the paper has a shared key",
            "index_heads": "one per key/value head; the paper has 64",
            "mode": "paper section 2.3 (dense warm-up)",
            "reuse_from": "every layer chooses; GLM-5.2 shares an index among 4 layers",
        },
        couples_heads=True,
        parallel=("context",),
    )
    Settings = DSASettings
    training_spec = INDEX_TRAINING

    def __init__(self, settings: DSASettings, geometry: AttentionGeometry, layer_index: int) -> None:
        super().__init__(settings, geometry, layer_index)

        # One index head for each key/value head unless the settings say otherwise.
        heads = settings.index_heads or geometry.num_kv_heads
        if geometry.num_query_heads % heads:
            raise ConfigError(
                f"layer {layer_index} (dsa): index_heads {heads} must divide the {geometry.num_query_heads} "
                "query heads, whose means the index starts from",
                code="CF22",
            )

        # A layer that reuses a selection has no index of its own.
        if self.reuses:
            return

        self.index = Index(geometry, heads, settings.index_key)
        self.index_weights = index_weights(geometry.hidden_size, self.index.num_heads)

    def budget(self) -> int:
        """Return num_tokens."""
        return self.settings.num_tokens

    def choose(self, x: AttentionInputs) -> TokenSelection:
        """Return the best tokens of each query."""
        s, index = self.settings, self.own_index()
        return token_topk(
            index.queries(x),
            index.keys(x),
            self._weights(x.hidden),
            num_tokens=max(s.num_tokens, self.forced_budget or 0),
            num_sinks=s.num_sinks,
            window_size=s.window_size,
            layout=x.layout,
            scale=x.scale,
        )

    def index_scores(self, x: AttentionInputs, queries: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``[B, 1, NQ, TK]``: one list serves all heads."""
        products = self.own_index().products(x, queries, dtype).relu()
        weights = self._weights(x.hidden[:, queries]).to(dtype)
        return torch.einsum("bhnt,bnh->bnt", products, weights)[:, None]

    def _weights(self, hidden: Tensor) -> Tensor:
        """Return the weights of the index heads ``[B, T, HI]``, in the dtype of the map."""
        return self.index_weights(hidden.detach().to(self.index_weights.weight.dtype))
