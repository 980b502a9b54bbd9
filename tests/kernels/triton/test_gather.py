"""Attention query by query: decoding over blocks, windows and whole caches, and lists of tokens."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from nsa_convert.kernels.attention.reference import masked_softmax_attention
from nsa_convert.kernels.gather import triton_backend as triton_gather
from nsa_convert.kernels.gather.triton_backend import attend_lists, attend_runs, readers
from nsa_convert.kernels.interval.triton_backend import layout_intervals
from nsa_convert.patterns import BlockSelection, SequenceLayout, SinkWindow, TokenSelection
from tests.kernels.triton.checks import check, poison, run
from tests.kernels.utils import as_cache, assert_close, make_blocks, make_layout, make_qkv
from tests.marks import slow

pytestmark = pytest.mark.usefixtures("poison")
__all__ = ["poison"]


def lists_op(pattern: BlockSelection, layout: SequenceLayout):
    def op(q, k, v):
        bounds = layout_intervals(layout, q.shape[1], k.shape[1], q.device)
        return attend_lists(q, k, v, pattern, layout, bounds, q.shape[-1] ** -0.5)

    return op


def assert_values(got, inputs, mask) -> None:
    scale = inputs[0].shape[-1] ** -0.5
    low = masked_softmax_attention(*inputs, mask, scale)
    truth = masked_softmax_attention(*(x.double() for x in inputs), mask, scale)
    for x, y, z in zip(got, low, truth, strict=False):
        assert_close(x, y, z)


@pytest.mark.parametrize(
    ("kind", "num_queries", "heads", "lists", "size", "query_block", "dtype", "dim"),
    [
        ("plain", 13, (4, 2), 2, 5, 1, torch.float32, 16),
        slow("offset", 4, (3, 1), 1, 40, 1, torch.float16, 32),
        ("padded", 11, (8, 1), 1, 5, 1, torch.float16, 16),
        slow("padded_offset", 5, (6, 2), 1, 70, 4, torch.float32, 16),
        slow("packed", 15, (4, 2), 4, 4, 1, torch.float16, 16),
        ("packed", 21, (7, 1), 1, 8, 16, torch.float16, 80),
        slow("plain", 9, (16, 1), 1, 5, 1, torch.float16, 16),
    ],
)
def test_lists_of_tokens(kind, num_queries, heads, lists, size, query_block, dtype, dim, monkeypatch) -> None:
    monkeypatch.setattr(triton_gather, "CHUNK", 8)
    layout, batch, num_keys = make_layout(kind, num_queries)
    inputs = make_qkv(batch, num_queries, num_keys, heads, dim, dtype)
    pattern = make_blocks(batch, lists, num_queries, num_keys, size, 1, query_block, layout)
    mask = pattern.to_dense_mask(num_queries, num_keys, heads[0], layout)
    check(lists_op(pattern, layout), inputs, mask)


@pytest.mark.slow
def test_gradients_do_not_change_from_run_to_run() -> None:
    layout, batch, num_keys = make_layout("offset", 5)
    inputs = make_qkv(batch, 5, num_keys, (4, 2), dtype=torch.float16)
    op = lists_op(make_blocks(batch, 2, 5, num_keys, 9, 1, 1, layout), layout)
    for x, y in zip(run(op, inputs), run(op, inputs), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("splits", [4, slow(1)])
@pytest.mark.parametrize(
    ("kind", "num_queries", "heads", "lists", "block_size", "size", "dtype"),
    [
        ("plain", 1, (4, 2), 2, 16, 4, torch.float32),
        ("padded_offset", 3, (8, 1), 1, 5, 9, torch.float16),
        ("offset", 4, (6, 2), 6, 8, 4, torch.float16),
        ("padded_offset", 3, (3, 1), 1, 64, 3, torch.float16),
    ],
)
def test_blocks(kind, num_queries, heads, lists, block_size, size, dtype, splits, monkeypatch) -> None:
    monkeypatch.setattr(triton_gather, "num_splits", lambda *_: splits)
    layout, batch, num_keys = make_layout(kind, num_queries)
    q, k, v = make_qkv(batch, num_queries, num_keys, heads, dtype=dtype)
    pattern = make_blocks(batch, lists, num_queries, num_keys, size, block_size, 1, layout)
    with torch.no_grad():
        got = lists_op(pattern, layout)(q, as_cache(k, 5), as_cache(v, 5))
    assert_values(got, (q, k, v), pattern.to_dense_mask(num_queries, num_keys, heads[0], layout))


@pytest.mark.parametrize("splits", [4, slow(1)])
@pytest.mark.parametrize(("sinks", "window"), [(3, 20), (0, None)])
@pytest.mark.parametrize("kind", ["padded_offset", "padded"])
def test_window_and_whole_cache(kind, sinks, window, splits, monkeypatch) -> None:
    monkeypatch.setattr(triton_gather, "num_splits", lambda *_: splits)
    layout, batch, num_keys = make_layout(kind, 2)
    q, k, v = make_qkv(batch, 2, num_keys, (6, 2), dtype=torch.float16)
    runs = layout_intervals(layout, 2, num_keys, q.device, window, sinks)
    pattern = SinkWindow(num_sinks=sinks, window_size=window or num_keys)
    mask = pattern.to_dense_mask(2, num_keys, 6, layout)
    got = attend_runs(q, as_cache(k, 3), as_cache(v, 3), runs, num_keys, 0.25)
    assert_values(got, (q, k, v), mask)
    _, lse = attend_runs(q, k, None, runs, num_keys, 0.25)
    assert_values((got[0], lse), (q, k, v), mask)


def test_tensor_offset_equals_int_offset() -> None:
    q, k, v = make_qkv(2, 2, 100, (6, 2), dtype=torch.float32)
    for offset in (0, 98):
        at = [layout_intervals(SequenceLayout(offset=x), 2, 100, q.device, 30, 3)
              for x in (offset, torch.tensor(offset))]  # fmt: skip
        for x, y in zip(*(attend_runs(q, k, v, runs, 33, 0.25) for runs in at), strict=True):
            assert torch.equal(x, y)


def test_more_splits_than_keys_and_large_scores() -> None:
    q, k, v = make_qkv(1, 1, 300, (2, 1), dtype=torch.float32)
    q = q * (200 / (q @ k[:, :, 0].transpose(1, 2)).abs().max()) * 4
    layout = SequenceLayout(offset=299)
    assert triton_gather.num_splits(q, 1, 300) > 1
    runs = layout_intervals(layout, 1, 300, q.device)
    o, lse = attend_runs(q, k, v, runs, 300, 0.25)
    everything = torch.ones(1, dtype=torch.bool)
    truth = masked_softmax_attention(q.double(), k.double(), v.double(), everything, 0.25)
    assert torch.allclose(o.double(), truth[0], atol=2e-4)
    assert torch.allclose(lse.double(), truth[1], atol=2e-4)


def test_keys_that_are_not_finite_reach_only_those_who_list_them() -> None:
    q, k, v = make_qkv(1, 3, 40, (4, 2), dtype=torch.float32)
    k[:, 7], v[:, 8], v[:, 39] = torch.nan, torch.nan, torch.nan
    items = torch.tensor([[1, 2, 30], [1, 7, 5], [3, 8, 39]])[None, None]
    layout = SequenceLayout(offset=36)
    pattern = TokenSelection(token_indices=items).as_blocks()
    o, lse = lists_op(pattern, layout)(q, k, v)
    assert o[:, 0].isfinite().all()
    assert lse[:, 0].isfinite().all()
    assert o[:, 1:].isnan().all()


def test_readers_are_the_inverse_of_the_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_gather, "CHUNK", 2)
    items = torch.tensor([[0, 2, -1], [2, 1, 9], [2, 0, 3]])[None, None]
    lo, hi = torch.zeros(1, 3, dtype=torch.int32), torch.tensor([[5, 6, 3]], dtype=torch.int32)
    entries, offsets, last_chunk = readers(items, lo, hi, 6)
    assert offsets.tolist() == [[0, 2, 3, 6, 6, 6, 6]]
    assert entries[0, :6].tolist() == [0, 2, 1, 0, 1, 2]
    assert last_chunk.tolist() == [[1, 2, 4, 5, 6, 7]]
