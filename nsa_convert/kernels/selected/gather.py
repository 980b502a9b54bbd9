"""Pattern attention that reads only the keys of the pattern."""

from __future__ import annotations

from torch import Tensor

from nsa_convert.kernels.selected.union import attend_blocks
from nsa_convert.kernels.selected.window import attend_window
from nsa_convert.patterns import Pattern, SequenceLayout, SinkWindow, TokenSelection


def attend(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, layout: SequenceLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """See :func:`nsa_convert.kernels.selected.sparse_attention`."""
    if isinstance(pattern, SinkWindow):
        return attend_window(q, k, v, pattern, layout, scale)
    if isinstance(pattern, TokenSelection):
        pattern = pattern.as_blocks()
    return attend_blocks(q, k, v, pattern, layout, scale)
