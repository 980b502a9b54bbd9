"""Compressed attention, block scores and the exact choice of blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from nsa_convert.kernels import block_topk, compressed_attention, use_backend
from nsa_convert.kernels.common.toolchain import Kernel
from nsa_convert.kernels.compressed import triton_blocks
from nsa_convert.kernels.compressed.cells import CellGrid
from nsa_convert.kernels.compressed.topk import top_blocks
from nsa_convert.patterns import BlockTopK, SequenceLayout
from tests.kernels.triton.checks import check, poison
from tests.kernels.utils import as_cache, make_cells, make_layout, make_qkv
from tests.marks import slow

pytestmark = pytest.mark.usefixtures("poison")
__all__ = ["poison"]


def cell_mask(q: Tensor, ck: Tensor, grid: CellGrid, layout: SequenceLayout) -> Tensor:
    if layout.cu_seqlens is None:
        return grid.visible(ck.shape[1], layout.ages(q.shape[1], q.device))[:, None]
    mask = torch.zeros(1, 1, q.shape[1], ck.shape[1], dtype=torch.bool)
    cell = 0
    for begin, end in layout.documents():
        count = grid.count(end - begin)
        seen = grid.complete(torch.arange(1, end - begin + 1))
        mask[0, 0, begin:end, cell : cell + count] = torch.arange(count) < seen[:, None]
        cell += count
    return mask


def assert_same_lists(got: Tensor, expected: Tensor) -> None:
    """Lists may be longer than the reference's where left padding counts as part of the document."""
    size = expected.shape[-1]
    assert torch.equal(got[..., :size].long(), expected)
    assert (got[..., size:] == -1).all()


@pytest.mark.parametrize(
    ("kind", "num_queries", "heads", "dtype", "sizes", "num_blocks", "reduce"),
    [
        slow("plain", 130, (2, 1), torch.float32, (8, 4, 16), 4, "sum"),
        ("offset", 40, (3, 1), torch.float16, (8, 8, 8), 5, "max"),
        slow("padded", 101, (8, 1), torch.float16, (32, 16, 64), 3, "sum"),
        ("padded_offset", 30, (7, 1), torch.float32, (4, 2, 8), 3, "max"),
        slow("packed", 150, (4, 2), torch.float32, (32, 8, 8), 6, "sum"),
        slow("packed", 75, (16, 1), torch.float16, (8, 4, 16), 4, "sum"),
    ],
)
def test_values_gradients_and_selection(kind, num_queries, heads, dtype, sizes, num_blocks, reduce) -> None:
    layout, batch, num_keys = make_layout(kind, num_queries)
    grid = CellGrid(width=sizes[0], stride=sizes[1])
    q, _, _ = make_qkv(batch, num_queries, num_keys, heads, dtype=dtype)
    ck, cv = make_cells(batch, num_keys, heads[1], grid, layout, dtype=dtype)
    rule = BlockTopK(block_size=sizes[2], num_blocks=num_blocks, reduce=reduce)
    settings = {"width": grid.width, "stride": grid.stride, "layout": layout}

    def op(*x: Tensor) -> tuple[Tensor, Tensor]:
        with use_backend("triton"):
            out = compressed_attention(*x, rule=rule, **settings)
        assert not out.selection.block_indices.requires_grad
        assert_same_lists(out.selection.block_indices, expected)
        return out.o, out.lse

    with use_backend("reference"):
        expected = block_topk(q, ck, rule=rule, **settings).block_indices
    check(op, (q, ck, cv), cell_mask(q, ck, grid, layout))
    with use_backend("triton"):
        assert_same_lists(block_topk(q, ck, rule=rule, **settings).block_indices, expected)


@pytest.mark.parametrize(("kind", "num_queries"), [("padded", 40), ("packed", 40), ("offset", 1)])
@pytest.mark.parametrize("reduce", ["max", slow("sum")])
def test_a_given_normaliser_weighs_the_heads(kind: str, num_queries: int, reduce: str) -> None:
    layout, batch, num_keys = make_layout(kind, num_queries)
    q, _, _ = make_qkv(batch, num_queries, num_keys, (4, 2), dim=32, dtype=torch.float32)
    ck, _ = make_cells(batch, num_keys, 2, CellGrid(width=8, stride=4), layout, dim=32, dtype=torch.float32)
    rule = BlockTopK(block_size=8, num_blocks=3, reduce=reduce)
    settings = {"width": 8, "stride": 4, "layout": layout, "rule": rule}
    lse = 3 * torch.randn(q.shape[:3])
    lse[..., 0] = -torch.inf
    for shift in (0.0, 300.0):  # the second would overflow float32
        with use_backend("reference"):
            expected = block_topk(q, ck, lse=lse - shift, **settings).block_indices
        with use_backend("triton"):
            got = block_topk(q, ck, lse=lse - shift, **settings).block_indices
        if shift:
            got, expected = got[..., :1], expected[..., :1]
        assert_same_lists(got, expected)


@pytest.mark.parametrize(("kind", "num_queries"), [("padded", 40), ("packed", 40), ("offset", 1)])
def test_every_query_head_chooses(kind: str, num_queries: int) -> None:
    layout, batch, num_keys = make_layout(kind, num_queries)
    q, _, _ = make_qkv(batch, num_queries, num_keys, (4, 2), dim=32, dtype=torch.float32)
    ck, cv = make_cells(batch, num_keys, 2, CellGrid(width=8, stride=4), layout, dim=32, dtype=torch.float32)
    rule = BlockTopK(block_size=8, num_blocks=3, per_head=True)
    settings = {"width": 8, "stride": 4, "layout": layout, "rule": rule}
    with use_backend("reference"):
        expected = block_topk(q, ck, **settings).block_indices
    assert expected.shape[1] == 4
    with use_backend("triton"):
        assert_same_lists(compressed_attention(q, ck, cv, **settings).selection.block_indices, expected)
        assert_same_lists(block_topk(q, ck.split([8, 24], -1), **settings).block_indices, expected)


@pytest.mark.parametrize("kind", ["padded_offset", "packed"])
def test_scores_in_chunks_choose_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_blocks, "SCORE_BYTES", 1)
    layout, batch, num_keys = make_layout(kind, 37)
    q, _, _ = make_qkv(batch, 37, num_keys, (2, 1), dim=32, dtype=torch.float32)
    ck, _ = make_cells(batch, num_keys, 1, CellGrid(width=4, stride=4), layout, dim=32, dtype=torch.float32)
    settings = {"width": 4, "stride": 4, "layout": layout, "rule": BlockTopK(block_size=4, num_blocks=7)}
    with use_backend("reference"):
        expected = block_topk(q, ck, **settings).block_indices
    with use_backend("triton"):
        assert_same_lists(block_topk(q, ck, **settings).block_indices, expected)


@pytest.mark.parametrize(("num_blocks", "size", "piece"), [(40, 9, 2048), (70, 40, 32)])
def test_best_blocks_are_those_of_a_stable_sort(
    num_blocks: int, size: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few different scores make ties; a piece shorter than the row makes the kernel read it in parts."""
    monkeypatch.setattr(triton_blocks, "PIECE", piece)
    g = torch.Generator().manual_seed(0)
    score = torch.randint(0, 6, (1, 2, 11, num_blocks), generator=g) / 4
    score[0, 0] = torch.rand(11, num_blocks, generator=g)
    score[0, 1] = 0
    own = torch.randint(-1, num_blocks, (1, 11), generator=g).sort(1).values
    rule = BlockTopK(block_size=1, num_blocks=size, num_local_blocks=3)
    expected = top_blocks(score.clone(), own[:, None, :, None] + 1, size, rule)
    got = torch.full((1, 2, 11, size), 1 << 29, dtype=torch.int32)
    triton_blocks.launch_topk(score, own.int(), got, 0, 9, 1, 3)
    triton_blocks.launch_topk(score[:, :, 9:], own.int(), got, 9, 11, 1, 3)
    assert torch.equal(got.long(), expected)


@pytest.mark.parametrize("seed", range(5))
def test_best_blocks_of_any_size(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=g))  # noqa: E731
    monkeypatch.setattr(triton_blocks, "PIECE", 16 << draw(0, 3))
    num_blocks, sinks, local = draw(4, 60), draw(0, 2), draw(1, 2)
    size = draw(sinks + local, num_blocks)
    score = torch.rand(2, 1, 5, num_blocks, generator=g) * 10.0 ** draw(-30, 3)
    if seed % 2:
        score = score.mul(4 / score.max()).floor()
    own = torch.randint(-1, num_blocks, (2, 5), generator=g).sort(1).values
    rule = BlockTopK(block_size=1, num_blocks=size, num_sink_blocks=sinks, num_local_blocks=local)
    got = torch.full((2, 1, 5, size), 1 << 29, dtype=torch.int32)
    triton_blocks.launch_topk(score, own.int(), got, 0, 5, sinks, local)
    scores = score.where(torch.arange(num_blocks) <= own[:, None, :, None], -1.0)
    forced = torch.arange(num_blocks) < sinks
    forced = forced | (torch.arange(num_blocks) > own[:, None, :, None] - local)
    scores = scores.masked_fill(forced & (scores >= 0), torch.inf)
    # torch.topk leaves ties open: compare the scores that were chosen, and the choice where none are equal.
    best = scores.topk(size, -1)
    chosen = scores.gather(-1, got.long().clamp(min=0)).masked_fill(got < 0, -1.0)
    assert torch.equal(chosen.sort(-1, descending=True).values, best.values)
    if not seed % 2:
        kept = best.indices.masked_fill(best.values < 0, num_blocks).sort(-1).values
        assert torch.equal(got.long(), kept.masked_fill(kept == num_blocks, -1))
    assert torch.equal(got.long(), top_blocks(score.clone(), own[:, None, :, None] + 1, size, rule))


def test_equal_scores_go_to_the_lower_block() -> None:
    q, ck = torch.ones(1, 200, 2, 16), torch.ones(1, 49, 1, 16)  # every cell scores the same
    with use_backend("triton"):
        rule = BlockTopK(block_size=16, num_blocks=6)
        chosen = block_topk(q, ck, width=8, stride=4, rule=rule).block_indices
    assert chosen[0, 0, -1].tolist() == [0, 1, 2, 3, 11, 12]


def test_static_cells_and_tensor_offset() -> None:
    grid, rule = CellGrid(width=8, stride=4), BlockTopK(block_size=16, num_blocks=4)
    q, _, _ = make_qkv(2, 20, 240, (6, 2), dtype=torch.float32)
    _, ck, cv = make_qkv(2, 1, grid.count(240), (6, 2), dtype=torch.float32)
    ck, cv = as_cache(ck), as_cache(cv)
    settings = {"width": 8, "stride": 4, "rule": rule}
    for offset in (0, 100):
        with use_backend("reference"):
            expected = compressed_attention(q, ck, cv, layout=SequenceLayout(offset=offset), **settings)
        with use_backend("triton"):
            layout = SequenceLayout(offset=torch.tensor(offset))
            got = compressed_attention(q, ck, cv, layout=layout, **settings)
        assert torch.allclose(got.o, expected.o, atol=1e-5)
        assert torch.allclose(got.lse, expected.lse, atol=1e-5)
        assert_same_lists(got.selection.block_indices, expected.selection.block_indices)


def test_side_memory_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 128k tokens, 64 heads and 4 key heads, with 12 MiB left of 0.1 GiB for the unions of the lists."""
    made, empty = [], torch.empty
    monkeypatch.setattr(Kernel, "launch", lambda *_, **__: None)
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append(empty(*a, **k)) or made[-1])
    q, ck = torch.zeros(1, 131072, 64, 1), torch.zeros(1, 8191, 4, 1)
    rule = BlockTopK(block_size=64, num_blocks=16)
    with use_backend("triton"):
        chosen = block_topk(q, ck, width=32, stride=16, rule=rule)
    assert chosen.block_indices.shape == (1, 4, 131072, 16)
    assert sum(x.nbytes for x in made) <= 0.1 * 2**30 - 12 * 2**20


def test_no_queries() -> None:
    q, ck, cv = make_qkv(1, 0, 3, (4, 2), dtype=torch.float32)
    with use_backend("triton"):
        rule = BlockTopK(block_size=16, num_blocks=4)
        out = compressed_attention(q, ck, cv, width=8, stride=4, rule=rule)
    assert out.o.shape == (1, 0, 4, 16)
    assert out.selection.block_indices.shape[:3] == (1, 2, 0)


def test_cells_that_are_not_finite_reach_only_those_who_see_them() -> None:
    q, ck, cv = make_qkv(1, 120, 29, (2, 1), dtype=torch.float32)
    q = q[:, :120]
    cv[:, 10], ck[:, 11] = torch.nan, torch.nan
    settings = {"width": 8, "stride": 4, "rule": BlockTopK(block_size=16, num_blocks=4)}
    with use_backend("triton"):
        out = compressed_attention(q, ck, cv, **settings)
        clean = compressed_attention(q, *(x.nan_to_num() for x in (ck, cv)), **settings)
    first = 10 * 4 + 7
    assert out.o[:, first:].isnan().all()
    assert torch.equal(out.o[:, :first], clean.o[:, :first])
    got, expected = (x.selection.block_indices[:, :, : first + 4] for x in (out, clean))
    assert torch.equal(got[:, :, :first], expected[:, :, :first])
    lists = out.selection.block_indices
    assert ((lists[..., 1:] > lists[..., :-1]) | (lists[..., 1:] == -1)).all()
