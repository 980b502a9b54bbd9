"""Pattern attention through a dense mask: the truth every fast path is compared with."""

from __future__ import annotations

from torch import Tensor

from nsa_convert.kernels.dense.reference import masked_softmax_attention
from nsa_convert.patterns import Pattern, SequenceLayout


def attend(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, layout: SequenceLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """See :func:`nsa_convert.kernels.selected.sparse_attention`."""
    mask = pattern.to_dense_mask(q.shape[1], k.shape[1], q.shape[2], layout, device=q.device)
    o, lse, _ = masked_softmax_attention(q, k, v, mask, scale)
    return o, lse
