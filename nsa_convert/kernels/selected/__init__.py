"""Attention over the raw keys that a pattern shows."""

from __future__ import annotations

from torch import Tensor

from nsa_convert.kernels.backend import implementation
from nsa_convert.kernels.checks import check_qkv, default_scale
from nsa_convert.kernels.selected.gather import attend as gathered
from nsa_convert.kernels.selected.reference import attend as reference
from nsa_convert.patterns import DENSE_LAYOUT, Pattern, SequenceLayout


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
    run = implementation("selected", q, reference, gathered, v.shape[-1])
    return run(q, k, v, pattern, layout, default_scale(q, scale))
