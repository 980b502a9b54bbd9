"""One decode step in a compiled graph that must not depend on the value of the offset."""

from __future__ import annotations

import pytest
import torch

from nsa_convert.kernels import compressed_attention, dense_attention, sparse_attention, use_backend
from nsa_convert.patterns import BlockTopK, SequenceLayout, SinkWindow
from tests.kernels.utils import as_cache, assert_close, make_qkv


def step(q, k, v, ck, cv, offset, start):
    layout = SequenceLayout(offset=offset, start=start)
    rule = BlockTopK(block_size=16, num_blocks=4)
    compressed = compressed_attention(q, ck, cv, width=8, stride=4, rule=rule, layout=layout)
    selected = sparse_attention(q, k, v, compressed.selection, layout=layout)
    window = sparse_attention(q, k, v, SinkWindow(num_sinks=2, window_size=20), layout=layout)
    finite = (x.nan_to_num() for x in (k, v))  # dense attention does as torch does
    dense = dense_attention(q, *finite, layout=layout)
    return compressed.o, compressed.lse, *selected, *window, dense


@pytest.mark.slow
@pytest.mark.parametrize("start", [None, torch.tensor([0, 30])])
def test_decode_compiles_without_breaks(start: torch.Tensor | None) -> None:
    q, k, v = make_qkv(2, 1, 200, (6, 2), dtype=torch.float32)
    _, ck, cv = make_qkv(2, 1, 49, (6, 2), dtype=torch.float32, seed=2)
    k, v, ck, cv = (as_cache(x) for x in (k, v, ck, cv))
    compiled = torch.compile(step, fullgraph=True)
    later = torch.arange(200) > 150
    spoiled = [x.masked_fill(later[: x.shape[1], None, None], torch.nan) for x in (k, v)]
    spoiled += [x.masked_fill(torch.arange(49)[:, None, None] > 36, torch.nan) for x in (ck, cv)]
    for offset in (40, 150, 199):
        cache = (k, v, ck, cv) if offset == 199 else spoiled  # nobody sees what a static cache holds later
        with torch.no_grad(), use_backend("torch"):
            fast = compiled(q, *cache, torch.tensor(offset), start)
        with use_backend("reference"):
            low = step(q, k, v, ck, cv, offset, start)
            truth = step(*(x.double() for x in (q, k, v, ck, cv)), offset, start)
        for x, y, z in zip(fast, low, truth, strict=True):
            assert_close(x, y, z)
