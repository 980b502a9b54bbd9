"""Attention over the keys of a pattern on the triton backend: which kernel serves which call."""

from __future__ import annotations

from torch import Tensor

from nsa_convert.kernels.selected.gather import attend as gathered
from nsa_convert.patterns import Pattern, SequenceLayout


def attend(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, layout: SequenceLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """See :func:`nsa_convert.kernels.selected.sparse_attention`."""
    return gathered(q, k, v, pattern, layout, scale)
