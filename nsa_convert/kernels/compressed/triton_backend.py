"""Compressed attention and the choice of blocks on the triton backend."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nsa_convert.kernels.attention.triton_backend import few_queries
from nsa_convert.kernels.compressed.cells import CellGrid, join_parts
from nsa_convert.kernels.compressed.triton_blocks import cell_layout, choose_blocks_on_device
from nsa_convert.kernels.gather.triton_backend import attend_runs
from nsa_convert.kernels.interval.triton_backend import interval_attention
from nsa_convert.patterns import BlockTopK, SequenceLayout


def attend_cells(
    q: Tensor, parts: Sequence[Tensor], cv: Tensor | None, grid: CellGrid, rule: BlockTopK | None,
    layout: SequenceLayout, scale: float, normaliser: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """See :func:`nsa_convert.kernels.compressed.decode.decode_cells`; no score of a cell is stored."""
    ck = join_parts(parts)
    at = cell_layout(layout, grid, q.shape[1], ck.shape[1], q.device)

    o = lse = indices = None
    if cv is not None and few_queries(layout, q, ck, cv):
        o, lse = attend_runs(q, ck, cv, at.cells, ck.shape[1], scale)
    elif cv is not None:
        o, lse = interval_attention(q, ck, cv, at.cells, scale)

    if rule is not None:
        growing = layout.cu_seqlens is None and not isinstance(layout.offset, Tensor)
        given = lse if normaliser is None else normaliser.float()
        if rule.per_head:  # the kernel sums over the heads that share a key
            ck = ck.repeat_interleave(q.shape[2] // ck.shape[2], 2)
        indices = choose_blocks_on_device(q, ck, given, at, grid, rule, scale, growing)
    return o, lse, indices
