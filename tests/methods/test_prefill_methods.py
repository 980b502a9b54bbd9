"""XAttention, FlexPrefill, SpargeAttention and MInference against float64 loops written from the papers."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from nsa_convert.config import AttentionGeometry, LayerRule
from nsa_convert.errors import ConfigError
from nsa_convert.methods.minference import MInferenceSettings
from nsa_convert.methods.parts.base import AttentionInputs, AttentionRecord, observe
from nsa_convert.methods.parts.registry import build_method
from nsa_convert.methods.parts.tile_budgets import (
    BlockGrid,
    compact_lists,
    fraction,
    keep_mass,
    keep_top,
    mean_rows,
)
from nsa_convert.patterns import SequenceLayout
from tests.kernels.skipping import walk
from tests.marks import slow
from tests.methods.prefill_oracles import (
    flexprefill_blocks,
    minference_keys,
    spargeattn_blocks,
    xattention_blocks,
)

DIM = 6
HEADS = [(1, 1), (4, 2), (3, 1), (8, 2), (7, 1)]
TOTAL = 107

XATTENTION = {"block_size": 8, "stride": 4, "threshold": 0.6}
FLEXPREFILL = {"block_size": 8, "min_budget": 16, "gamma": 0.7, "tau": 0.35}
SPARGEATTN = {"query_block": 16, "block_size": 8, "top": 0.3, "similarity": 0.03}
MINFERENCE = {"block_size": 8, "vertical_size": 34, "slash_size": 100}


def layer_of(method: str, settings: dict, heads: tuple[int, int]):
    geometry = AttentionGeometry(
        hidden_size=10, num_query_heads=heads[0], num_kv_heads=heads[1], head_dim=DIM
    )
    return build_method(LayerRule(method=method, settings=settings), geometry, 0)


def inputs_of(heads: tuple[int, int], total: int = TOTAL, offset: int = 0, batch: int = 1) -> AttentionInputs:
    g = torch.Generator().manual_seed(heads[0] + total)
    counts = ((total - offset, heads[0]), (total, heads[1]), (total, heads[1]))
    q, k, v = (2 * torch.randn(batch, t, n, DIM, generator=g, dtype=torch.float64) for t, n in counts)
    return AttentionInputs(
        q=q, k=k, v=v, hidden=q.new_zeros(batch, total - offset, 10), pooled={},
        layout=SequenceLayout(offset=offset), scale=DIM**-0.5,
    )  # fmt: skip


def run(layer, x: AttentionInputs) -> tuple[Tensor, list[AttentionRecord]]:
    records: list[AttentionRecord] = []
    with torch.no_grad(), observe(records.append):
        return layer(x), records


def visible(record: AttentionRecord) -> Tensor:
    """Return the keys each query sees, bool ``[HQ, TQ, TK]``; patterns must not overlap."""
    sizes = record.q.shape[1], record.k.shape[1], record.q.shape[2]
    masks = [p.to_dense_mask(*sizes, record.layout)[0] for p in record.patterns.values()]
    assert int(sum(m.int() for m in masks).max()) <= 1
    return torch.stack(masks).any(0)


def attend(x: AttentionInputs, mask: Tensor) -> Tensor:
    """Attend by the formula; ``mask [HQ, TQ, TK]``."""
    group = x.q.shape[2] // x.k.shape[2]
    k, v = (y[0].repeat_interleave(group, 1) for y in (x.k, x.v))
    scores = torch.einsum("thd,shd->hts", x.q[0], k) * x.scale
    return torch.einsum("hts,shd->thd", scores.masked_fill(~mask, -math.inf).softmax(-1), v)


def block_mask(blocks: list[list[set[int]]], x: AttentionInputs, query_block: int, size: int) -> Tensor:
    """Turn ``blocks[head][tile]`` into keys, causal token by token."""
    offset, mask = x.layout.offset, torch.zeros(x.q.shape[2], x.q.shape[1], x.k.shape[1], dtype=torch.bool)
    for head, tiles in enumerate(blocks):
        for t in range(x.q.shape[1]):
            for j in tiles[t // query_block]:
                mask[head, t, j * size : min((j + 1) * size, offset + t + 1)] = True
    return mask


def check(layer, x: AttentionInputs, expected: Tensor) -> None:
    """The layer sees exactly the expected keys, none after the query, and attends to them."""
    out, records = run(layer, x)
    seen = visible(records[0])
    last = x.layout.offset + torch.arange(x.q.shape[1])
    assert not (seen & (torch.arange(x.k.shape[1]) > last[:, None])).any()
    assert torch.equal(seen, expected)
    causal = len(seen) * (last + 1).sum()
    assert 0.1 < seen.sum() / causal < 0.9, "the case selects nothing or everything"
    assert (out[0] - attend(x, expected)).abs().max() < 1e-12


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("offset", [0, 29])
@pytest.mark.parametrize("share", ["none", "group"])
def test_xattention_keeps_the_antidiagonal_mass(heads: tuple[int, int], offset: int, share: str) -> None:
    x = inputs_of(heads, offset=offset)
    blocks = xattention_blocks(x, size=8, stride=4, tau=0.6, share=share)
    assert all({0, (offset + 8 * i) // 8} <= tile for head in blocks for i, tile in enumerate(head))
    check(layer_of("xattention", {**XATTENTION, "share": share}, heads), x, block_mask(blocks, x, 8, 8))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("offset", [0, 29])
@pytest.mark.parametrize("budget", ["top", "mass"])
def test_spargeattn_ranks_blocks_that_resemble_their_mean(
    heads: tuple[int, int], offset: int, budget: str
) -> None:
    x = inputs_of(heads, offset=offset)
    settings = {**SPARGEATTN, "budget": budget, "mass": 0.4}
    blocks, odd = spargeattn_blocks(x, query_block=16, size=8, limit=0.03, budget=budget, part=0.3, mass=0.4)
    assert odd > 0
    check(layer_of("spargeattn", settings, heads), x, block_mask(blocks, x, 16, 8))


@pytest.mark.parametrize("heads", HEADS)
def test_spargeattn_leaves_values_out(heads: tuple[int, int]) -> None:
    """Off and so low a limit are the same; a higher one takes what the rule says from the same blocks."""
    x = inputs_of(heads)
    x = dataclasses.replace(x, q=x.q * 4)
    plain, low, high = (
        layer_of("spargeattn", {**SPARGEATTN, "value_skip": skip}, heads) for skip in (0.0, -1e4, -2.0)
    )
    (pattern,) = high.patterns(x).values()
    ordered = pattern.block_indices.masked_fill(pattern.block_indices < 0, 1 << 20).sort(-1).values
    pattern = dataclasses.replace(pattern, block_indices=ordered.masked_fill(ordered == 1 << 20, -1))
    want, _, lost = walk(x.q, x.k, x.v, pattern, 0, x.scale, -2.0, 16)
    assert bool((lost > 0).any())
    torch.testing.assert_close(high(x), want)
    torch.testing.assert_close(low(x), plain(x))
    assert not torch.allclose(high(x), plain(x))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("offset", [0, 32, 29])
def test_flexprefill_takes_verticals_slashes_and_query_aware_blocks(
    heads: tuple[int, int], offset: int
) -> None:
    x = inputs_of(heads, offset=offset)
    blocks, aware = flexprefill_blocks(x, size=8, gamma=0.7, tau=0.35, least=2)
    if heads == (8, 2):
        assert 0 < aware < 8, "both kinds of head are tested"
    layer = layer_of("flexprefill", {**FLEXPREFILL, "chunks": "own"}, heads)
    check(layer, x, block_mask(blocks, x, 8, 8))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("offset", [61, slow(0)])
def test_minference_reads_tokens_and_diagonals(heads: tuple[int, int], offset: int) -> None:
    x = inputs_of(heads, total=259, offset=offset)
    patterns = [("vertical_and_slash", 60, 103), ("stream_llm", 9, 40), ("block_sparse", 6, 1)]
    chosen = [patterns[i % 3] for i in range(heads[0])]
    settings = {"block_size": 8, "head_patterns": [list(p) for p in chosen], "chunks": "own"}
    check(layer_of("minference", settings, heads), x, minference_keys(x, size=8, heads=chosen))


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("xattention", {"stride": 48}, "block_size 128 must be a multiple of stride 48"),
        ("xattention", {"threshold": 1.5, "stride": 0}, "(?s)stride must be >= 1.*threshold must be between"),
        ("spargeattn", {"top": -0.1, "similarity": 2}, "(?s)top must be between.*similarity must be between"),
        ("spargeattn", {"value_skip": 0.5}, "value_skip must be negative, or 0 to leave nothing out"),
        ("spargeattn", {"value_skip": -5.0, "query_block": 40}, "query_block to be a multiple of 16, got 40"),
        ("flexprefill", {"max_budget": 512}, "max_budget 512 is smaller than min_budget 1024"),
        ("flexprefill", {"chunks": "all"}, "one of refuse, own"),
        ("minference", {"vertical_size": 29}, "vertical_size must be >= 30"),
        ("minference", {"head_patterns": [["slash", 1, 2]]}, r"head_patterns\[0\]: expected \[pattern"),
        ("minference", {"head_patterns": [["stream_llm", 0, 2]] * 4}, "sizes must be whole numbers from 1"),
        ("minference", {"head_patterns": [["stream_llm", 4, 2]]}, "lists 1 query heads, the layer has 4"),
    ],
)
def test_bad_settings_are_named(method: str, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layer_of(method, settings, (4, 2))


class TestBudgets:
    """The budgets that the methods share, on a map of two tiles of 4 queries over blocks of 2 keys."""

    GRID = BlockGrid(num_queries=7, offset=5, query_block=4, block_size=2)
    SCORES = torch.tensor([[5.0, 0, 1, 2, 3, 0], [1, 4, 2, 0, 3, 9]])[None, None]

    def test_grid(self) -> None:
        first, last = self.GRID.tiles(torch.device("cpu"))
        assert (first.tolist(), last.tolist()) == ([5, 9], [8, 11])
        assert self.GRID.reach(first.device).sum(-1).tolist() == [5, 6]
        forced = self.GRID.forced(1, 1, first.device)
        assert [row.nonzero()[:, 0].tolist() for row in forced] == [[0, 2, 3, 4], [0, 4, 5]]
        more = self.GRID.forced(0, 2, first.device)
        assert [row.nonzero()[:, 0].tolist() for row in more] == [[1, 2, 3, 4], [3, 4, 5]]

    def kept(self, keep: Tensor) -> list[list[int]]:
        assert compact_lists(keep).dtype == torch.int32
        return [[j for j in row if j >= 0] for row in compact_lists(keep)[0, 0].tolist()]

    def test_top(self) -> None:
        reach = self.GRID.reach(torch.device("cpu"))
        none = torch.zeros_like(reach)
        assert self.kept(keep_top(self.SCORES, 2, none, reach)) == [[0, 4], [1, 5]]
        sink = none.clone()
        sink[:, 2] = True
        assert self.kept(keep_top(self.SCORES, 2, sink, reach)) == [[0, 2], [2, 5]]
        assert self.kept(keep_top(self.SCORES, 0, sink, reach)) == [[2], [2]]
        assert self.kept(keep_top(self.SCORES, 99, none, reach)) == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]

    def test_mass_of_rows_and_of_the_map(self) -> None:
        reach = self.GRID.reach(torch.device("cpu"))
        none = torch.zeros_like(reach)
        assert self.kept(keep_mass(self.SCORES, 0.5, none, reach)) == [[0, 4], [1, 5]]
        assert self.kept(keep_mass(self.SCORES, 5 / 11, none, reach)) == [[0], [5]]
        local = none.clone()
        local[:, 4] = True
        assert self.kept(keep_mass(self.SCORES, 0.5, local, reach)) == [[0, 4], [4, 5]]
        assert self.kept(keep_mass(self.SCORES, 0.0, local, reach)) == [[4], [4]]
        assert self.kept(keep_mass(self.SCORES, 0.6, none, reach, "map")) == [[0], [1, 5]]
        assert self.kept(keep_mass(self.SCORES, 1.0, none, reach)) == [[0, 2, 3, 4], [0, 1, 2, 4, 5]]

    def test_means_of_a_partial_run(self) -> None:
        x = torch.arange(5.0)[None, :, None, None]
        assert mean_rows(x, 2).flatten().tolist() == [0.5, 2.5, 4.0]
        assert fraction(0.1, 4) == 1


@pytest.mark.parametrize("unused", [[1], "1", None, -1, True])
def test_the_unused_number_of_a_block_sparse_head_is_a_number(unused: object) -> None:
    heads = [["block_sparse", 10, unused]]
    with pytest.raises(ConfigError, match=r"head_patterns\[0\]: sizes must be whole numbers from 1"):
        MInferenceSettings(head_patterns=heads)
    assert MInferenceSettings(head_patterns=[["block_sparse", 10, 0]]).head_patterns == (
        ("block_sparse", 10, 0),
    )
