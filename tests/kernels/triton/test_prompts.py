"""The methods for prompts on the triton kernels: block lists of tiles, and of tokens, for each query head."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from nsa_convert.config import AttentionGeometry, LayerRule
from nsa_convert.kernels import use_backend
from nsa_convert.methods.parts.base import AttentionInputs, dense_model_output
from nsa_convert.methods.parts.registry import build_method
from nsa_convert.patterns import SequenceLayout
from tests.marks import these_quick

METHODS = {
    "xattention": {"block_size": 16, "stride": 4, "threshold": 0.5},
    "spargeattn": {"query_block": 32, "block_size": 16, "top": 0.2},
    "spargeattn, values left out": {"query_block": 32, "block_size": 16, "top": 0.2, "value_skip": -0.7},
    "flexprefill": {"block_size": 16, "min_budget": 32, "gamma": 0.5},
    "minference": {"block_size": 16, "vertical_size": 40, "slash_size": 100},
    "tri_shape": {"num_sinks": 3, "window_size": 20, "num_last": 10},
}


@pytest.mark.parametrize(
    # The interpreter takes long, most of all for tokens, which the kernel fetches query by query.
    "method",
    these_quick(METHODS, ["xattention", "spargeattn"]),
)
def test_the_kernels_agree_with_plain_torch(method: str) -> None:
    geometry = AttentionGeometry(hidden_size=64, num_query_heads=6, num_kv_heads=2, head_dim=16)
    rule = LayerRule(method=method.partition(",")[0], settings=METHODS[method])
    layer = build_method(rule, geometry, 0)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 150, heads, 16, generator=g) for heads in (6, 2, 2))
    layout = SequenceLayout(start=torch.tensor([0, 33]))
    x = AttentionInputs(q=q, k=k, v=v, hidden=q[..., 0], pooled={}, layout=layout, scale=0.25)
    outputs = []
    for backend in ("torch", "triton"):
        with torch.no_grad(), use_backend(backend):
            outputs.append(layer(x))
    assert not torch.equal(dense_model_output(layer, x), outputs[0])
    torch.testing.assert_close(*outputs, rtol=0, atol=3e-6)
