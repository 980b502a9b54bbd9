"""Methods with one softmax over what they choose; the same weights also run as dense attention."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from nsa_convert.config import AttentionGeometry
from nsa_convert.kernels.dense import dense_attention
from nsa_convert.kernels.selected import sparse_attention
from nsa_convert.methods.base import AttentionInputs, SparseMethod
from nsa_convert.patterns import Pattern

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

    runs_full = True

    def __init__(self, settings: Any, geometry: AttentionGeometry, layer_index: int) -> None:
        super().__init__(settings, geometry, layer_index)
        self.mode = settings.mode

    @property
    def reuses(self) -> bool:
        """Whether another layer chooses."""
        return self.settings.reuse_from != NO_REUSE

    def choose(self, x: AttentionInputs) -> Pattern:
        """Return the keys each query sees."""
        raise NotImplementedError

    def budget(self) -> int:
        """Return the most keys one query sees in sparse mode."""
        return self.settings.rule.budget

    def visible_budget(self) -> int:
        """Return the budget; in full mode a number no context exceeds."""
        return sys.maxsize if self.mode == "full" else self.budget()

    def keys_per_query(self) -> int | None:
        """Return the budget, or None in full mode."""
        return None if self.mode == "full" else self.budget()

    def is_dense(self, x: AttentionInputs) -> bool:
        """Return whether this call attends to everything."""
        return self.cover is None and (self.mode == "full" or self.fits(x, self.visible_budget()))

    def forward(self, x: AttentionInputs) -> Tensor:
        """Attend to what is chosen, or to everything; returns ``[B, TQ, HQ, D]``."""
        if self.is_dense(x):
            self.record(x, x.k, {})
            return dense_attention(x.q, x.k, x.v, layout=x.layout, scale=x.scale)
        pattern = self.selection(x)
        self.record(x, x.k, {"selected": pattern})
        return sparse_attention(x.q, x.k, x.v, pattern, layout=x.layout, scale=x.scale)[0]

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
