"""DSA, DeepSeek Sparse Attention (DeepSeek-V3.2-Exp, arXiv 2512.02556), on grouped-query attention.

A lightning indexer scores every earlier token, ``I = sum_j w_j relu(q_j k)``; all heads attend to the same
best tokens. The indexer learns by KL to the attention mass summed over the heads: first over all tokens with
the model frozen and dense (``mode: full``), then over the selected ones while the model trains sparse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from nsa_convert.config import AttentionGeometry, raise_problems
from nsa_convert.errors import ConfigError
from nsa_convert.kernels.indexed import token_topk
from nsa_convert.methods.base import AttentionInputs, IndexSize, MethodSpec, TrainingMode
from nsa_convert.methods.index_losses import index_kl, listed_tokens, visible_tokens
from nsa_convert.methods.indexer import Index, IndexKey, index_weights
from nsa_convert.methods.losses import attention_mass, sample_queries
from nsa_convert.methods.selecting import NO_REUSE, SelectingMethod
from nsa_convert.patterns import TokenSelection


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
    )
    Settings = DSASettings
    couples_heads = True
    stage_losses = {
        "align": {"index_kl": 1.0}, "pretrain": {"index_kl": 1.0}, "extend": {"index_kl": 1.0},
        "sft": {"index_kl": 1.0},
    }

    def __init__(self, settings: DSASettings, geometry: AttentionGeometry, layer_index: int) -> None:
        super().__init__(settings, geometry, layer_index)
        heads = settings.index_heads or geometry.num_kv_heads
        if geometry.num_query_heads % heads:
            raise ConfigError(
                f"layer {layer_index} (dsa): index_heads {heads} must divide the {geometry.num_query_heads} "
                "query heads, whose means the index starts from",
                code="CF22",
            )
        if self.reuses:
            return
        self.index = Index(geometry, heads, settings.index_key)
        self.index_weights = index_weights(geometry.hidden_size, self.index.num_heads)

    @property
    def cached_streams(self) -> tuple[str, ...]:
        """Per-token vectors that are cached."""
        return () if self.reuses else self.index.cached_streams

    def streams(self, hidden: Tensor, rotate: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return index queries and keys."""
        return {} if self.reuses else self.index.streams(hidden, rotate)

    def index_size(self) -> IndexSize | None:
        """Return what the index reads of every earlier token."""
        return None if self.reuses else self.index.size()

    def dense_copies(self) -> dict[str, str]:
        """Return where the index starts from."""
        return {} if self.reuses else self.index.dense_copies("index.")

    def budget(self) -> int:
        """Return num_tokens."""
        return self.settings.num_tokens

    def choose(self, x: AttentionInputs) -> TokenSelection:
        """Return the best tokens of each query."""
        s = self.settings
        return token_topk(
            self.index.queries(x),
            self.index.keys(x),
            self.index_weights(x.hidden.detach()),
            num_tokens=max(s.num_tokens, self.cover or 0),
            num_sinks=s.num_sinks,
            window_size=s.window_size,
            layout=x.layout,
            scale=x.scale,
        )

    def auxiliary_losses(
        self, x: AttentionInputs, sparse: Tensor, dense: Tensor, mode: TrainingMode
    ) -> dict[str, Tensor]:
        """Add ``index_kl``: over all tokens while the stream is dense, else over the selected ones."""
        losses = super().auxiliary_losses(x, sparse, dense, mode)
        if "index_kl" in mode.losses and not self.reuses:
            queries = sample_queries(x.q.shape[1], mode.step, x.q.device)
            mass = attention_mass(x.q, x.k, queries, x.layout, x.scale).mean(1, keepdim=True)
            seen, relative = visible_tokens(queries, x.q.shape[1], x.k.shape[1], x.layout)
            if mode.stream == "sparse":
                lists = self.choose(x).token_indices[:, :, queries]
                seen = seen & listed_tokens(lists, relative, 1)
            losses["index_kl"] = index_kl(mass, self.scores(x, queries, mass.dtype), seen)
        return losses

    def scores(self, x: AttentionInputs, queries: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the index scores of sampled queries with gradient, ``[B, 1, NQ, TK]``."""
        q, k = self.index.queries(x)[:, queries].to(dtype), self.index.keys(x).to(dtype)
        k = k.expand(-1, -1, q.shape[2], -1)
        products = torch.einsum("bnhd,bthd->bhnt", q, k).mul(x.scale).relu()
        weights = self.index_weights(x.hidden.detach()[:, queries]).to(dtype)
        return torch.einsum("bhnt,bnh->bnt", products, weights)[:, None]
