"""The torch backend's compressed attention and block choice against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsa_convert.kernels import block_topk, compressed_attention
from nsa_convert.kernels.compressed.cells import CellGrid
from nsa_convert.kernels.compressed.topk import top_blocks
from nsa_convert.patterns import BlockTopK, SequenceLayout
from tests.kernels.utils import (
    LAYOUTS,
    as_cache,
    assert_close,
    both,
    exact,
    make_cells,
    make_layout,
    make_qkv,
)

GRIDS = [
    (8, 4, 16, 4, "sum"),
    (8, 8, 8, 5, "max"),
    (32, 16, 64, 3, "sum"),
    (32, 8, 8, 6, "sum"),
    (4, 2, 8, 3, "max"),
]


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("num_queries", [1, 2, 7, 75, 130, 300])
@pytest.mark.parametrize(("width", "stride", "block_size", "num_blocks", "reduce"), GRIDS)
def test_output_and_selection(
    kind: str, num_queries: int, width: int, stride: int, block_size: int, num_blocks: int, reduce: str
) -> None:
    layout, batch, num_keys = make_layout(kind, num_queries)
    q, _, _ = make_qkv(batch, num_queries, num_keys, (6, 2))
    ck, cv = make_cells(batch, num_keys, 2, CellGrid(width=width, stride=stride), layout)
    rule = BlockTopK(block_size=block_size, num_blocks=num_blocks, reduce=reduce)
    settings = {"width": width, "stride": stride, "layout": layout}
    fast, truth = both(compressed_attention, q, ck, cv, rule=rule, **settings)
    assert_close(fast.o, truth.o, truth.o)
    assert_close(fast.lse, truth.lse, truth.lse)
    assert torch.equal(fast.selection.block_indices, truth.selection.block_indices)
    only = block_topk(q, ck, rule=rule, **settings)
    assert torch.equal(only.block_indices, truth.selection.block_indices)
    assert compressed_attention(q, ck, cv, **settings).selection is None


def choice(kind: str, num_queries: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Return queries, cell keys and the sizes of the cells with their layout."""
    layout, batch, num_keys = make_layout(kind, num_queries)
    q, _, _ = make_qkv(batch, num_queries, num_keys, (6, 2))
    ck, _ = make_cells(batch, num_keys, 2, CellGrid(width=8, stride=4), layout)
    return q, ck, {"width": 8, "stride": 4, "layout": layout}


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("num_queries", [1, 2, 75])
def test_every_query_head_chooses(kind: str, num_queries: int) -> None:
    q, ck, settings = choice(kind, num_queries)
    rule = BlockTopK(block_size=8, num_blocks=4, per_head=True)
    fast, truth = both(block_topk, q, ck, rule=rule, **settings)
    assert torch.equal(fast.block_indices, truth.block_indices)
    alone = block_topk(q, ck.repeat_interleave(3, 2), rule=BlockTopK(block_size=8, num_blocks=4), **settings)
    assert torch.equal(truth.block_indices, alone.block_indices)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("num_queries", [1, 2, 75])
def test_cell_keys_in_parts(kind: str, num_queries: int) -> None:
    q, ck, settings = choice(kind, num_queries)
    settings["rule"] = BlockTopK(block_size=8, num_blocks=4)
    whole = block_topk(q, ck, **settings)
    for parts in both(block_topk, q, ck.split([10, 6], -1), **settings):
        assert torch.equal(parts.block_indices, whole.block_indices)


@pytest.mark.parametrize(
    ("parts", "message"),
    [((), "at least one part"), ((9, 6), r"q 16, k 9 \+ 6"), ((16, 16), r"q 16, k 16 \+ 16")],
)
def test_parts_that_do_not_fit(parts: tuple[int, ...], message: str) -> None:
    q, _, _ = make_qkv(1, 4, 40, (6, 2))
    keys = [torch.zeros(1, 9, 2, size, dtype=q.dtype) for size in parts]
    with pytest.raises(ValueError, match=message):
        block_topk(q, keys, width=8, stride=4, rule=BlockTopK(block_size=8, num_blocks=4))


@pytest.mark.parametrize("start", [None, torch.tensor([0, 9])])
@pytest.mark.parametrize("offset", [3, 7, 8, 90])
@pytest.mark.parametrize("num_queries", [1, 3, 40])
def test_a_buffer_with_room_for_more_cells(num_queries: int, offset: int, start: torch.Tensor | None) -> None:
    grid, layout = CellGrid(width=8, stride=4), SequenceLayout(offset=offset, start=start)
    q, _, _ = make_qkv(2, num_queries, offset + num_queries, (6, 2))
    ck, cv = make_cells(2, offset + num_queries, 2, grid, layout)
    settings = {"width": 8, "stride": 4, "layout": layout, "rule": BlockTopK(block_size=8, num_blocks=3)}
    truth = compressed_attention(q, ck, cv, **settings)
    roomy = [torch.cat([x, x.new_full((2, 5, *x.shape[2:]), torch.nan)], 1) for x in (ck, cv)]
    got = compressed_attention(q, *(as_cache(x) for x in roomy), **settings)
    torch.testing.assert_close(got.o, truth.o, rtol=0, atol=1e-12)
    torch.testing.assert_close(got.lse, truth.lse, rtol=0, atol=1e-12)
    assert torch.equal(got.selection.block_indices, truth.selection.block_indices)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("num_queries", [1, 2, 75, 300])
def test_a_given_normaliser_weighs_the_heads(kind: str, num_queries: int) -> None:
    layout, batch, num_keys = make_layout(kind, num_queries)
    q, _, _ = make_qkv(batch, num_queries, num_keys, (6, 2))
    ck, cv = make_cells(batch, num_keys, 2, CellGrid(width=8, stride=4), layout)
    settings = {"width": 8, "stride": 4, "layout": layout, "rule": BlockTopK(block_size=8, num_blocks=3)}
    own = compressed_attention(q, ck, cv, **settings)
    same = block_topk(q, ck, lse=own.lse, **settings)
    assert torch.equal(same.block_indices, own.selection.block_indices)
    lse = own.lse + 3 * torch.randn(own.lse.shape, dtype=own.lse.dtype)
    lse[..., 0] = -torch.inf  # this head has no say
    fast, truth = both(block_topk, q, ck, lse=lse, **settings)
    assert torch.equal(fast.block_indices, truth.block_indices)
    silent = q.clone()
    silent[:, :, 0] = 99.0
    assert torch.equal(block_topk(silent, ck, lse=lse, **settings).block_indices, fast.block_indices)
    high = block_topk(q, ck, lse=lse - 1e4, **settings).block_indices  # bounded: forced blocks stay in
    assert torch.equal(high[..., :1], fast.block_indices[..., :1])


def test_a_normaliser_of_another_shape_is_refused() -> None:
    q, ck = torch.zeros(1, 3, 4, 8), torch.zeros(1, 2, 2, 8)
    rule = BlockTopK(block_size=4, num_blocks=3)
    with pytest.raises(ValueError, match=r"lse must be \(1, 3, 4\)"):
        block_topk(q, ck, width=4, stride=4, rule=rule, lse=torch.zeros(1, 4, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (14, 2), (16, 1)])
@pytest.mark.parametrize("num_queries", [1, 200])
def test_dtypes(dtype: torch.dtype, heads: tuple[int, int], num_queries: int) -> None:
    layout = SequenceLayout(offset=100)
    q, _, _ = make_qkv(1, num_queries, 100 + num_queries, heads, dim=32, dtype=dtype)
    ck, cv = make_cells(
        1, 100 + num_queries, heads[1], CellGrid(width=8, stride=4), layout, dim=32, dtype=dtype
    )
    settings = {"width": 8, "stride": 4, "layout": layout}
    fast, low = both(compressed_attention, q, ck, cv, **settings)
    truth = exact(compressed_attention, q, ck, cv, **settings)
    assert_close(fast.o, low.o, truth.o)
    assert_close(fast.lse, low.lse, truth.lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_queries", [1, 200])
def test_equal_scores_go_to_the_lower_block(dtype: torch.dtype, num_queries: int) -> None:
    layout = SequenceLayout(offset=200 - num_queries)
    q = torch.ones(1, num_queries, 4, 8, dtype=dtype)
    ck = torch.ones(1, 49, 2, 8, dtype=dtype)  # every cell scores the same
    rule = BlockTopK(block_size=16, num_blocks=6)
    chosen = block_topk(q, ck, width=8, stride=4, rule=rule, layout=layout).block_indices
    # Full blocks share one score; the first is forced and the last two are the query's neighbourhood.
    assert chosen[0, 0, -1].tolist() == [0, 1, 2, 3, 11, 12]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_blocks_is_a_stable_sort(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    score = torch.randint(0, 4, (50, 40), generator=g).to(dtype) / 4
    ages = torch.full((50, 1), 40)
    rule = BlockTopK(block_size=1, num_blocks=9)
    forced = score.clone()
    forced[:, 0] = forced[:, 38:] = torch.inf
    expected = forced.sort(dim=-1, descending=True, stable=True).indices[:, :9].sort(-1).values
    assert torch.equal(top_blocks(score, ages, 9, rule), expected)


@pytest.mark.parametrize("num_queries", [1, 3, 40])
def test_static_cells_and_tensor_offset(num_queries: int) -> None:
    grid, rule = CellGrid(width=8, stride=4), BlockTopK(block_size=16, num_blocks=4)
    capacity = 240
    q, _, _ = make_qkv(2, num_queries, capacity, (6, 2))
    _, ck, cv = make_qkv(2, 1, grid.count(capacity), (6, 2))
    ck, cv = as_cache(ck), as_cache(cv)
    for offset in (0, 5, 100, capacity - num_queries):
        settings = {"width": 8, "stride": 4, "rule": rule}
        _, truth = both(compressed_attention, q, ck, cv, layout=SequenceLayout(offset=offset), **settings)
        layout = SequenceLayout(offset=torch.tensor(offset))
        fast = compressed_attention(q, ck, cv, layout=layout, **settings)
        assert_close(fast.o, truth.o, truth.o)
        assert_close(fast.lse, truth.lse, truth.lse)
        chosen, expected = fast.selection.block_indices, truth.selection.block_indices
        size = expected.shape[-1]
        assert torch.equal(chosen[..., :size], expected)
        assert (chosen[..., size:] == -1).all()


def test_no_queries() -> None:
    q, ck, cv = make_qkv(1, 0, 3, (4, 2))
    rule = BlockTopK(block_size=16, num_blocks=4)
    out = compressed_attention(q, ck, cv, width=8, stride=4, rule=rule)
    assert out.o.shape == (1, 0, 4, 16)
    assert out.lse.shape == (1, 0, 4)
    assert out.selection.block_indices.shape[:3] == (1, 2, 0)
