"""Dense attention, joining parts, and the plain-math fallback."""

from __future__ import annotations

import pytest
import torch

from nsa_convert.kernels import dense_attention, merge_lse, sparse_attention
from nsa_convert.kernels.common import flash
from nsa_convert.patterns import BlockSelection, SinkWindow
from tests.kernels.utils import LAYOUTS, assert_close, both, make_layout, make_qkv


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("num_queries", [1, 7, 130, 300])
@pytest.mark.parametrize("heads", [(6, 2), (5, 1)])
def test_dense(kind: str, num_queries: int, heads: tuple[int, int]) -> None:
    layout, batch, num_keys = make_layout(kind, num_queries)
    q, k, v = make_qkv(batch, num_queries, num_keys, heads)
    fast, truth = both(dense_attention, q, k, v, layout=layout)
    assert_close(fast, truth, truth)


def test_parts_over_disjoint_keys_join_to_the_whole() -> None:
    q, k, v = make_qkv(1, 96, 96, (4, 2))
    own = torch.arange(96)[:, None] // 16
    near = own.expand(96, 1)
    far = torch.arange(6).expand(96, 6).masked_fill(torch.arange(6) >= own, -1)
    parts = [
        sparse_attention(q, k, v, BlockSelection(block_indices=x.expand(1, 2, -1, -1), block_size=16))
        for x in (near, far)
    ]
    o, lse = merge_lse(*zip(*parts, strict=True))
    whole, whole_lse = sparse_attention(q, k, v, SinkWindow(window_size=96))
    assert torch.allclose(o, whole, atol=1e-12)
    assert torch.allclose(lse, whole_lse, atol=1e-12)


@pytest.mark.parametrize("num_queries", [1, 80])
def test_without_the_fused_operator(monkeypatch: pytest.MonkeyPatch, num_queries: int) -> None:
    layout, batch, num_keys = make_layout("padded_offset", num_queries)
    q, k, v = make_qkv(batch, num_queries, num_keys, (6, 2))
    pattern = SinkWindow(num_sinks=2, window_size=20)
    monkeypatch.setattr(flash, "FUSED", None)
    fast, truth = both(sparse_attention, q, k, v, pattern, layout=layout)
    for x, y in zip(fast, truth, strict=True):
        assert_close(x, y, y)
