"""What the attention kernels share: rows of a tensor, the step of a running softmax and that of its gradient.

What is not finite follows one rule in all of them, forward and backward:

- A score is -inf where the query does not see the key, whatever the key holds. Its probability is 0.
- A row that has seen no key has ``top`` -inf and ``total`` 0. It ends with o = 0 and lse = -inf, and its
  gradient is 0: :func:`load_terms` makes +inf of its lse.
- A row that sees a NaN gets sums that are NaN, and so an o, lse and gradient that are not finite: a maximum
  ignores NaN, the sums do not.
- A product sums over all keys of a step, or over all its queries, and ``0 * NaN`` is NaN: what is not finite
  would reach rows that do not see it. ``GUARD`` takes it out of the products and puts NaN into the scores of
  those that see it. It is left out only where every row of the tile sees every key of the step, where what is
  hidden was not loaded, or where the caller looks at the result and computes it again with it.

Scores are in the log2 domain: ``exp(x) = exp2(x * LOG2E)``.
"""

from __future__ import annotations

from collections import namedtuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


Rows = namedtuple("Rows", ("first", "step"))
"""Rows of a tensor: a pointer to the first and the stride from one to the next."""


Softmax = namedtuple("Softmax", ("top", "total", "sums"))
"""A running softmax: largest score and sum of weights ``[M]``, weighted sum of values ``[M, BD]``."""


Graded = namedtuple("Graded", ("q", "do", "base", "delta"))
"""Rows of queries in a backward: ``q`` and ``do [M, BD]``, ``base`` of exponents and ``delta [M]``."""


@triton.jit
def dot(a, b, UPCAST: tl.constexpr):
    """Multiply ``a [M, K]`` and ``b [K, N]`` into float32, exactly for float32 operands."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def is_finite(x):
    """Return which elements of x are neither NaN nor infinite."""
    return tl.abs(x.to(tl.float32)) < float("inf")


@triton.jit
def finite(x):
    """Return x with 0 in place of what is not finite."""
    return tl.where(is_finite(x), x, 0.0).to(x.dtype)


@triton.jit
def finite_rows(x):
    """Return which rows of ``x [N, D]`` are finite as a whole."""
    return tl.min(is_finite(x).to(tl.int32), 1) != 0


@triton.jit
def all_finite(x):
    """Return whether the whole of ``x [N, D]`` is finite."""
    return tl.min(is_finite(x).to(tl.int32)) != 0  # in two steps triton 3.6 cannot compile it for sm_100


@triton.jit
def head_rows(x, s_x, i_b, i_h):
    """Return the tokens of one head of ``x [B, T, H, D]`` with the strides ``s_x`` as :class:`Rows`."""
    return Rows(x + i_b * s_x[0] + i_h * s_x[2], s_x[1])


@triton.jit
def token_rows(x, s_x, i_b, i_t):
    """Return the heads of one token of ``x [B, T, H, D]`` with the strides ``s_x`` as :class:`Rows`."""
    return Rows(x + i_b * s_x[0] + i_t * s_x[1], s_x[2])


@triton.jit
def load_rows(x, o_t, m_t, D: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr):
    """Load the rows ``o_t [N]`` of ``x`` into ``[N, BD]``; 0 where masked and beyond D."""
    o_d = tl.arange(0, BD)
    p_rows = x.first + o_t.to(tl.int64)[:, None] * x.step + o_d[None, :]

    if MASKED:
        rows = tl.load(p_rows, mask=m_t[:, None] & (o_d < D)[None, :], other=0.0)
    elif D == BD:
        rows = tl.load(p_rows)
    else:
        rows = tl.load(p_rows, mask=(o_d < D)[None, :], other=0.0)
    return rows


@triton.jit
def store_rows(x, o_t, m_t, b_x, D: tl.constexpr, BD: tl.constexpr):
    """Store ``b_x [N, BD]`` to the rows ``o_t [N]`` of ``x``, in its dtype."""
    o_d = tl.arange(0, BD)
    p_rows = x.first + o_t.to(tl.int64)[:, None] * x.step + o_d[None, :]
    tl.store(p_rows, b_x.to(x.first.dtype.element_ty), mask=m_t[:, None] & (o_d < D)[None, :])


@triton.jit
def weigh(top, total, b_s, AXIS: tl.constexpr, HIDDEN: tl.constexpr):
    """Take the scores of more keys into a running softmax.

    Args:
        top: ``[M]``, largest score so far.
        total: ``[M]``, sum of ``exp2(score - top)``.
        b_s: ``[M, N]`` scores, or ``[N, M]`` where AXIS is 0.
        AXIS: The axis of the keys.
        HIDDEN: Whether a row may not have seen a key yet: ``-inf - -inf`` would be NaN in it.

    Returns:
        Top, total, the weights of the keys, and the factor ``[M]`` on what was summed up before.
    """
    b_max = tl.maximum(top, tl.max(b_s, AXIS))
    safe = tl.where(b_max == float("-inf"), 0.0, b_max) if HIDDEN else b_max
    b_p = tl.exp2(b_s - tl.expand_dims(safe, AXIS))
    shrink = tl.exp2(top - safe)
    return b_max, total * shrink + tl.sum(b_p, AXIS), b_p, shrink


@triton.jit
def new_softmax(BM: tl.constexpr, BD: tl.constexpr):
    """Return the :class:`Softmax` of BM rows that have seen no key."""
    top = tl.full([BM], float("-inf"), tl.float32)
    return Softmax(top, tl.zeros([BM], tl.float32), tl.zeros([BM, BD], tl.float32))


@triton.jit
def attend(
    state, b_q, b_k, b_v, visible, scale2, HIDDEN: tl.constexpr, GUARD: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """Return the :class:`Softmax` of the rows ``b_q [M, BD]`` after N more keys and values ``[N, BD]``.

    ``visible [M, N]`` says which of them a row sees, all of them without HIDDEN.
    """
    b_s = dot(b_q, tl.trans(b_k), UPCAST) * scale2

    if GUARD:
        b_s = tl.where(finite_rows(b_v)[None, :], b_s, float("nan"))
        b_v = finite(b_v)
    if HIDDEN:
        b_s = tl.where(visible, b_s, float("-inf"))

    top, total, b_p, shrink = weigh(state.top, state.total, b_s, 1, HIDDEN)
    return Softmax(top, total, state.sums * shrink[:, None] + dot(b_p.to(b_v.dtype), b_v, UPCAST))


@triton.jit
def softmax_divisor(total):
    """Return what the weighted sum of values of a running softmax is divided by, ``[M]``."""
    return tl.where(total == 0, 1.0, total)


@triton.jit
def softmax_lse(top, total):
    """Return the lse ``[M]`` of a running softmax."""
    return tl.where(total == 0, float("-inf"), (top + tl.log2(total)) * LN2)


@triton.jit
def load_terms(p_lse, p_delta, m_t, MASKED: tl.constexpr):
    """Return base and delta of :class:`Graded` rows; without MASKED all exist and have seen a key."""
    if MASKED:
        b_lse = tl.load(p_lse, mask=m_t, other=float("-inf"))
        # A query without keys has no gradient, whatever its lse is used for.
        blind = b_lse == float("-inf")
        b_delta = tl.where(blind, 0.0, tl.load(p_delta, mask=m_t, other=0.0))
        base = tl.where(blind, float("inf"), b_lse * LOG2E)
    else:
        b_delta = tl.load(p_delta)
        base = tl.load(p_lse) * LOG2E
    return base, b_delta


@triton.jit
def probabilities(b_s, visible, HIDDEN: tl.constexpr):
    """Return the probabilities of scores less the base of their query; without HIDDEN all are visible."""
    if HIDDEN:
        b_s = tl.where(visible, b_s, float("-inf"))
    return tl.exp2(b_s)


@triton.jit
def grade_queries(
    b_dq, rows, b_k, b_v, visible, scale2, HIDDEN: tl.constexpr, GUARD: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """Add what N keys and values give to the gradient of the :class:`Graded` rows; see :func:`attend`."""
    b_s = dot(rows.q, tl.trans(b_k), UPCAST) * scale2 - rows.base[:, None]  # [M, N]
    b_p = probabilities(b_s, visible, HIDDEN)  # before dp: scores held longer cost registers
    b_dp = dot(rows.do, tl.trans(b_v), UPCAST) - rows.delta[:, None]

    if GUARD:  # rows that see such a key or value have a base that is NaN
        b_dp = tl.where(visible, b_dp, 0.0)
        b_k = finite(b_k)
    return b_dq + dot((b_p * b_dp).to(b_k.dtype), b_k, UPCAST)


@triton.jit
def grade_keys(
    grads, b_k, b_v, rows, visible, scale2, HIDDEN: tl.constexpr, GUARD: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """Add what M :class:`Graded` rows give to the gradients ``(dk, dv) [N, BD]`` of N keys and values.

    ``visible [N, M]`` as in :func:`attend`. With GUARD the keys and values must be finite already.
    """
    b_q = rows.q
    b_do = rows.do
    b_s = dot(b_k, tl.trans(b_q), UPCAST) * scale2 - rows.base[None, :]  # [N, M]
    b_dp = dot(b_v, tl.trans(b_do), UPCAST) - rows.delta[None, :]

    if GUARD:
        good = finite_rows(b_q) & finite_rows(b_do)
        b_q = finite(b_q)
        b_do = finite(b_do)
        b_s = tl.where(good[None, :], b_s, float("nan"))
        b_dp = tl.where(visible, b_dp, 0.0)

    b_p = probabilities(b_s, visible, HIDDEN)
    b_dv = grads[1] + dot(b_p.to(b_do.dtype), b_do, UPCAST)
    return grads[0] + dot((b_p * b_dp).to(b_q.dtype), b_q, UPCAST), b_dv
