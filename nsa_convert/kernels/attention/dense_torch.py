"""Dense attention through torch's fused operator, without a TQ x TK mask."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nsa_convert.kernels.common.custom_ops import (
    LAYOUT_SCHEMA,
    differentiable,
    flatten,
    is_opaque,
    like_attention,
    reach,
    restore,
)
from nsa_convert.kernels.common.segments import is_decode
from nsa_convert.kernels.common.tiles import TilePlan
from nsa_convert.kernels.interval.causal import attend_causal, plan_causal
from nsa_convert.patterns import SequenceLayout


def gathered_dense(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, scale: float) -> Tensor:
    """See :func:`nsa_convert.kernels.attention.dense_attention`."""
    plain = layout.start is None and layout.cu_seqlens is None and q.shape[1] == k.shape[1]
    plain = plain and not isinstance(layout.offset, Tensor) and layout.offset == 0

    opaque = is_opaque(layout, q, k, v)
    if not opaque and is_decode(layout, q, k, v):
        return _decode(q, k, v, layout, scale)

    if plain:  # in a graph too: the compiler knows this operator
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return o.transpose(1, 2)

    if opaque:
        return _operator(q, k, v, *flatten(layout), scale)[0]
    return attend_causal(q, k, v, layout, scale)[0]


def _run(q: Tensor, k: Tensor, v: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    layout = restore(flat[:-1])
    scale = flat[-1]
    end = reach(layout, q, k)
    return attend_causal(q, k[:, :end], v[:, :end], layout, scale)


def _plan(q: Tensor, k: Tensor, v: Tensor, *flat: Any) -> tuple[TilePlan, int, float]:
    layout = restore(flat[:-1])
    scale = flat[-1]
    end = reach(layout, q, k)
    return plan_causal(q, k[:, :end], layout), end, scale


_operator = differentiable(
    "dense_tiles",
    f"Tensor q, Tensor k, Tensor v, {LAYOUT_SCHEMA}, float scale",
    "(Tensor, Tensor)",
    _run,
    lambda q, k, v, *_: like_attention(q, v),
    _plan,
)


def _decode(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, scale: float) -> Tensor:
    """Attend with few queries; the group goes on the rows, so that keys are read once for all its heads."""
    group = q.shape[2] // k.shape[2]
    num_queries = q.shape[1]
    num_keys = k.shape[1]
    rows = q.unflatten(2, (k.shape[2], group)).permute(0, 2, 1, 3, 4).flatten(2, 3)  # [B, H, TQ * g, D]

    mask = visible = None
    # One query that is the last key needs no mask: the keys up to it are sliced out.
    if num_queries > 1 or layout.start is not None or isinstance(layout.offset, Tensor):
        visible = layout.visible(num_queries, num_keys, q.device)  # [B or 1, TQ, TK]
        mask = visible.repeat_interleave(group, 1)[:, None]
    else:
        k, v = (x[:, : layout.offset + 1] for x in (k, v))

    o = scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale)
    o = o.unflatten(2, (num_queries, group)).permute(0, 2, 1, 3, 4).flatten(2, 3)

    # Queries in the left padding see no key.
    return o if visible is None else o.masked_fill(~visible.any(-1)[..., None, None], 0.0)
