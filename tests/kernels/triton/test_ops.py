"""The public ops on the triton backend: every layout, with few queries and with many."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from nsa_convert.kernels import (
    block_topk,
    compressed_attention,
    dense_attention,
    sparse_attention,
    use_backend,
)
from nsa_convert.kernels.compressed.cells import CellGrid
from nsa_convert.patterns import BlockTopK, SequenceLayout, SinkWindow, TokenSelection
from tests.kernels.triton.checks import poison, run
from tests.kernels.triton.test_compressed import assert_same_lists
from tests.kernels.utils import (
    LAYOUTS,
    as_cache,
    assert_close,
    exact,
    make_blocks,
    make_cells,
    make_layout,
    make_qkv,
)
from tests.marks import slow

pytestmark = pytest.mark.usefixtures("poison")
__all__ = ["poison"]


def assert_op(op, *tensors: Tensor, **settings) -> None:
    """Compare an op on triton with the reference, error rule included."""
    with use_backend("triton"):
        got = op(*tensors, **settings)
    with use_backend("reference"):
        low = op(*tensors, **settings)
    truth = exact(op, *tensors, **settings)
    results = zip(got, low, truth, strict=True) if isinstance(got, tuple) else [(got, low, truth)]
    for x, y, z in results:
        assert_close(x, y, z)


@pytest.mark.parametrize("num_queries", [1, 19])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_attention(kind: str, num_queries: int) -> None:
    layout, batch, num_keys = make_layout(kind, num_queries)
    q, k, v = make_qkv(batch, num_queries, num_keys, (3, 1), dtype=torch.float16)
    k, v = as_cache(k, 3), as_cache(v, 3)
    assert_op(dense_attention, q, k, v, layout=layout)
    blocks = make_blocks(batch, 1, num_queries, num_keys, 3, 8, 1, layout)
    tokens = make_blocks(batch, 1, num_queries, num_keys, 5, 1, 1, layout).block_indices
    for pattern in (blocks, SinkWindow(num_sinks=2, window_size=9), TokenSelection(token_indices=tokens)):
        assert_op(sparse_attention, q, k, v, pattern, layout=layout)


@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize(
    ("kind", "num_queries", "heads", "sizes", "num_blocks", "reduce"),
    [
        ("offset", 3, (4, 2), (8, 4, 8), 3, "sum"),
        ("padded_offset", 4, (3, 1), (4, 4, 4), 4, "max"),
        ("padded", 9, (16, 1), (4, 2, 4), 3, "sum"),
        ("plain", 2, (1, 1), (8, 4, 16), 3, "sum"),
    ],
)
def test_few_queries_on_cells(kind, num_queries, heads, sizes, num_blocks, reduce, values) -> None:
    layout, batch, num_keys = make_layout(kind, num_queries)
    grid = CellGrid(width=sizes[0], stride=sizes[1])
    q, _, _ = make_qkv(batch, num_queries, num_keys, heads, dtype=torch.float16)
    ck, cv = make_cells(batch, num_keys, heads[1], grid, layout, dtype=torch.float16)
    rule = BlockTopK(block_size=sizes[2], num_blocks=num_blocks, reduce=reduce)
    settings = {"width": grid.width, "stride": grid.stride, "layout": layout}
    with use_backend("reference"):
        expected = block_topk(q, ck, rule=rule, **settings).block_indices
    with use_backend("triton"), torch.no_grad():
        chosen = compressed_attention(q, ck, cv if values else None, rule=rule, **settings).selection
    assert_same_lists(chosen.block_indices, expected)
    if values:
        op = lambda *x: ((c := compressed_attention(*x, **settings)).o, c.lse)  # noqa: E731
        assert_op(op, q, as_cache(ck), as_cache(cv))


def test_a_tensor_offset_is_not_read() -> None:
    """A captured graph cannot read the device; a meta tensor cannot be read either."""
    layout = SequenceLayout(offset=torch.tensor(3, device="meta"))
    q, k, v = (torch.empty(1, n, h, 16, device="meta") for n, h in ((1, 4), (50, 2), (50, 2)))
    blocks = torch.empty(1, 2, 1, 3, dtype=torch.int32, device="meta")
    from nsa_convert.kernels.attention.triton_backend import attend_pattern
    from nsa_convert.patterns import BlockSelection

    for pattern in (BlockSelection(block_indices=blocks, block_size=8), SinkWindow(window_size=9)):
        o, lse = attend_pattern(q, k, v, pattern, layout, 0.25)
        assert o.shape == q.shape
        assert lse.shape == q.shape[:3]


def test_a_decoding_step_compiles_whole() -> None:
    """The offset is a tensor of the graph: one graph serves every step on a static cache."""
    _, k, v = make_qkv(2, 1, 60, (4, 2), dtype=torch.float32)
    k, v = as_cache(k, 4), as_cache(v, 4)
    q, _, _ = make_qkv(2, 1, 1, (4, 2), dtype=torch.float32)
    rule = BlockTopK(block_size=4, num_blocks=3)

    def step(q: Tensor, k: Tensor, v: Tensor, offset: Tensor) -> Tensor:
        layout = SequenceLayout(offset=offset, start=torch.tensor([0, 5]))
        out = compressed_attention(q, k[:, :29], v[:, :29], width=4, stride=2, rule=rule, layout=layout)
        o, _ = sparse_attention(q, k, v, out.selection, layout=layout)
        near, _ = sparse_attention(q, k, v, SinkWindow(num_sinks=1, window_size=9), layout=layout)
        return o + out.o + near + dense_attention(q, k, v, layout=layout)

    with torch.no_grad():
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        for offset in (20, 51):
            at = torch.tensor(offset)
            with use_backend("reference"):
                expected = step(q, k, v, at)
            with use_backend("triton"):
                assert torch.allclose(compiled(q, k, v, at), expected, atol=1e-4)


@pytest.mark.parametrize("pattern", ["window", slow("tokens"), slow("compressed")])
def test_compiles_whole(pattern: str) -> None:
    """torch.compile sees one graph with gradients; the kernels are opaque operators in it."""
    q, k, v = make_qkv(1, 24, 24, (4, 2), dtype=torch.float32)
    tokens = make_blocks(1, 2, 24, 24, 5, 1, 1, SequenceLayout()).block_indices

    def op(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if pattern == "compressed":
            rule = BlockTopK(block_size=4, num_blocks=3)
            out = compressed_attention(q, k[:, :9], v[:, :9], width=4, stride=2, rule=rule)
            o, lse = sparse_attention(q, k, v, out.selection)
            return o + out.o, lse
        chosen = SinkWindow(window_size=9) if pattern == "window" else TokenSelection(token_indices=tokens)
        return sparse_attention(q, k, v, chosen)

    with use_backend("triton"):
        expected = run(op, (q, k, v))
        got = run(torch.compile(op, backend="aot_eager", fullgraph=True), (q, k, v))
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)
