"""H2O against greedy eviction written out query by query."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nsa_convert.kernels.attention import dense_attention
from nsa_convert.kernels.common.backend import use_backend
from nsa_convert.methods.h2o import H2O
from nsa_convert.methods.parts.column_sums import attend_and_sum, column_sums
from nsa_convert.patch.eviction import EvictingLayer
from nsa_convert.patterns import SequenceLayout
from tests.methods import evicting
from tests.methods.evicting import Sequences, assert_rows_equal, build, run, sequences, turn, uncached


def oracle(
    data: Sequences, b: int, calls: list[int], heavy: int, recent: int
) -> tuple[Tensor, list[list[int]], list[dict[int, float]]]:
    """Return the outputs of a row, and for each KV head what is kept and its sums."""
    q, k, v = data.row(b)
    at = torch.arange(len(q))[:, None]
    q, k = turn(q, at), turn(k, at)
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    out, kept, sums = torch.zeros_like(q), [[] for _ in range(heads)], [{} for _ in range(heads)]
    begin = -data.starts[b]
    for count in calls:
        new = [t for t in range(begin, begin + count) if t >= 0]
        for h in range(heads):
            for t in new:
                seen = kept[h] + [u for u in new if u <= t]
                for g in range(group):
                    query = h * group + g
                    p = torch.softmax(k[seen, h] @ q[t, query] / evicting.HEAD_DIM**0.5, 0)
                    out[t, query] = p @ v[seen, h]
                    for u, mass in zip(seen, p.tolist(), strict=True):
                        sums[h][u] = sums[h].get(u, 0.0) + mass
            kept[h] += new
            if len(kept[h]) > heavy + recent:
                older = sorted(kept[h][:-recent], key=lambda u, h=h: -sums[h][u])[:heavy]
                kept[h] = sorted(older) + kept[h][-recent:]
                sums[h] = {u: sums[h][u] for u in kept[h]}
        begin += count
    return out, kept, sums


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    "calls", [[37, *[1] * 14], [11, 9, 1, 1, 20, 1, 8], [1] * 51], ids=["prompt", "turns", "steps"]
)
def test_equals_greedy_eviction(group: int, calls: list[int]) -> None:
    data = sequences(51, group, starts=(0, 13, 48))
    method, layer = build(H2O, group, num_heavy=6, num_recent=5), EvictingLayer()
    out = run(method, data, calls, layer)
    rows = [oracle(data, b, calls, 6, 5) for b in range(3)]
    assert_rows_equal(out, data, [row[0] for row in rows])
    held = layer.held[0]
    assert held.keys.shape[2] == 11
    for b, (_, kept, sums) in enumerate(rows):
        _, k, _ = data.row(b)
        for h in range(2):
            own = turn(k[kept[h], h], torch.tensor(kept[h]))
            size = len(kept[h])
            assert (held.keys[b, h, 11 - size :] - own).abs().max() < 1e-12  # in the order of the text
            mass = torch.tensor([sums[h][u] for u in kept[h]], dtype=torch.float64)
            assert (held.memory["mass"][b, 11 - size :, h] - mass).abs().max() < 1e-11


def test_heads_keep_different_tokens() -> None:
    layer = EvictingLayer()
    run(build(H2O, 2, num_heavy=8, num_recent=2), sequences(60, 2), [60], layer)
    keys = layer.held[0].keys
    assert keys.shape == (1, 2, 10, evicting.HEAD_DIM)
    kept = oracle(sequences(60, 2), 0, [60], 8, 2)[1]
    assert kept[0] != kept[1]


def test_a_budget_that_covers_the_text_is_dense() -> None:
    data = sequences(40, 3)
    out = run(build(H2O, 3, num_heavy=20, num_recent=20), data, [17, *[1] * 23])
    dense = uncached(build(H2O, 3), data)
    assert (out - dense).abs().max() < 1e-12
    small = build(H2O, 3, num_heavy=1, num_recent=1)
    assert (run(small, data, [17, *[1] * 23]) - dense).abs().max() > 0.1
    small.forced_budget = 40
    assert (run(small, data, [17, *[1] * 23]) - dense).abs().max() < 1e-12


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("offset", [0, 23])
def test_column_sums(window: int | None, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to the sums over a full matrix of probabilities, in pieces of any size."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, n, h, 8, generator=generator).double() for n, h in ((30, 6), (30 + offset, 2)))
    layout = SequenceLayout(offset=offset, start=torch.tensor([0, 5]))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(3, 2)) * 0.4
    slots, queries = torch.arange(30 + offset), torch.arange(30)[:, None] + offset
    visible = (slots <= queries) & (slots >= torch.tensor([0, 5])[:, None, None])
    if window is not None:
        visible &= slots > queries - window
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    lse = scores.logsumexp(-1).transpose(1, 2) + 0.5
    for given, p in (
        (None, scores.softmax(-1).nan_to_num(0.0)),
        (lse, (scores - lse.transpose(1, 2)[..., None]).exp().nan_to_num(0.0)),
    ):
        for size in (1, 2000, 1 << 24):
            monkeypatch.setattr("nsa_convert.methods.parts.column_sums.SCORES", size)
            sums = column_sums(q, k, layout=layout, scale=0.4, lse=given, window=window)
            assert (sums - p.sum(2).transpose(1, 2)).abs().max() < 1e-12


LAYOUTS = {
    "whole": SequenceLayout(),
    "offset": SequenceLayout(offset=23),
    "padded": SequenceLayout(offset=5, start=torch.tensor([0, 17])),
    "packed": SequenceLayout(cu_seqlens=torch.tensor([0, 9, 9, 31, 40])),
}


@pytest.mark.parametrize("size", [1, 300, 1 << 22])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_one_pass_is_attention_and_its_sums(
    layout: SequenceLayout, group: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In tiles of any size, with values that nobody sees in the padding."""
    monkeypatch.setattr("nsa_convert.methods.parts.column_sums.SCORES", size)
    q, k, v = self_made(40, layout, group)
    if layout.start is not None:
        v[1, :17] = torch.nan
    o, sums = attend_and_sum(q, k, v, layout=layout, scale=0.4)
    with use_backend("reference"):
        expected = dense_attention(q, k, v.nan_to_num(0.0), layout=layout, scale=0.4)
    assert (o - expected).abs().max() < 1e-12
    assert (sums - column_sums(q, k, layout=layout, scale=0.4)).abs().max() < 1e-12
    rows = layout.visible(40, k.shape[1], q.device).any(-1).sum(1)  # queries that see anything
    assert (sums.sum(1) - rows[:, None]).abs().max() < 1e-11


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 0.02)])
def test_one_pass_is_as_exact_as_dense_attention(dtype: torch.dtype, bound: float) -> None:
    q, k, v = (x.to(dtype) for x in self_made(200, SequenceLayout(), 3))
    o, sums = attend_and_sum(q, k, v, layout=SequenceLayout(), scale=0.4)
    wide = [x.double() for x in (q, k, v)]
    exact, exact_sums = attend_and_sum(*wide, layout=SequenceLayout(), scale=0.4)
    assert (o.dtype, sums.dtype) == (dtype, torch.float32)
    assert (sums - exact_sums).abs().max() < 2e-5
    plain = dense_attention(q, k, v, scale=0.4)
    assert (o - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-5
    assert (o - exact).abs().max() < bound


def test_a_gradient_reaches_what_is_attended_to() -> None:
    q, k, v = self_made(40, SequenceLayout(), 2)
    o, sums = attend_and_sum(q.requires_grad_(), k, v, layout=SequenceLayout(), scale=0.4)
    assert o.requires_grad
    assert not sums.requires_grad
    with torch.no_grad():
        again, same = attend_and_sum(q, k, v, layout=SequenceLayout(), scale=0.4)
    assert (o - again).abs().max() < 1e-12
    assert (sums - same).abs().max() < 1e-12


def self_made(length: int, layout: SequenceLayout, group: int) -> list[Tensor]:
    """Return ``length`` queries, and the keys and values up to the last of them."""
    generator = torch.Generator().manual_seed(0)
    batch = 1 if layout.start is None else len(layout.start)
    sizes = ((length, 2 * group), (length + layout.offset, 2), (length + layout.offset, 2))
    return [torch.randn(batch, n, h, 8, generator=generator).double() for n, h in sizes]
