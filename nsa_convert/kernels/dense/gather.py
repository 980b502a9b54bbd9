"""Dense attention through torch's fused operator, without a TQ x TK mask."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nsa_convert.kernels.dense.causal import attend_causal
from nsa_convert.kernels.dense.segments import is_decode
from nsa_convert.patterns import SequenceLayout


def attend(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, scale: float) -> Tensor:
    """See :func:`nsa_convert.kernels.dense.dense_attention`."""
    if is_decode(layout, q, k, v):
        return _decode(q, k, v, layout, scale)
    if layout.start is None and layout.cu_seqlens is None and layout.offset == 0 and q.shape[1] == k.shape[1]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return o.transpose(1, 2)
    return attend_causal(q, k, v, layout, scale)[0]


def _decode(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, scale: float) -> Tensor:
    """Attend with few queries; the group goes on the rows, so that keys are read once for all its heads."""
    group = q.shape[2] // k.shape[2]
    num_queries, num_keys = q.shape[1], k.shape[1]
    rows = q.unflatten(2, (k.shape[2], group)).permute(0, 2, 1, 3, 4).flatten(2, 3)  # [B, H, TQ * g, D]
    mask = None
    if num_queries > 1 or layout.start is not None or isinstance(layout.offset, Tensor):
        visible = layout.visible(num_queries, num_keys, q.device)  # [B or 1, TQ, TK]
        mask = visible.repeat_interleave(group, 1)[:, None]
    else:
        k, v = (x[:, : layout.offset + 1] for x in (k, v))
    o = scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale)
    o = o.unflatten(2, (num_queries, group)).permute(0, 2, 1, 3, 4).flatten(2, 3)
    return o if mask is None else o.masked_fill(~visible.any(-1)[..., None, None], 0.0)
