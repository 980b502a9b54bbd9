"""A run of the queries of packed documents gets the rows that the whole call has, on every backend."""

from __future__ import annotations

import pytest
import torch

from nsa_convert.kernels import compressed_attention, dense_attention, sparse_attention, use_backend
from nsa_convert.kernels.compressed.cells import CellGrid
from nsa_convert.kernels.indexed import block_max_topk, token_topk
from nsa_convert.patterns import BlockTopK, SequenceLayout, SinkWindow
from tests.kernels.utils import make_blocks, make_cells, make_qkv

BOUNDS = (0, 30, 30, 41, 90, 96)
RUNS = ((0, 24), (24, 48), (48, 72), (72, 96))
RULE = BlockTopK(block_size=8, num_blocks=3)


def layouts() -> tuple[SequenceLayout, list[SequenceLayout]]:
    bounds = torch.tensor(BOUNDS)
    return SequenceLayout(cu_seqlens=bounds), [SequenceLayout(cu_seqlens=bounds, offset=i) for i, _ in RUNS]


def blocks(q, k, v, layout, begin, end):
    pattern = make_blocks(1, 2, BOUNDS[-1], BOUNDS[-1], 3, 8, 1, SequenceLayout())
    indices = pattern.block_indices[:, :, begin:end]
    pattern = type(pattern)(block_indices=indices, block_size=8)
    return sparse_attention(q, k, v, pattern, layout=layout)


def compressed(q, k, v, layout, begin, end):
    ck, cv = make_cells(1, BOUNDS[-1], 2, CellGrid(width=8, stride=4), layout, dtype=q.dtype)
    out = compressed_attention(q, ck, cv, width=8, stride=4, rule=RULE, layout=layout)
    visible = out.selection.to_dense_mask(end - begin, BOUNDS[-1], 4, layout)
    return out.o, out.lse, visible.double().sum(1)[0]


OPS = {
    "dense": lambda q, k, v, layout, *_: (dense_attention(q, k, v, layout=layout),),
    "window": lambda q, k, v, layout, *_: sparse_attention(
        q, k, v, SinkWindow(num_sinks=2, window_size=7), layout=layout
    ),
    "blocks": blocks,
    "compressed": compressed,
    "tokens": lambda q, k, v, layout, begin, end: (
        token_topk(q, k, q[..., 0], num_tokens=9, num_sinks=1, window_size=3, layout=layout)
        .to_dense_mask(end - begin, BOUNDS[-1], 4, layout)[0, 0]
        .double(),
    ),
    "best blocks": lambda q, k, v, layout, begin, end: (
        block_max_topk(q, k, rule=RULE, layout=layout)
        .to_dense_mask(end - begin, BOUNDS[-1], 4, layout)
        .double()
        .sum(1)[0],
    ),
}


def total(parts) -> torch.Tensor:
    return sum((x * torch.linspace(0.5, 1.5, x.numel()).view_as(x)).sum() for x in parts if x.requires_grad)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", OPS)
def test_runs_of_queries_are_rows_of_the_whole_call(name, backend):
    whole, runs = layouts()
    inputs = [x.requires_grad_() for x in make_qkv(1, BOUNDS[-1], BOUNDS[-1], (4, 2))]
    q, k, v = inputs
    with use_backend(backend):
        want = OPS[name](q, k, v, whole, 0, BOUNDS[-1])
        parts = [OPS[name](q[:, i:j], k, v, layout, i, j) for (i, j), layout in zip(RUNS, runs, strict=True)]
    found = [torch.cat(x, 0 if x[0].dim() == 2 else 1) for x in zip(*parts, strict=True)]
    for x, y in zip(found, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
    if any(x.requires_grad for x in want):
        used = [x for x in inputs if name != "compressed" or x is q]
        grads = [torch.autograd.grad(total(x), used) for x in (found, want)]
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)
