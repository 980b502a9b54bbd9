"""One small attention with its log-sum-exp: torch's fused CPU kernel if it exists, plain math otherwise."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_convert.kernels.common.checks import accumulate_dtype

FUSED = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
"""What ``scaled_dot_product_attention`` runs on a CPU; the public function does not return its lse.

None where this torch has no such operator: then :func:`plain_attention` does the work.
"""


def _native(name: str) -> bool:
    return torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, name)()


NATIVE = {
    torch.bfloat16: _native("_is_mkldnn_bf16_supported"),
    torch.float16: _native("_is_mkldnn_fp16_supported"),
}
"""Half-precision dtypes that the fused operator multiplies in; in others it is slower than in float32."""

WIDE_ELEMENTS = 1 << 21
"""Keys up to this many are copied to float32 where that is faster; larger copies are new memory each time."""

GROUP_ON_ROWS = 32
"""Tiles with fewer queries put the query heads of a group on the rows of the matrix products."""


def attend_rows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attend without causality; not differentiable in lse.

    Args:
        q: ``[N, H, R, D]``.
        k: ``[N, H, L, D]``, finite where ``bias`` is -inf.
        v: ``[N, H, L, DV]``, finite where ``bias`` is -inf.
        bias: 0 or -inf in the dtype of q, broadcasts to ``[N, H, R, L]``, or None.
        scale: Factor on the scores.

    Returns:
        ``(o [N, H, R, DV], lse [N, H, R] float32 or float64)``. A row that is masked everywhere has
        undefined o and lse: the caller knows these rows and sets them.
    """
    if FUSED is None or q.device.type != "cpu" or v.shape[-1] != q.shape[-1]:
        return plain_attention(q, k, v, bias, scale)

    one_row = q.shape[2] == 1
    if q.dtype in NATIVE and (one_row or not NATIVE[q.dtype]) and k.numel() <= WIDE_ELEMENTS:
        bias = None if bias is None else bias.float()
        o, lse = attend_rows(q.float(), _wide(k), _wide(v), bias, scale)
        return o.to(q.dtype), lse

    if q.dtype == torch.bfloat16 and one_row:  # misses the operator's fast path: two are faster
        o, lse = attend_rows(q.expand(-1, -1, 2, -1), k, v, bias, scale)
        return o[:, :, :1], lse[:, :, :1]

    # The operator reads heads as if they were contiguous, without checking.
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    return FUSED(q, k, v, 0.0, False, attn_mask=bias, scale=scale)


def _wide(x: Tensor) -> Tensor:
    """Return x in float32; heads that are expanded from one are converted once."""
    return x[:, :1].float().expand_as(x) if x.stride(1) == 0 else x.float()


def attend_group(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attend with g query heads that share each list of keys.

    Args:
        q: ``[n, g, W, D]``.
        k: ``[n or 1, L, D]``.
        v: ``[n or 1, L, DV]``.
        bias: ``[n or 1, W, L]`` in the dtype of q, 0 or -inf, or None.
        scale: Factor on the scores.

    Returns:
        ``(o [n, g, W, DV], lse [n, g, W])`` as :func:`attend_rows`.
    """
    n, g, width, _ = q.shape
    heads = 1 if width < GROUP_ON_ROWS else g
    k, v = (x[:, None].expand(n, heads, -1, -1) for x in (k, v))

    if heads == g:
        return attend_rows(q, k, v, None if bias is None else bias[:, None], scale)

    # The query heads are rows of one matrix, so that each product reads the keys once.
    if bias is not None:
        bias = bias[:, None].expand(-1, g, -1, -1).flatten(1, 2)[:, None]
    o, lse = attend_rows(q.reshape(n, 1, g * width, -1), k, v, bias, scale)
    return o.reshape(n, g, width, -1), lse.reshape(n, g, width)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute :func:`attend_rows` with matrix products, in float32 or float64."""
    dtype = accumulate_dtype(q.dtype)
    scores = torch.matmul(q.to(dtype), k.to(dtype).transpose(2, 3)) * scale

    if bias is not None:
        scores = scores + bias

    # 0 in place of -inf: a row that is masked everywhere gets probabilities of 0, not NaN.
    lse = scores.logsumexp(-1)
    p = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])

    return torch.matmul(p, v.to(dtype)).to(q.dtype), lse
