"""Attention on the triton backend: which kernel serves which call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nsa_convert.kernels.common.segments import DECODE_QUERIES
from nsa_convert.kernels.gather.triton_backend import attend_lists, attend_runs
from nsa_convert.kernels.interval.triton_backend import interval_attention, layout_intervals
from nsa_convert.kernels.union.triton_backend import attend_blocks
from nsa_convert.patterns import Pattern, SequenceLayout, SinkWindow, TokenSelection


def attend_dense(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, scale: float) -> Tensor:
    """See :func:`nsa_convert.kernels.attention.dense_attention`."""
    at = layout_intervals(layout, q.shape[1], k.shape[1], q.device)
    if few_queries(layout, q, k, v):
        return attend_runs(q, k, v, at, k.shape[1], scale)[0]

    # torch's fused kernels know neither float32 with grouped heads nor padding nor packing.
    plain = layout.start is None and layout.cu_seqlens is None and not isinstance(layout.offset, Tensor)
    if plain and layout.offset == 0 and q.shape[1] == k.shape[1] and q.is_cuda and q.dtype != torch.float32:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return o.transpose(1, 2)

    return interval_attention(q, k, v, at, scale)[0]


def attend_pattern(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, layout: SequenceLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """See :func:`nsa_convert.kernels.attention.sparse_attention`.

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

    # Tokens are blocks of one key; without gradients a few queries fetch blocks of any size themselves.
    if isinstance(pattern, TokenSelection):
        pattern = pattern.as_blocks()
    if not few and pattern.block_size > 1:
        return attend_blocks(q, k, v, pattern, layout, scale)

    bounds = layout_intervals(layout, q.shape[1], k.shape[1], q.device)
    return attend_lists(q, k, v, pattern, layout, bounds, scale)


def few_queries(layout: SequenceLayout, *tensors: Tensor) -> bool:
    """Return whether each query fetches its own keys: ``tensors[0]`` has few, and none needs a gradient."""
    if layout.cu_seqlens is not None or tensors[0].shape[1] > DECODE_QUERIES:
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
