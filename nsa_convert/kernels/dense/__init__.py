"""Dense causal attention: what a sparse op falls back to when the context fits its budget."""

from __future__ import annotations

from torch import Tensor

from nsa_convert.kernels.backend import implementation
from nsa_convert.kernels.checks import check_qkv, default_scale
from nsa_convert.kernels.dense.gather import attend as gathered
from nsa_convert.kernels.dense.reference import attend as reference
from nsa_convert.patterns import DENSE_LAYOUT, SequenceLayout


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, *, layout: SequenceLayout = DENSE_LAYOUT, scale: float | None = None
) -> Tensor:
    """Attend to every earlier key of the same document.

    Args:
        q: ``[B, TQ, HQ, D]``.
        k: ``[B, TK, H, D]``.
        v: ``[B, TK, H, D]``.
        layout: Position of the queries, padding and packing.
        scale: Factor on the scores; D ** -0.5 by default.

    Returns:
        ``[B, TQ, HQ, D]``; 0 for a query that sees no key (padding).

    Raises:
        ValueError: Shapes, dtypes or devices do not agree.
    """
    check_qkv(q, k, v)
    run = implementation("dense", q, reference, gathered, v.shape[-1])
    return run(q, k, v, layout, default_scale(q, scale))
