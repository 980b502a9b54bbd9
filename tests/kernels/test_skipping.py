"""Leaving out values that can hardly count: the rule on every backend, its limits and its error."""

from __future__ import annotations

import re

import pytest
import torch

from nsa_convert.kernels import sparse_attention, use_backend
from nsa_convert.kernels.union.skipping import skipping_attention, tile_rows
from nsa_convert.patterns import BlockSelection, SequenceLayout
from tests.kernels.skipping import walk
from tests.kernels.utils import make_blocks, make_qkv

CASES = [
    # TQ, TK, heads, lists, blocks in a list, block size, queries of a list
    (150, 150, (4, 2), 4, 4, 16, 64),
    (70, 130, (2, 1), 1, 3, 64, 32),
    (90, 300, (4, 2), 2, 2, 130, 16),
    (140, 140, (2, 2), 2, 3, 48, 128),
]


def make_case(num_queries, num_keys, heads, lists, size, block_size, query_block, dtype=torch.float64):
    """Return q, k, v with one key that all queries prefer, the lists and the layout."""
    q, k, v = make_qkv(1, num_queries, num_keys, heads, 16, torch.float64)
    q[..., 0] += 10.0
    k[:, 3], k[:, 3, :, 0] = 0.0, 10.0
    layout = SequenceLayout(offset=num_keys - num_queries)
    lists = make_blocks(1, lists, num_queries, num_keys, size, block_size, query_block, layout).block_indices
    lists[..., 0] = 0
    ordered = lists.sort(-1).values
    twice = ordered[..., 1:] == ordered[..., :-1]
    ordered[..., 1:] = ordered[..., 1:].masked_fill(twice, -1)
    pattern = BlockSelection(block_indices=ordered, block_size=block_size, query_block=query_block)
    return (q.to(dtype), k.to(dtype), v.to(dtype)), pattern, layout


@pytest.mark.parametrize("name", ["reference", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_the_rule(name: str, case: tuple) -> None:
    inputs, pattern, layout = make_case(*case)
    some = False
    for value_skip in (-1.0, -4.0, -1e30):
        want = walk(*inputs, pattern, layout.offset, 0.25, value_skip, tile_rows(pattern.query_block))
        with use_backend(name):
            got = skipping_attention(*inputs, pattern, value_skip=value_skip, layout=layout)
        for x, y in zip(got, want, strict=False):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
        some |= bool((want[2] > 0).any())
    assert some, "nothing was left out"


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_what_is_lost_is_at_most_the_probability_left_out(name: str) -> None:
    inputs, pattern, layout = make_case(*CASES[0])
    with use_backend(name):
        whole, lse = sparse_attention(*inputs, pattern, layout=layout)
    losses = []
    for value_skip in (-torch.inf, -8.0, -4.0, -2.0, -0.5):
        lost = walk(*inputs, pattern, layout.offset, 0.25, value_skip, tile_rows(pattern.query_block))[2]
        with use_backend(name):
            o, same = skipping_attention(*inputs, pattern, value_skip=value_skip, layout=layout)
        bound = lost * inputs[2].abs().max()
        assert bool(((o - whole).abs().amax(-1) <= bound + 1e-9).all())
        torch.testing.assert_close(same, lse)
        losses.append(float(lost.sum()))
    assert losses == sorted(losses)
    assert losses[0] == 0.0 < losses[-1]


def test_wrong_arguments() -> None:
    inputs, pattern, layout = make_case(*CASES[0])
    for value_skip in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match=re.escape(f"value_skip must be negative, got {value_skip}")):
            skipping_attention(*inputs, pattern, value_skip=value_skip, layout=layout)
    padded = SequenceLayout(start=torch.tensor([3]))
    with pytest.raises(ValueError, match="take padding and packing apart first"):
        skipping_attention(*inputs, pattern, value_skip=-1.0, layout=padded)
    single = BlockSelection(block_indices=pattern.block_indices, block_size=16, query_block=24)
    with pytest.raises(ValueError, match="lists of 24 queries: .* a multiple of 16 queries"):
        skipping_attention(*inputs, single, value_skip=-1.0, layout=layout)
