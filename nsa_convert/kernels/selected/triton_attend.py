"""Attention over the keys of a pattern on the triton backend: which kernel serves which call."""

from __future__ import annotations

from torch import Tensor

from nsa_convert.kernels.selected.gather import attend as gathered
from nsa_convert.kernels.selected.triton_blocks import attend_blocks
from nsa_convert.patterns import BlockSelection, Pattern, SequenceLayout


def attend(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, layout: SequenceLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """See :func:`nsa_convert.kernels.selected.sparse_attention`."""
    if isinstance(pattern, BlockSelection):
        return attend_blocks(q, k, v, pattern, layout, scale)
    return gathered(q, k, v, pattern, layout, scale)
