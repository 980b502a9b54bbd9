"""Attention over the keys of a pattern on the triton backend: which kernel serves which call."""

from __future__ import annotations

from torch import Tensor

from nsa_convert.kernels.dense.triton_attend import few_queries
from nsa_convert.kernels.dense.triton_interval import interval_attention, layout_intervals
from nsa_convert.kernels.selected.triton_blocks import attend_blocks
from nsa_convert.kernels.selected.triton_gather import attend_lists, attend_runs
from nsa_convert.patterns import Pattern, SequenceLayout, SinkWindow, TokenSelection


def attend(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, layout: SequenceLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """See :func:`nsa_convert.kernels.selected.sparse_attention`.

    A window is an interval of keys. Lists of blocks are united over neighbouring queries, lists of tokens are
    fetched query by query; so is every pattern when there are few queries and no gradient is wanted.
    """
    few = few_queries(layout, q, k, v)
    if isinstance(pattern, SinkWindow):
        at = layout_intervals(
            layout, q.shape[1], k.shape[1], q.device, pattern.window_size, pattern.num_sinks
        )
        if few:
            return attend_runs(q, k, v, at, pattern.budget, scale)
        return interval_attention(q, k, v, at, scale)
    if isinstance(pattern, TokenSelection):
        pattern = pattern.as_blocks()
    if not few and pattern.block_size > 1:
        return attend_blocks(q, k, v, pattern, layout, scale)
    bounds = layout_intervals(layout, q.shape[1], k.shape[1], q.device)
    return attend_lists(q, k, v, pattern, layout, bounds, scale)
