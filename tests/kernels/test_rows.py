"""What a batch costs in calls does not grow with its rows, and every row gets what it gets alone."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_convert.kernels import compressed_attention, dense_attention, sparse_attention
from nsa_convert.kernels.compressed.cells import CellGrid
from nsa_convert.patterns import BlockTopK, SequenceLayout, SinkWindow
from tests.kernels.utils import make_qkv

GRID = CellGrid(width=8, stride=4)
TOKENS = 60


class Calls(TorchDispatchMode):
    """Counts operations."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def compressed(q, k, v, layout):
    start = torch.zeros(q.shape[0], dtype=torch.long) if layout.start is None else layout.start
    cell = 4 * torch.arange(GRID.count(TOKENS))[:, None] + torch.arange(8)
    tokens = (start[:, None, None] + cell).clamp(max=TOKENS - 1)
    ck, cv = (x[torch.arange(len(start))[:, None, None], tokens].mean(2) for x in (k, v))
    rule = BlockTopK(block_size=8, num_blocks=4)
    out = compressed_attention(q, ck, cv, width=8, stride=4, rule=rule, layout=layout)
    return out.o, out.lse, out.selection.block_indices


OPS = {
    "dense": lambda q, k, v, layout: (dense_attention(q, k, v, layout=layout),),
    "window": lambda q, k, v, layout: sparse_attention(q, k, v, SinkWindow(window_size=16), layout=layout),
    "sinks": lambda q, k, v, layout: sparse_attention(
        q, k, v, SinkWindow(num_sinks=3, window_size=48), layout=layout
    ),
    "compressed": compressed,
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_calls_do_not_grow_with_rows(op: str, padded: bool) -> None:
    counts = []
    for rows in (2, 12):
        q, k, v = make_qkv(rows, TOKENS, TOKENS, (4, 2))
        layout = SequenceLayout(start=torch.arange(rows) if padded else None)
        with Calls() as calls:
            OPS[op](q, k, v, layout)
        counts.append(calls.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("op", OPS)
def test_each_row_as_alone(op: str) -> None:
    q, k, v = make_qkv(5, TOKENS, TOKENS, (4, 2))
    start = torch.tensor([0, 7, TOKENS - 1, 31, TOKENS])  # the last row holds padding only
    together = OPS[op](q, k, v, SequenceLayout(start=start))
    for row, begin in enumerate(start.tolist()):
        alone = (x[row : row + 1] for x in (q, k, v))
        one = OPS[op](*alone, SequenceLayout(start=start[row : row + 1]))
        for x, y in zip(together, one, strict=True):
            if x.dtype == torch.long:  # [B, H, TQ, S]
                size = min(x.shape[3], y.shape[3])
                assert torch.equal(x[row, :, begin:, :size], y[0, :, begin:, :size])
                assert (x[row, :, begin:, size:] == -1).all()
            else:
                torch.testing.assert_close(x[row, begin:], y[0, begin:], atol=1e-12, rtol=1e-12)
