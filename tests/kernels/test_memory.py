"""No tensor of TQ x TK exists, and NaN in hidden keys stays hidden."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_convert.kernels import compressed_attention, dense_attention, sparse_attention
from nsa_convert.kernels.compressed.cells import CellGrid
from nsa_convert.patterns import DENSE_LAYOUT, BlockTopK, SequenceLayout, SinkWindow
from tests.kernels.utils import make_blocks, make_cells, make_qkv


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("backward", [False, True])
def test_no_tensor_of_queries_by_keys(backward: bool) -> None:
    length = 8192
    q, k, v = make_qkv(1, length, length, (2, 1), dim=8, dtype=torch.float32)
    for x in (q, k, v):
        x.requires_grad_(backward)
    ck, cv = (x.unfold(1, 32, 16).mean(-1) for x in (k, v))
    rule = BlockTopK(block_size=64, num_blocks=4)
    with LargestTensor() as largest:
        compressed = compressed_attention(q, ck, cv, width=32, stride=16, rule=rule)
        selected, _ = sparse_attention(q, k, v, compressed.selection)
        window, _ = sparse_attention(q, k, v, SinkWindow(num_sinks=4, window_size=128))
        shifted = dense_attention(q[:, -2048:], k, v, layout=SequenceLayout(offset=length - 2048))
        if backward:
            (compressed.o.sum() + selected.sum() + window.sum() + shifted.sum()).backward()
    assert largest.elements < length * length // 8


@pytest.mark.parametrize("num_queries", [1, 3, 90])
def test_nan_in_later_keys_stays_there(num_queries: int) -> None:
    total = 120
    offset = 100 - num_queries
    q, k, v = make_qkv(2, num_queries, total, (6, 2))
    layout = SequenceLayout(offset=offset, start=torch.tensor([0, 40]))
    ck, cv = make_cells(2, total, 2, CellGrid(width=8, stride=4), layout)
    blocks = make_blocks(2, 2, num_queries, total, 5, 16, 1, layout)
    rule = BlockTopK(block_size=16, num_blocks=3)
    last = max(0, num_queries // 2)  # keys after this query's slot are spoiled
    spoiled = [x.clone() for x in (k, v, ck, cv)]
    for x in spoiled[:2]:
        x[:, offset + last + 1 :] = torch.nan
        x[1, :40] = torch.inf
    for row, start in enumerate((0, 40)):
        for x in spoiled[2:]:
            x[row, CellGrid(width=8, stride=4).count(offset + last + 1 - start) :] = torch.nan

    def outputs(k, v, ck, cv):
        compressed = compressed_attention(q, ck, cv, width=8, stride=4, rule=rule, layout=layout)
        yield compressed.o
        yield compressed.lse
        for pattern in (blocks, SinkWindow(num_sinks=2, window_size=30), SinkWindow(window_size=30)):
            yield from sparse_attention(q, k, v, pattern, layout=layout)

    for clean, dirty in zip(outputs(k, v, ck, cv), outputs(*spoiled), strict=True):
        assert torch.equal(clean[:, : last + 1], dirty[:, : last + 1])


def test_a_query_that_sees_nan_is_nan() -> None:
    q, k, v = make_qkv(1, 64, 64, (2, 1))
    v[0, 20, 0, 3] = torch.nan
    pattern = make_blocks(1, 1, 64, 64, 3, 8, 1, DENSE_LAYOUT)
    o, _ = sparse_attention(q, k, v, pattern)
    sees = pattern.to_dense_mask(64, 64, 2)[0, 0, :, 20]
    assert torch.equal(o[0, :, 0].isnan().any(-1), sees)
