"""Dense attention through torch's fused operator, without a TQ x TK mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nsa_convert.kernels.dense.causal import attend_causal
from nsa_convert.patterns import SequenceLayout

DECODE_QUERIES = 16


def attend(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, scale: float) -> Tensor:
    """See :func:`nsa_convert.kernels.dense.dense_attention`."""
    plain = layout.start is None and layout.cu_seqlens is None
    if isinstance(layout.offset, Tensor) or (q.shape[1] <= DECODE_QUERIES and layout.cu_seqlens is None):
        return _decode(q, k, v, layout, scale)
    if plain and layout.offset == 0 and q.shape[1] == k.shape[1]:
        o = scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, scale=scale, enable_gqa=True
        )
        return o.transpose(1, 2)
    return attend_causal(q, k, v, layout, scale)[0]


def _decode(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, scale: float) -> Tensor:
    """Attend with few queries; the group goes on the rows, so that keys are read once for all its heads."""
    group = q.shape[2] // k.shape[2]
    num_queries, num_keys = q.shape[1], k.shape[1]
    if num_queries == 0 or num_keys == 0:
        return torch.zeros_like(q)
    rows = q.unflatten(2, (k.shape[2], group)).permute(0, 2, 1, 3, 4).flatten(2, 3)  # [B, H, TQ * g, D]
    visible = layout.visible(num_queries, num_keys, q.device)  # [B or 1, TQ, TK]
    mask = visible.repeat_interleave(group, 1)[:, None]
    o = scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale)
    o = o.unflatten(2, (num_queries, group)).permute(0, 2, 1, 3, 4).flatten(2, 3)
    return o.masked_fill(~visible.any(-1)[..., None, None], 0.0)
