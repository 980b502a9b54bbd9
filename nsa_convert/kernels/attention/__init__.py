"""Attention over raw keys: those that a pattern shows, or all earlier ones (dense).

Dense attention is what a sparse op falls back to when the context fits its budget.
"""

from __future__ import annotations

from torch import Tensor

from nsa_convert.kernels.attention.dense_torch import gathered_dense
from nsa_convert.kernels.attention.sparse_torch import gathered_pattern
from nsa_convert.kernels.common.backend import implementation
from nsa_convert.kernels.common.checks import check_qkv, default_scale
from nsa_convert.patterns import DENSE_LAYOUT, Pattern, SequenceLayout


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
    run = implementation("attention.attend_dense", q, gathered_dense, v.shape[-1])
    return run(q, k, v, layout, default_scale(q, scale))


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    layout: SequenceLayout = DENSE_LAYOUT,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention restricted to the pattern, causal token by token.

    Differentiable in q, k and v. When no query can have more keys than the pattern's budget and the pattern
    lists every block, the result is dense attention.

    Args:
        q: ``[B, TQ, HQ, D]``.
        k: ``[B, TK, H, D]``.
        v: ``[B, TK, H, D]``.
        pattern: Which keys each query sees.
        layout: Position of the queries, padding and packing.
        scale: Factor on the scores; D ** -0.5 by default.

    Returns:
        ``(o [B, TQ, HQ, D], lse [B, TQ, HQ])``: o in the dtype of q; lse (natural log of the softmax
        denominator of the scaled scores) in float32, or float64 for float64 input. A query that sees no key
        has o = 0 and lse = -inf.

    Raises:
        ValueError: Shapes, dtypes or devices do not agree.
    """
    check_qkv(q, k, v)
    run = implementation("attention.attend_pattern", q, gathered_pattern, v.shape[-1])
    return run(q, k, v, pattern, layout, default_scale(q, scale))
