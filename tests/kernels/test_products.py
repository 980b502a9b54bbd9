"""Scores of bfloat16 operands that are not rounded to bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nsa_convert.kernels.common.products import FAST_BFLOAT16, SPLIT_ELEMENTS, score_product

SIZES = [(1, 2, 7, 4095, 64), (2, 4, 3, 700, 128), (1, 1, 5, 90, 32)]  # B, H, R, L, D; the last is copied


def operands(size: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, heads, rows, length, dim = size
    g = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads, rows, dim, generator=g).to(dtype)
    cache = torch.randn(batch, heads, length + 40, dim, generator=g).to(dtype)
    return q, cache[:, :, :length]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("part", [True, False])
def test_scores_keep_float32(part: bool, size: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k = operands(size, dtype)
    k = k if part else k.contiguous()
    scores = score_product(q, k, 0.3)
    truth = 0.3 * q.double() @ k.double().mT
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert scores.shape == truth.shape
    assert (scores - truth).abs().max() <= 2**-16 * truth.abs().max()


def test_the_sizes_take_both_ways() -> None:
    elements = [size[0] * size[1] * size[3] * size[4] for size in SIZES]
    assert min(elements) <= SPLIT_ELEMENTS < elements[0]


def test_a_key_that_is_not_finite_stays_in_its_column() -> None:
    q, k = operands(SIZES[0], torch.bfloat16)
    clean = score_product(q, k, 1.0)
    spoiled = k.clone()
    spoiled[0, 0, 17, 3] = torch.nan
    dirty = score_product(q, spoiled, 1.0)
    assert dirty[0, 0, :, 17].isnan().all()
    others = torch.arange(k.shape[2]) != 17
    assert torch.equal(dirty[..., others], clean[..., others])


@pytest.mark.slow
@pytest.mark.skipif(not FAST_BFLOAT16, reason="this CPU has no bfloat16 products: keys are copied to float32")
def test_a_compiled_graph_keeps_the_correction() -> None:
    q, k = operands(SIZES[0], torch.bfloat16)
    truth = q.double() @ k.double().mT
    for keys in (k, k.contiguous()):
        scores = torch.compile(score_product, fullgraph=True)(q, keys, 1.0)
        assert (scores - truth).abs().max() <= 2**-16 * truth.abs().max()
