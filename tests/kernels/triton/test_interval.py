"""Interval attention: sliding window with sinks, and dense attention over padded and packed batches."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from nsa_convert.kernels.attention.reference import masked_softmax_attention
from nsa_convert.kernels.interval.triton_backend import interval_attention, layout_intervals, query_bounds
from nsa_convert.patterns import SequenceLayout, SinkWindow
from tests.kernels.triton.checks import check, poison, run
from tests.kernels.utils import as_cache, make_layout, make_qkv
from tests.marks import slow

pytestmark = pytest.mark.usefixtures("poison")
__all__ = ["poison"]


def window_op(layout: SequenceLayout, num_sinks: int, window_size: int | None):
    def op(q, k, v):
        at = layout_intervals(layout, q.shape[1], k.shape[1], q.device, window_size, num_sinks)
        return interval_attention(q, k, v, at, q.shape[-1] ** -0.5)

    return op


def window_mask(q, k, layout: SequenceLayout, num_sinks: int, window_size: int | None):
    pattern = SinkWindow(num_sinks=num_sinks, window_size=window_size or k.shape[1])
    return pattern.to_dense_mask(q.shape[1], k.shape[1], q.shape[2], layout)


@pytest.mark.parametrize(
    ("kind", "num_queries", "heads", "dim", "dtype", "num_sinks", "window_size"),
    [
        slow("plain", 131, (2, 1), 16, torch.float32, 0, 40),
        ("plain", 75, (3, 1), 32, torch.float16, 4, 16),
        ("plain", 7, (1, 1), 16, torch.float16, 0, None),
        slow("offset", 33, (7, 1), 16, torch.float16, 3, 20),
        ("offset", 40, (2, 1), 80, torch.float16, 0, None),
        slow("padded", 70, (4, 1), 16, torch.float32, 2, 33),
        ("padded", 40, (8, 1), 16, torch.float16, 0, None),
        ("padded_offset", 50, (6, 2), 16, torch.float16, 0, 30),
        slow("packed", 140, (4, 2), 16, torch.float32, 3, 17),
        slow("packed", 97, (3, 1), 32, torch.float16, 0, None),
        slow("packed", 70, (16, 1), 16, torch.float16, 0, 50),
        ("plain", 40, (2, 1), 96, torch.float32, 0, 1),
        ("plain", 35, (1, 1), 256, torch.float16, 2, 9),
    ],
)
def test_window_and_dense(kind, num_queries, heads, dim, dtype, num_sinks, window_size) -> None:
    layout, batch, num_keys = make_layout(kind, num_queries)
    inputs = make_qkv(batch, num_queries, num_keys, heads, dim, dtype)
    mask = window_mask(*inputs[:2], layout, num_sinks, window_size)
    check(window_op(layout, num_sinks, window_size), inputs, mask)


@pytest.mark.parametrize("kind", ["packed", slow("offset")])
def test_gradients_do_not_change_from_run_to_run(kind: str) -> None:
    layout, batch, num_keys = make_layout(kind, 40)
    inputs = make_qkv(batch, 40, num_keys, (2, 1), dtype=torch.float16)
    op = window_op(layout, 2, 20)
    for x, y in zip(run(op, inputs), run(op, inputs), strict=True):
        assert torch.equal(x, y)


def test_bfloat16() -> None:
    """The interpreter cuts bits off where a GPU rounds: this only sees whether operands are read as such."""
    layout, batch, num_keys = make_layout("packed", 60)
    inputs = make_qkv(batch, 60, num_keys, (3, 1), dtype=torch.bfloat16)
    mask = window_mask(*inputs[:2], layout, 0, 20)
    truth = run(lambda *x: masked_softmax_attention(*x, mask, 0.25)[:2], [x.double() for x in inputs])
    for x, y in zip(run(window_op(layout, 0, 20), inputs), truth, strict=True):
        assert (x.double() - y).abs().max() <= 2e-2 * y.abs().max()


def test_large_scores_stay_finite() -> None:
    q, k, v = make_qkv(1, 70, 70, (2, 1), dtype=torch.float32)
    q = q * (200 / (q @ k[:, :, 0].transpose(1, 2)).abs().max()) * 4  # |q k| * D ** -0.5 up to 200
    layout = SequenceLayout()
    out = check(window_op(layout, 0, 30), (q, k, v), window_mask(q, k, layout, 0, 30))
    assert all(x.isfinite().all() for x in out)


def test_cache_memory_gives_the_same_answer() -> None:
    layout = SequenceLayout(offset=37, start=torch.tensor([0, 9]))
    q, k, v = make_qkv(2, 30, 67, (4, 2), dtype=torch.float32)
    op = window_op(layout, 2, 20)
    with torch.no_grad():
        at = layout_intervals(layout, 30, 67, q.device, 20, 2)
        got = interval_attention(q, as_cache(k, 5), as_cache(v, 5), at, 0.25)
        odd = [x.movedim(1, 3).contiguous().movedim(3, 1) for x in (q, k, v)]
        for x, y in zip(interval_attention(*odd, at, 0.25), got, strict=True):
            assert torch.equal(x, y)
    for x, y in zip(got, run(op, (q, k, v)), strict=False):
        assert torch.equal(x, y)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_a_query_must_not_see_does_not_reach_it(bad: float) -> None:
    q, k, v = make_qkv(1, 80, 80, (2, 1), dtype=torch.float32)
    clean = window_op(SequenceLayout(), 1, 16)
    expected = run(clean, (q, k, v))
    v[:, 40], k[:, 41] = bad, float("nan")
    o, lse, dq, _, _ = run(clean, (q, k, v))
    touched = torch.zeros(80, dtype=torch.bool)
    touched[40:57] = True  # sees token 40 or 41
    for x, y in zip((o, lse, dq), expected, strict=False):
        assert x[:, touched].isnan().all()
        assert torch.equal(x[:, ~touched], y[:, ~touched])


def test_bounds_count_the_queries_that_see_a_key() -> None:
    layout, _, num_keys = make_layout("packed", 90)
    at = layout_intervals(layout, 90, num_keys, torch.device("cpu"), 20)
    bounds = query_bounds(at.lo, at.hi, num_keys)[0]
    mask = SinkWindow(window_size=20).to_dense_mask(90, num_keys, 1, layout)[0, 0]
    for i in range(num_keys // 16):
        some, all_of = mask[:, 16 * i : 16 * i + 16].any(1).nonzero(), mask[:, 16 * i : 16 * i + 16].all(1)
        assert bounds[0, i] <= some.min() <= some.max() < bounds[3, i + 1]
        assert all_of[bounds[1, i + 1] : bounds[2, i]].all()
        assert all_of.sum() == max(0, bounds[2, i] - bounds[1, i + 1])


@pytest.mark.parametrize("only", ["o", "lse"])
def test_one_of_both_outputs_may_be_unused(only: str) -> None:
    inputs = [x.requires_grad_() for x in make_qkv(1, 40, 40, (2, 1), dtype=torch.float32)]
    at = layout_intervals(SequenceLayout(), 40, 40, torch.device("cpu"), 9)
    o, lse = interval_attention(*inputs, at, 0.25)
    mask = SinkWindow(window_size=9).to_dense_mask(40, 40, 2)
    expected = masked_softmax_attention(*inputs, mask, 0.25)
    pair = (o, expected[0]) if only == "o" else (lse, expected[1])
    grads = (torch.autograd.grad(z.square().sum(), inputs, allow_unused=True) for z in pair)
    for x, y in zip(*grads, strict=True):
        assert torch.allclose(x, torch.zeros_like(x) if y is None else y, atol=1e-4)


def test_lse_may_have_any_gradient_where_no_key_is_seen() -> None:
    layout = SequenceLayout(start=torch.tensor([4]))
    inputs = [x.requires_grad_() for x in make_qkv(1, 9, 9, (2, 1), dtype=torch.float32)]
    o, lse = interval_attention(*inputs, layout_intervals(layout, 9, 9, torch.device("cpu"), 3), 0.25)
    (o.sum() + lse.exp().log().sum()).backward()  # the gradient of log(0) times 0 is NaN
    assert all(x.grad.isfinite().all() for x in inputs)


def test_no_queries_and_no_keys() -> None:
    q, k, v = make_qkv(1, 0, 0, (2, 1), dtype=torch.float32)
    at = layout_intervals(SequenceLayout(), 0, 0, torch.device("cpu"))
    o, lse = interval_attention(q, k, v, at, 0.25)
    assert o.shape == (1, 0, 2, 16)
    assert lse.shape == (1, 0, 2)


def test_operator_is_registered_correctly() -> None:
    inputs = [x.requires_grad_() for x in make_qkv(1, 20, 20, (2, 1), dtype=torch.float32)]
    at = layout_intervals(SequenceLayout(), 20, 20, torch.device("cpu"), 9, 2)
    torch.library.opcheck(
        torch.ops.nsa_convert.interval_forward, (*inputs, at.lo, at.hi, at.first, 2, 2, 0.25)
    )
