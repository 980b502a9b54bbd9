"""The learned index that DSA and MSA choose by: small queries and keys beside the attention's own.

Its input is detached, as published: the language-model loss moves the model, the index has its own (KL). An
index starts where it already knows something: at the attention's own queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from nsa_convert.config import AttentionGeometry
from nsa_convert.methods.parts.base import (
    AttentionInputs,
    DenseCopy,
    IndexSize,
    Projection,
    TrainingSpec,
    copy_of,
)

IndexKey = Literal["cached", "shared"]
INDEX_TRAINING = TrainingSpec(
    stage_losses={kind: {"index_kl": 1.0} for kind in ("align", "pretrain", "extend", "sft")},
    has_dense_mode=True,
)
"""How a method with an index is trained."""


class Index(nn.Module):
    """Index queries and keys of one layer.

    | parameter | initial value | why |
    |---|---|---|
    | ``q`` (``"cached"``) | 0 | added to the mean query of each group |
    | ``q`` (``"shared"``) | mean of neighbouring heads of q_proj | the same, as a weight |
    | ``k`` (``"shared"``) | mean of the heads of k_proj | one key that every head resembles |
    | ``norm`` (``"shared"``) | 1 and 0 | LayerNorm |

    Args:
        geometry: Sizes of the layer.
        num_heads: Index heads; with ``"cached"`` keys always the number of key/value heads.
        key: ``"cached"`` reads the layer's own rotated keys and adds nothing to the cache; ``"shared"`` has
            one key head of its own, normalised and rotated, cached beside the others (as published).
    """

    def __init__(self, geometry: AttentionGeometry, num_heads: int, key: IndexKey) -> None:
        super().__init__()
        self.group_size = geometry.group_size
        self.num_heads = geometry.num_kv_heads if key == "cached" else num_heads
        self.head_dim = geometry.head_dim

        # Queries; over cached keys they start as the mean query of the group, so their own part starts at 0.
        bias = geometry.qkv_bias and key == "shared"
        self.q = nn.Linear(geometry.hidden_size, self.num_heads * self.head_dim, bias=bias)

        # A key head of its own.
        self.k: nn.Linear | None = None
        self.norm: nn.LayerNorm | None = None
        if key == "shared":
            self.k = nn.Linear(geometry.hidden_size, self.head_dim, bias=bias)
            self.norm = nn.LayerNorm(self.head_dim)
        else:
            nn.init.zeros_(self.q.weight)

    @property
    def cached_states(self) -> tuple[str, ...]:
        """Names of the token states that are cached."""
        return () if self.k is None else ("index_k",)

    def size(self) -> IndexSize:
        """Return what the index reads."""
        own = self.k is not None
        return IndexSize(query_heads=self.num_heads, key_heads=1 if own else self.num_heads, cached=own)

    def dense_copies(self, prefix: str) -> dict[str, DenseCopy]:
        """Return own parameter name, behind ``prefix`` -> where it starts."""
        if self.k is None:
            return {}
        return {
            f"{prefix}{own}.{kind}": copy_of(f"{own}_proj.{kind}", parameter, self.head_dim)
            for own, projection in (("q", self.q), ("k", self.k))
            for kind, parameter in projection.named_parameters()
        }

    def project(self, hidden: Tensor, rotate: Callable[[Tensor], Tensor]) -> Projection:
        """Return what the layer caches and hands back: index keys, and the learned part of the queries."""
        hidden = hidden.detach()
        states = {"index_q": rotate(self.q(hidden).unflatten(-1, (self.num_heads, self.head_dim)))}
        if self.k is not None and self.norm is not None:
            states["index_k"] = rotate(self.norm(self.k(hidden)).unsqueeze(2))
        return Projection(token_states=states)

    def queries(self, x: AttentionInputs) -> Tensor:
        """Return index queries ``[B, TQ, heads, D]``."""
        learned = x.token_states["index_q"]
        if self.k is not None:
            return learned

        # Over cached keys: the mean query of the group that shares a key head, plus the learned part.
        mean = x.q.detach().unflatten(2, (self.num_heads, self.group_size)).mean(3)
        return mean + learned

    def products(self, x: AttentionInputs, queries: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``scale q k`` of sampled queries ``[NQ]`` with gradient, ``[B, heads, NQ, TK]``."""
        q = self.queries(x)[:, queries].to(dtype)
        k = self.keys(x).to(dtype)
        return torch.einsum("bnhd,bthd->bhnt", q, k.expand(-1, -1, q.shape[2], -1)) * x.scale

    def keys(self, x: AttentionInputs) -> Tensor:
        """Return index keys ``[B, TK, heads or 1, D]``."""
        return x.k.detach() if self.k is None else x.token_states["index_k"]


def index_weights(hidden_size: int, num_heads: int) -> nn.Linear:
    """Return the map from the hidden state to the weights of DSA's index heads; it starts at 1 for each."""
    layer = nn.Linear(hidden_size, num_heads)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.fill_(1.0)
    return layer
