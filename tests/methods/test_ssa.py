"""SSA against a float64 loop over single queries, written from the paper's formulas."""

from __future__ import annotations

import math

import pytest
import torch

from nsa_convert.config import AttentionGeometry
from nsa_convert.methods.parts.base import AttentionInputs, observe
from nsa_convert.methods.ssa import SSA, SSASettings
from nsa_convert.patterns import SequenceLayout


def blocks_of(q: torch.Tensor, k: torch.Tensor, t: int, s: SSASettings) -> list[int]:
    """Return the blocks of query t for one KV head; q ``[T, G, D]``, k ``[T, D]``."""
    size = s.block_size
    complete = (t + 1) // size
    score = [0.0] * (t // size + 1)
    for g in range(q.shape[1]):
        if complete:
            means = torch.stack([k[j * size : (j + 1) * size].mean(0) for j in range(complete)])
            p = torch.softmax(means @ q[t, g] / math.sqrt(q.shape[2]), 0)
            for j in range(complete):
                score[j] += p[j].item()
    own = t // size
    forced = {j for j in range(own + 1) if j < s.num_sink_blocks or j > own - s.num_local_blocks}
    return sorted(sorted(range(own + 1), key=lambda j: (j not in forced, -score[j], j))[: s.num_blocks])


@pytest.mark.parametrize("sinks", [0, 1])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (7, 1), (2, 2)])
def test_equals_the_oracle(heads: int, kv_heads: int, sinks: int) -> None:
    torch.manual_seed(heads)
    total, dim, group = 75, 6, heads // kv_heads
    settings = SSASettings(block_size=8, num_blocks=4, num_sink_blocks=sinks, gate="signed")
    geometry = AttentionGeometry(hidden_size=10, num_query_heads=heads, num_kv_heads=kv_heads, head_dim=dim)
    method = SSA(settings, geometry, 0).double()
    torch.nn.init.normal_(method.gate.weight)
    q, k, v = (2 * torch.randn(1, total, n, dim, dtype=torch.float64) for n in (heads, kv_heads, kv_heads))
    hidden = torch.randn(1, total, 10, dtype=torch.float64)
    pooled = {"key": method.compress("key", k.unfold(1, 8, 8).permute(0, 1, 4, 2, 3))}
    inputs = AttentionInputs(
        q=q, k=k, v=v, hidden=hidden, pooled=pooled, layout=SequenceLayout(), scale=dim**-0.5
    )
    records = []
    with torch.no_grad(), observe(records.append):
        out, gates = method(inputs)[0], method.gate(hidden)[0]
    indices = records[0].patterns["selected"].block_indices[0]
    for t in range(total):
        for h in range(kv_heads):
            blocks = blocks_of(q[0, :, h * group : (h + 1) * group], k[0, :, h], t, settings)
            assert [j for j in indices[h, t].tolist() if j >= 0] == blocks
            seen = [i for j in blocks for i in range(j * 8, j * 8 + 8) if i <= t]
            for head in range(h * group, (h + 1) * group):
                p = torch.softmax(k[0, seen, h] @ q[0, t, head] / math.sqrt(dim), 0)
                expected = gates[t, head, 0] * (p @ v[0, seen, h])
                assert (out[t, head] - expected).abs().max() < 1e-12


def test_gates_start_open() -> None:
    geometry = AttentionGeometry(hidden_size=10, num_query_heads=4, num_kv_heads=2, head_dim=6)
    hidden = torch.randn(1, 3, 10)
    assert SSA(SSASettings(), geometry, 0).gate is None
    assert torch.equal(SSA(SSASettings(gate="signed"), geometry, 0).gate(hidden), torch.ones(1, 3, 4, 1))
    sigmoid = SSA(SSASettings(gate="sigmoid"), geometry, 0).gate(hidden)
    assert torch.allclose(sigmoid, torch.sigmoid(torch.tensor(4.0)).expand_as(sigmoid))


def test_an_ungated_layer_adds_no_parameter() -> None:
    geometry = AttentionGeometry(hidden_size=10, num_query_heads=4, num_kv_heads=2, head_dim=6)
    assert not list(SSA(SSASettings(), geometry, 0).parameters())
