"""Pattern attention that reads only the keys of the pattern."""

from __future__ import annotations

from torch import Tensor

from nsa_convert.kernels.dense.segments import is_decode
from nsa_convert.kernels.selected.decode import decode_blocks, decode_window
from nsa_convert.kernels.selected.union import attend_blocks
from nsa_convert.kernels.selected.window import attend_window
from nsa_convert.patterns import BlockSelection, Pattern, SequenceLayout, SinkWindow, TokenSelection

FETCH_BYTES = 1 << 26
"""Keys and values that several queries may fetch each for itself; above it they share a union."""


def attend(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, layout: SequenceLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """See :func:`nsa_convert.kernels.selected.sparse_attention`."""
    if isinstance(pattern, TokenSelection):
        pattern = pattern.as_blocks()
    decode = is_decode(layout, q, k, v)
    if isinstance(pattern, SinkWindow):
        return (decode_window if decode else attend_window)(q, k, v, pattern, layout, scale)
    if decode and (isinstance(layout.offset, Tensor) or _fetch_bytes(q, k, pattern) <= FETCH_BYTES):
        return decode_blocks(q, k, v, pattern, layout, scale)
    return attend_blocks(q, k, v, pattern, layout, scale)


def _fetch_bytes(q: Tensor, k: Tensor, pattern: BlockSelection) -> int:
    if q.shape[1] == 1:
        return 0
    lists = max(k.shape[2], pattern.block_indices.shape[1])
    return 2 * q.shape[0] * q.shape[1] * lists * pattern.budget * k.shape[3] * k.element_size()
