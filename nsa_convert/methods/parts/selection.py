"""Methods with one softmax over what they choose; the same weights also run as dense attention."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nsa_convert.config import AttentionGeometry
from nsa_convert.kernels.attention import dense_attention, sparse_attention
from nsa_convert.methods.parts.base import (
    AttentionInputs,
    CacheNeeds,
    DenseCopy,
    Pool,
    Projection,
    Reach,
    SparseMethod,
    TrainingSpec,
    is_within_budget,
    record,
)
from nsa_convert.methods.parts.index import Index
from nsa_convert.methods.parts.index_losses import index_kl, listed_tokens, visible_tokens
from nsa_convert.methods.parts.losses import attention_mass, sample_queries
from nsa_convert.methods.parts.training_mode import TrainingMode
from nsa_convert.patterns import BlockSelection, Pattern, TokenSelection

NO_REUSE = -1
"""``reuse_from`` of a layer that chooses for itself."""


class SelectingMethod(SparseMethod):
    """Dense in ``mode: full`` and while the context fits the budget, else attention over ``choose``.

    With ``reuse_from`` a layer attends to what an earlier layer chose and needs no cells, no index and no
    scores of its own (index sharing, as GLM-5.2 does it for every 4 layers).

    Args:
        settings: Checked settings with a ``mode``, and a ``rule`` unless :meth:`budget` is overridden.
        geometry: Sizes of the layer.
        layer_index: Index of the layer in the model.
    """

    training_spec = TrainingSpec(has_dense_mode=True)

    def __init__(self, settings: Any, geometry: AttentionGeometry, layer_index: int) -> None:
        super().__init__(settings, geometry, layer_index)
        self.mode = settings.mode
        self.index: Index | None = None
        """What a method that learns to choose scores with; it has none while another layer chooses."""

    def own_index(self) -> Index:
        """Return what this layer chooses with, where it chooses for itself."""
        assert self.index is not None
        return self.index

    @property
    def reuses(self) -> bool:
        """Whether another layer chooses."""
        return self.settings.reuse_from != NO_REUSE

    def pools(self) -> tuple[Pool, ...]:
        """Return the compressed cells that choosing reads; none while another layer chooses."""
        return ()

    def cache_needs(self) -> CacheNeeds:
        """Return the cells and the index keys, unless another layer chooses."""
        states = () if self.index is None else self.index.cached_states
        return CacheNeeds(pools=() if self.reuses else self.pools(), token_states=states)

    def reach(self) -> Reach:
        """In full mode a query reads everything, at any context."""
        index = None if self.index is None else self.index.size()
        if self.mode == "full":
            return Reach(visible_budget=sys.maxsize, decode_keys=None, prompt_keys=None, index=index)

        keys = self.budget()
        return Reach(visible_budget=self.dense_until(), decode_keys=keys, prompt_keys=keys, index=index)

    def project(self, hidden: Tensor, rotate: Callable[[Tensor], Tensor]) -> Projection:
        """Return index queries and keys."""
        return Projection() if self.index is None else self.index.project(hidden, rotate)

    def dense_copies(self) -> dict[str, DenseCopy]:
        """Return where the index starts from."""
        return {} if self.index is None else self.index.dense_copies("index.")

    def choose(self, x: AttentionInputs) -> Pattern:
        """Return the keys each query sees."""
        raise NotImplementedError

    def budget(self) -> int:
        """Return the most keys one query sees in sparse mode."""
        return self.settings.rule.budget

    def dense_until(self) -> int:
        """Return the longest context that is attended to densely in sparse mode."""
        return self.budget()

    def is_dense(self, x: AttentionInputs) -> bool:
        """Return whether this call attends to everything."""
        if self.mode == "full" and self.forced_budget is None:
            return True
        return is_within_budget(self, x, self.dense_until())

    def forward(self, x: AttentionInputs) -> Tensor:
        """Attend to what is chosen, or to everything; returns ``[B, TQ, HQ, D]``."""
        if self.is_dense(x):
            record(self, x, x.k, {})
            return dense_attention(x.q, x.k, x.v, layout=x.layout, scale=x.scale)

        # Attention over the selection.
        pattern = self.selection(x)
        record(self, x, x.k, {"selected": pattern})
        o = sparse_attention(x.q, x.k, x.v, pattern, layout=x.layout, scale=x.scale)[0]

        # In a graph that cannot read the length, both are computed and the length decides.
        length = self._unread_length(x)
        if length is None:
            return o
        dense = dense_attention(x.q, x.k, x.v, layout=x.layout, scale=x.scale)
        return torch.where(length <= self.dense_until(), dense, o)

    def _unread_length(self, x: AttentionInputs) -> Tensor | None:
        """Return the length that :meth:`is_dense` goes by where a graph cannot read it and it matters.

        A method that is dense beyond its budget computes both then; else they are the same up to the budget.
        """
        same = self.forced_budget is not None or self.dense_until() <= self.budget()
        if same or not torch.compiler.is_compiling():
            return None

        layout = x.layout
        if layout.cu_seqlens is not None:
            return layout.cu_seqlens.diff().max() if layout.max_seqlen is None else None
        return layout.offset + x.q.shape[1] if isinstance(layout.offset, Tensor) else None

    def selection(self, x: AttentionInputs) -> Pattern:
        """Return what this layer chooses, or what the layer it reuses has chosen in this pass.

        Raises:
            ValueError: That layer attended densely or did not run.
        """
        if not self.reuses:
            pattern = x.shared[self.layer_index, self.heads] = self.choose(x)
            return pattern

        source = self.settings.reuse_from
        if (source, self.heads) not in x.shared:
            raise ValueError(
                f"layer {self.layer_index} reuses the selection of layer {source}, which made none"
            )
        return x.shared[source, self.heads]

    def index_scores(self, x: AttentionInputs, queries: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the scores of the index for sampled queries ``[NQ]``, with gradient.

        Returns:
            ``[B, h, NQ, TK]``, one row of scores for each list of a query.
        """
        raise NotImplementedError

    def auxiliary_losses(
        self, x: AttentionInputs, sparse: Tensor | None, dense: Tensor | None, mode: TrainingMode
    ) -> dict[str, Tensor]:
        """Add ``index_kl``: over all tokens while the stream is dense, else over the selected ones."""
        losses = super().auxiliary_losses(x, sparse, dense, mode)
        if self.index is None or "index_kl" not in mode.losses:
            return losses

        # True attention mass and index scores of sampled queries, over the tokens they see.
        queries = sample_queries(x, mode.draw)
        mass = attention_mass(x.q, x.k, queries, x.layout, x.scale)  # [B, H, NQ, TK]
        scores = self.index_scores(x, queries, mass.dtype)
        seen, relative = visible_tokens(queries, x.q.shape[1], x.k.shape[1], x.layout)

        # A sparse stream: only over what was selected.
        if mode.stream in ("ordinary", "sparse") and not self.is_dense(x):
            chosen = x.shared.get((self.layer_index, self.heads))  # the forward of this call made it
            chosen = self.choose(x) if chosen is None else chosen
            blocks = chosen.as_blocks() if isinstance(chosen, TokenSelection) else chosen
            assert isinstance(blocks, BlockSelection)
            seen = seen & listed_tokens(blocks.block_indices[:, :, queries], relative, blocks.block_size)

        mass = mass.unflatten(1, (scores.shape[1], -1)).mean(2)  # mean over the heads that share a list
        return {**losses, "index_kl": index_kl(mass, scores, seen, mode.total)}
