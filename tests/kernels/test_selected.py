"""The torch backend's pattern attention against the dense-mask reference."""

from __future__ import annotations

import pytest
import torch

from nsa_convert.kernels import sparse_attention
from nsa_convert.kernels.union.torch_backend import WIDTHS, union, union_sizes
from nsa_convert.patterns import DENSE_LAYOUT, BlockSelection, SequenceLayout, SinkWindow, TokenSelection
from tests.kernels.utils import (
    LAYOUTS,
    as_cache,
    assert_close,
    both,
    exact,
    make_blocks,
    make_layout,
    make_qkv,
)

HEADS = [(1, 1), (4, 2), (3, 1), (8, 2), (5, 1), (14, 2), (16, 2), (16, 1)]


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("num_queries", [1, 2, 7, 75, 130])
@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (0, 16), (4, 40), (3, 500)])
def test_window(kind: str, num_queries: int, sinks: int, window: int) -> None:
    layout, batch, num_keys = make_layout(kind, num_queries)
    q, k, v = make_qkv(batch, num_queries, num_keys, (6, 2))
    pattern = SinkWindow(num_sinks=sinks, window_size=window)
    fast, truth = both(sparse_attention, q, k, v, pattern, layout=layout)
    for x, y in zip(fast, truth, strict=True):
        assert_close(x, y, y)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("num_queries", [1, 2, 7, 75, 130])
@pytest.mark.parametrize("lists", [1, 2, 6])
@pytest.mark.parametrize(
    ("block_size", "size", "query_block"),
    [(8, 4, 1), (16, 3, 8), (5, 9, 1), (8, 40, 64), (8, 5, 32), (1, 30, 128)],
)
def test_blocks(
    kind: str, num_queries: int, lists: int, block_size: int, size: int, query_block: int
) -> None:
    layout, batch, num_keys = make_layout(kind, num_queries)
    q, k, v = make_qkv(batch, num_queries, num_keys, (6, 2))
    pattern = make_blocks(batch, lists, num_queries, num_keys, size, block_size, query_block, layout)
    fast, truth = both(sparse_attention, q, k, v, pattern, layout=layout)
    for x, y in zip(fast, truth, strict=True):
        assert_close(x, y, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("num_queries", [1, 150])
def test_dtypes_and_groups(dtype: torch.dtype, heads: tuple[int, int], num_queries: int) -> None:
    layout = SequenceLayout(offset=50)
    num_keys = num_queries + 50
    q, k, v = make_qkv(1, num_queries, num_keys, heads, dim=32, dtype=dtype)
    patterns = (
        make_blocks(1, heads[1], num_queries, num_keys, 4, 16, 1, layout),
        SinkWindow(num_sinks=2, window_size=40),
    )
    for pattern in patterns:
        fast, low = both(sparse_attention, q, k, v, pattern, layout=layout)
        for x, y, z in zip(fast, low, exact(sparse_attention, q, k, v, pattern, layout=layout), strict=True):
            assert_close(x, y, z, inputs=dtype)


def test_tokens() -> None:
    q, k, v = make_qkv(2, 60, 60, (4, 2))
    blocks = make_blocks(2, 2, 60, 60, 9, 1, 1, DENSE_LAYOUT)
    pattern = TokenSelection(token_indices=blocks.block_indices)
    (o, lse), (o_ref, lse_ref) = both(sparse_attention, q, k, v, pattern)
    assert_close(o, o_ref, o_ref)
    assert_close(lse, lse_ref, lse_ref)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_a_bad_key_reaches_only_the_tiles_that_list_it(
    kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nsa_convert.kernels.union.shared.CHUNK_BYTES", chunk)
    layout, batch, num_keys = make_layout(kind, 150)
    q, k, v = make_qkv(batch, 150, num_keys, (6, 2))
    pattern = make_blocks(batch, 6, 150, num_keys, 5, 8, 32, layout)
    bad = torch.zeros(num_keys, dtype=torch.bool)
    bad[40:48] = bad[90] = True
    seen = (pattern.to_dense_mask(150, num_keys, 6, layout) & bad).any(-1).transpose(1, 2)  # [B, TQ, HQ]
    expected = both(
        sparse_attention,
        q,
        k.where(~bad[:, None, None], 0),
        v.where(~bad[:, None, None], 0),
        pattern,
        layout=layout,
    )[1]
    k[:, 40:48], v[:, 90] = torch.nan, torch.inf
    got = both(sparse_attention, q, k, v, pattern, layout=layout)[0]
    assert 0 < seen.sum() < seen.numel()
    assert torch.equal(got[0].isnan(), seen[..., None].expand_as(got[0]))
    assert torch.equal(got[1].isnan(), seen)
    for x, y in zip(got, expected, strict=True):
        assert_close(x[~seen], y[~seen], y[~seen])


@pytest.mark.parametrize(("num_queries", "num_keys"), [(0, 0), (0, 5)])
def test_no_queries(num_queries: int, num_keys: int) -> None:
    q, k, v = make_qkv(1, num_queries, num_keys, (4, 2))
    layout = SequenceLayout(offset=num_keys - num_queries)
    blocks = BlockSelection(block_indices=torch.zeros(1, 2, num_queries, 3, dtype=torch.long), block_size=4)
    for pattern in (blocks, SinkWindow(window_size=4)):
        o, lse = sparse_attention(q, k, v, pattern, layout=layout)
        assert o.shape == (1, 0, 4, 16)
        assert lse.shape == (1, 0, 4)


def test_every_block_listed_is_dense_attention() -> None:
    q, k, v = make_qkv(1, 70, 70, (4, 2))
    block, own = torch.arange(9), torch.arange(70)[:, None] // 8
    indices = block.expand(1, 2, 70, 9).masked_fill(block > own, -1)
    (o, lse), (o_ref, lse_ref) = both(
        sparse_attention, q, k, v, BlockSelection(block_indices=indices, block_size=8)
    )
    assert_close(o, o_ref, o_ref)
    assert_close(lse, lse_ref, lse_ref)


@pytest.mark.parametrize("room", [0, 9])
@pytest.mark.parametrize("num_queries", [1, 3])
def test_cache_memory_gives_the_same_answer(num_queries: int, room: int) -> None:
    layout = SequenceLayout(offset=100 - num_queries, start=torch.tensor([0, 30]))
    q, k, v = make_qkv(2, num_queries, 100, (6, 2))
    blocks = make_blocks(2, 2, num_queries, 100, 5, 16, 1, layout)
    for pattern in (blocks, SinkWindow(num_sinks=3, window_size=20)):
        expected = sparse_attention(q, k, v, pattern, layout=layout)
        cached = sparse_attention(q, as_cache(k, room), as_cache(v, room), pattern, layout=layout)
        for x, y in zip(cached, expected, strict=True):
            assert torch.allclose(x, y, atol=1e-12)


@pytest.mark.parametrize("num_queries", [1, 3, 40])
def test_any_memory_order(num_queries: int) -> None:
    layout = SequenceLayout(offset=60 - num_queries)
    q, k, v = (x.movedim(1, 3).contiguous().movedim(3, 1) for x in make_qkv(2, num_queries, 60, (4, 2)))
    blocks = make_blocks(2, 2, num_queries, 60, 3, 8, 1, layout)
    for pattern in (blocks, SinkWindow(window_size=20), SinkWindow(num_sinks=2, window_size=20)):
        fast, truth = both(sparse_attention, q[..., ::2], k[..., ::2], v[..., ::2], pattern, layout=layout)
        for x, y in zip(fast, truth, strict=True):
            assert_close(x, y, y)


@pytest.mark.parametrize("num_queries", [1, 3, 40])
def test_tensor_offset_equals_int_offset(num_queries: int) -> None:
    q, k, v = make_qkv(2, num_queries, 100, (6, 2))
    blocks = make_blocks(2, 2, num_queries, 100, 5, 16, 1, DENSE_LAYOUT)
    for pattern in (blocks, SinkWindow(num_sinks=3, window_size=20), SinkWindow(window_size=30)):
        for offset in (0, 41, 100 - num_queries):
            layout = SequenceLayout(offset=offset)
            _, truth = both(sparse_attention, q, k, v, pattern, layout=layout)
            fast = sparse_attention(q, k, v, pattern, layout=SequenceLayout(offset=torch.tensor(offset)))
            for x, y in zip(fast, truth, strict=True):
                assert_close(x, y, y)


def test_union_lists_each_block_once() -> None:
    chosen = torch.tensor([[[3, 1, -1], [1, 0, 3]], [[5, -1, -1], [-1, -1, -1]]])
    blocks, member, sizes = union(chosen)
    assert sizes == [3, 1]
    assert blocks.tolist() == [[0, 1, 3], [5, 0, 0]]
    assert member.long().tolist() == [[[0, 1, 1], [1, 1, 1]], [[1, 0, 0], [0, 0, 0]]]
    assert union_sizes(chosen.flatten(1)).tolist() == sizes


@pytest.mark.parametrize("shared", [True, False])
def test_tile_width_follows_the_locality_of_the_lists(monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    from nsa_convert.kernels.union import torch_backend as module

    widths = []
    choose = module.choose_width
    monkeypatch.setattr(module, "choose_width", lambda *a: widths.append(choose(*a)) or widths[-1])
    num_queries, own = 512, torch.arange(512)[:, None] // 4
    near = (own - torch.arange(6)).clamp(min=-1)
    far = make_blocks(1, 1, num_queries, num_queries, 6, 4, 1, DENSE_LAYOUT).block_indices[0, 0]
    indices = (near if shared else far)[None, None]
    q, k, v = make_qkv(1, num_queries, num_queries, (2, 1))
    (o, _), (o_ref, _) = both(sparse_attention, q, k, v, BlockSelection(block_indices=indices, block_size=4))
    assert_close(o, o_ref, o_ref)
    assert widths[0] in WIDTHS
    assert (widths[0] >= 8) == shared
