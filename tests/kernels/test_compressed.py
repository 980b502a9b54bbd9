"""The torch backend's compressed attention and block choice against the reference."""

from __future__ import annotations

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
    (8, 4, 16, 4, "sum"), (8, 8, 8, 5, "max"), (32, 16, 64, 3, "sum"), (32, 8, 8, 6, "sum"),
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
    own = torch.full((50, 1), 39)
    rule = BlockTopK(block_size=1, num_blocks=9)
    forced = score.clone()
    forced[:, 0] = forced[:, 38:] = torch.inf
    expected = forced.sort(dim=-1, descending=True, stable=True).indices[:, :9].sort(-1).values
    assert torch.equal(top_blocks(score, own, 9, rule), expected)


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
