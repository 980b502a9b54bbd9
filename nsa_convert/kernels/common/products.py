"""Products of queries and keys whose result is more exact than the dtype of the operands."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_convert.kernels.common.checks import accumulate_dtype

SPLIT_ELEMENTS = 1 << 18
"""Longer keys are not copied to float32 where bfloat16 products are fast."""

FAST_BFLOAT16 = torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()
"""Whether this CPU multiplies bfloat16 and sums float32 in hardware."""


def score_product(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return ``scale * q k^T`` without rounding it to the dtype of q; not differentiable.

    torch has no CPU product of bfloat16 operands with a float32 result. For long keys a second product is
    cheaper than their float32 copy: it starts from the first result with its sign turned, so it sums to what
    the rounding of the first took away, and the two together are exact to 2^-17 of the score.

    Args:
        q: ``[B, H, R, D]``.
        k: ``[B, H, L, D]``.
        scale: Factor on the scores.

    Returns:
        ``[B, H, R, L]`` float32, float64 for float64 input.
    """
    if (
        q.dtype != torch.bfloat16
        or q.device.type != "cpu"
        or not FAST_BFLOAT16
        or k.numel() <= SPLIT_ELEMENTS
    ):
        dtype = accumulate_dtype(q.dtype)
        return torch.matmul(q.to(dtype).mul(scale), k.to(dtype).mT)

    return _split(q.flatten(0, 1), k.flatten(0, 1).mT).mul_(scale).unflatten(0, q.shape[:2])


def _split(rows: Tensor, columns: Tensor) -> Tensor:
    """Return the exact product of ``[N, R, D]`` and ``[N, D, L]``."""
    if columns.mT.is_contiguous():
        rounded = torch.bmm(rows, columns)
        rest = torch.baddbmm(rounded, rows, columns, beta=-1)
        return rounded.float().add_(rest)

    # A batched product would copy such a part of a buffer, the products of its heads do not.
    heads = []
    for row, column in zip(rows, columns, strict=True):
        rounded = torch.mm(row, column)
        heads.append(rounded.float().add_(torch.addmm(rounded, row, column, beta=-1)))
    return torch.stack(heads)
