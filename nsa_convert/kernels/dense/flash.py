"""One small attention with its log-sum-exp: torch's fused CPU kernel where it exists, plain math elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_convert.kernels.checks import accumulate_dtype

FUSED = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
"""What ``scaled_dot_product_attention`` runs on a CPU; the public function does not return its lse. None where
this torch has no such operator: then :func:`plain_attention` does the work."""


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend with g query heads that share each key list.

    Args:
        q: ``[n, g, W, D]``.
        k: ``[n or 1, L, D]``, finite.
        v: ``[n or 1, L, DV]``, finite.
        bias: ``[n or 1, W, L]`` in the dtype of q, 0 or -inf, or None.
        scale: Factor on the scores.

    Returns:
        ``(o [n, g, W, DV], lse [n, g, W] float32 or float64)``; not differentiable. A row that is masked
        everywhere has undefined o and lse: the caller knows these rows and sets them.
    """
    if FUSED is None or q.device.type != "cpu" or v.shape[-1] != q.shape[-1]:
        return plain_attention(q, k, v, bias, scale)
    n, g, width, _ = q.shape
    if width < 32:  # short tiles: the group on the rows gives the matrix product enough of them
        rows = q.reshape(n, 1, g * width, -1)
        if bias is not None:
            bias = bias[:, None].expand(-1, g, -1, -1).flatten(1, 2)[:, None]
        o, lse = FUSED(rows, _heads(k, n, 1), _heads(v, n, 1), 0.0, False, attn_mask=bias, scale=scale)
        return o.view(n, g, width, -1), lse.reshape(n, g, width)
    mask = None if bias is None else bias[:, None]
    return FUSED(q, _heads(k, n, g), _heads(v, n, g), 0.0, False, attn_mask=mask, scale=scale)


def _heads(x: Tensor, n: int, g: int) -> Tensor:
    return x[:, None].expand(n, g, -1, -1)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute :func:`flash_attention` with matrix products, in float32 or float64."""
    dtype = accumulate_dtype(q.dtype)
    scores = torch.matmul(q.to(dtype), k.to(dtype)[:, None].transpose(2, 3)).mul_(scale)
    if bias is not None:
        scores += bias[:, None]
    lse = scores.logsumexp(-1)
    p = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return torch.matmul(p, v.to(dtype)[:, None]).to(q.dtype), lse
