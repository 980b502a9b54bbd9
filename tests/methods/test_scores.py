"""The second-order score against its definition, and what it is for."""

from __future__ import annotations

import math

import torch

from nsa_convert.config import AttentionGeometry
from nsa_convert.kernels import block_topk
from nsa_convert.methods.parts.base import AttentionInputs, observe
from nsa_convert.methods.parts.scores import half_variance, second_order
from nsa_convert.methods.ssa import SSA, SSASettings
from nsa_convert.patterns import BlockTopK, SequenceLayout


def test_score_is_mean_plus_half_variance() -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 5, 4, 6, dtype=torch.float64)
    windows = torch.randn(1, 7, 8, 2, 6, dtype=torch.float64)
    scale = 0.4
    wide_q = second_order(q, scale)
    wide_k = torch.cat([windows.mean(2), half_variance(windows)], -1)
    for t in range(5):
        for head in range(4):
            for cell in range(7):
                tokens = windows[0, cell, :, head // 2]  # [l, D]
                mean = scale * q[0, t, head] @ tokens.mean(0)
                spread = 0.5 * scale**2 * (q[0, t, head] ** 2 * tokens.var(0, unbiased=False)).sum()
                score = scale * wide_q[0, t, head] @ wide_k[0, cell, head // 2]
                assert math.isclose(score, mean + spread, rel_tol=1e-12)


def test_half_variance_of_low_precision_is_exact_enough() -> None:
    windows = 30 + torch.randn(1, 3, 16, 1, 8)
    low = half_variance(windows.bfloat16()).float()
    assert torch.allclose(low, half_variance(windows.bfloat16().double()).float(), rtol=1e-2)
    assert not half_variance(windows.requires_grad_()).requires_grad


def test_finds_a_needle_that_the_mean_hides() -> None:
    torch.manual_seed(0)
    total, size, dim = 512, 16, 8
    k = 0.1 * torch.randn(1, total, 1, dim, dtype=torch.float64)
    k[0, 7 * size : 8 * size, 0, 0] -= 0.4  # the block looks away from the query on average
    k[0, 7 * size + 5, 0, 0] = 6.0  # but holds one token that answers it
    q = torch.zeros(1, total, 1, dim, dtype=torch.float64)
    q[..., 0] = 8.0
    chosen = {}
    for scorer in ("first_order", "second_order"):
        geometry = AttentionGeometry(hidden_size=4, num_query_heads=1, num_kv_heads=1, head_dim=dim)
        method = SSA(SSASettings(block_size=size, num_blocks=3, scorer=scorer), geometry, 0)
        windows = k.unfold(1, size, size).permute(0, 1, 4, 2, 3)
        pooled = {pool.name: method.compress(pool.name, windows) for pool in method.cache_needs().pools}
        inputs = AttentionInputs(
            q=q, k=k, v=k, hidden=q[..., 0, :4], pooled=pooled, layout=SequenceLayout(), scale=dim**-0.5
        )
        records = []
        with observe(records.append):
            method(inputs)
        chosen[scorer] = records[0].patterns["selected"].block_indices[0, 0, -1].tolist()
    assert 7 in chosen["second_order"]
    assert 7 not in chosen["first_order"]


def test_no_spread_changes_nothing() -> None:
    q, ck = torch.randn(1, 40, 2, 4), torch.randn(1, 5, 1, 4)
    sizes = {"width": 8, "stride": 8, "rule": BlockTopK(block_size=8, num_blocks=3)}
    plain = block_topk(q, ck, scale=0.5, **sizes).block_indices
    wide = block_topk(second_order(q, 0.5), (ck, torch.zeros_like(ck)), scale=0.5, **sizes)
    assert torch.equal(wide.block_indices, plain)
