"""InfLLM against its rules written out query by query."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from nsa_convert.errors import ConfigError
from nsa_convert.methods.infllm import InfLLM, InfLLMSettings
from nsa_convert.methods.parts.base import AttentionRecord, observe
from nsa_convert.patch.eviction import EvictingLayer
from tests.marks import slow
from tests.methods import evicting
from tests.methods.evicting import Sequences, assert_rows_equal, build, run, sequences, turn, uncached

SETTINGS = {"num_sinks": 3, "window_size": 12, "block_size": 5, "num_blocks": 2, "num_representatives": 2}


def oracle(
    data: Sequences,
    b: int,
    calls: list[int],
    tile: int,
    sinks: int,
    window: int,
    block: int,
    blocks: int,
    few: int,
    read: dict[int, list[int]] | None = None,
) -> Tensor:
    """Keep unrotated keys; turn near ones to their positions and far queries to one position.

    ``read`` is told the keys of each query.
    """
    q, k, v = data.row(b)
    heads, group, scale = q.shape[1], q.shape[1] // k.shape[1], evicting.HEAD_DIM**-0.5
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out, received = torch.zeros_like(q), torch.zeros(len(q), heads, dtype=torch.float64)
    known: list[Tensor] = []  # for each block the mean of its best keys, [HQ, D]
    for first, last in tiles(calls, tile, data.starts[b]):
        while sinks + (len(known) + 1) * block <= first - window + 1:
            own = torch.arange(block) + sinks + len(known) * block
            best = [sorted(own.tolist(), key=lambda j, h=h: -received[j, h])[:few] for h in range(heads)]
            known.append(torch.stack([k[best[h], h].mean(0) for h in range(heads)]))
        mean = turn(q[first:last], window - 1).mean(0)
        ranked = sorted(range(len(known)), key=lambda n: -(mean * known[n]).sum())[:blocks]
        listed = [j for n in ranked for j in range(sinks + n * block, sinks + (n + 1) * block)]
        rest = list(range(sinks + len(known) * block, last))
        for t, h in itertools.product(range(first, last), range(heads)):
            near = list(range(max(0, t - window + 1), t + 1))
            far = [j for j in [*range(sinks), *listed, *rest] if j <= t - window]
            if read is not None:
                read[t] = sorted(near + far)
            at = torch.tensor(near)
            scores = torch.cat(
                [turn(k[near, h], at) @ turn(q[t, h], t), k[far, h] @ turn(q[t, h], window - 1)]
            )
            p = torch.softmax(scores * scale, 0)
            out[t, h] = p @ v[near + far, h]
            received[near, h] += p[: len(near)]
    return out


def tiles(calls: list[int], tile: int, start: int) -> list[tuple[int, int]]:
    """Return the tiles of a row whose first ``start`` tokens are padding."""
    found, begin = [], -start
    for count in calls:
        own = range(max(0, begin), begin + count)
        found += [(t, min(t + tile, own.stop)) for t in range(own.start, own.stop, tile)]
        begin += count
    return found


@pytest.mark.parametrize("group", [2, 7, *map(slow, (1, 3, 4))])
@pytest.mark.parametrize(
    ("calls", "tile"), [([70], 8), ([45, *[1] * 25], 16), ([23, 1, 1, 30, 15], 6), ([70], 1)], ids=str
)
def test_equals_the_rules_written_out(group: int, calls: list[int], tile: int) -> None:
    data = sequences(70, group, starts=(0, 19, 66), spread=1.5)
    method = build(InfLLM, group, **SETTINGS, query_block=tile)
    expected = [oracle(data, b, calls, tile, *SETTINGS.values()) for b in range(3)]
    assert_rows_equal(run(method, data, calls), data, expected)
    if len(calls) == 1:
        assert_rows_equal(uncached(method, data), data, expected)


@pytest.mark.parametrize(
    ("calls", "tile"), [([70], 8), ([45, *[1] * 25], 16), ([23, 1, 1, 30, 15], 6), ([9, 61], 100)], ids=str
)
@pytest.mark.parametrize("changes", [{}, {"num_sinks": 5}, {"num_sinks": 0}, {"window_size": 40}], ids=str)
def test_the_record_holds_what_is_read(changes: dict, calls: list[int], tile: int) -> None:
    data = sequences(70, 2, starts=(0, 19))
    settings = {**SETTINGS, **changes}
    records: list[AttentionRecord] = []
    with observe(records.append):
        run(build(InfLLM, 2, **settings, query_block=tile), data, calls)
    seen: list[dict[int, list[int]]] = [{}, {}]
    for b in range(2):
        oracle(data, b, calls, tile, *settings.values(), read=seen[b])
    for record in records:
        first, count, held = record.layout.offset, record.q.shape[1], record.k.shape[1]
        masks = [p.to_dense_mask(count, held, 4, record.layout) for p in record.patterns.values()]
        total = sum(mask.expand(1, 4, -1, -1).int() for mask in masks)
        assert total.max() == 1, "a key is in two patterns"
        row = 0 if torch.equal(record.k[0, -1], last_key(data, 0, held)) else 1
        expected = torch.zeros(count, held, dtype=torch.int32)
        for t in range(first, first + count):
            expected[t - first, seen[row].pop(t)] = 1
        assert torch.equal(total, expected.expand(1, 4, -1, -1))
        density = sum(p.density(count, held, record.layout) for p in record.patterns.values())
        assert density == pytest.approx(expected.sum().item() / sum(range(first + 1, first + count + 1)))
    assert seen == [{}, {}]


def last_key(data: Sequences, b: int, held: int) -> Tensor:
    """Return the rotated key of a row's token ``held - 1``."""
    return turn(data.row(b)[1][held - 1], held - 1)


@pytest.mark.parametrize(
    "changes",
    [{"num_sinks": 0}, {"num_blocks": 1}, {"block_size": 1, "num_representatives": 1}, {"window_size": 1}],
)
def test_odd_sizes(changes: dict) -> None:
    data, calls = sequences(50, 2), [33, *[1] * 17]
    settings = {**SETTINGS, **changes}
    expected = [oracle(data, 0, calls, 7, *settings.values())]
    assert_rows_equal(run(build(InfLLM, 2, **settings, query_block=7), data, calls), data, expected)


def test_a_window_that_covers_the_text_is_dense() -> None:
    data = sequences(40, 3)
    dense = uncached(build(InfLLM, 3), data)
    small = build(InfLLM, 3, **SETTINGS)
    assert (run(small, data, [17, *[1] * 23]) - dense).abs().max() > 0.1
    small.forced_budget = 40
    assert (run(small, data, [17, *[1] * 23]) - dense).abs().max() < 1e-12


def test_one_query_a_tile_is_causal_and_more_are_not() -> None:
    data, other = sequences(60, 2), sequences(60, 2)
    other.q[:, 50:] = 3.0
    for tile, same in ((1, True), (16, False)):
        method = build(InfLLM, 2, **SETTINGS, query_block=tile)
        gap = (uncached(method, data) - uncached(method, other))[:, :50].abs().max()
        assert (gap < 1e-12) == same
        assert method.reach().is_causal == same


def test_memory_has_the_size_it_says() -> None:
    layer, method = EvictingLayer(), build(InfLLM, 2, **SETTINGS, query_block=9)
    run(method, sequences(64, 2), [64], layer)
    memory = layer.held[0].memory
    assert memory["keys"].shape == (1, 10, 4, evicting.HEAD_DIM)
    policy = method.cache_needs().policy
    assert sum(x[0].numel() for x in memory.values()) == policy.numbers(64, method.geometry)


def test_settings_are_checked_together() -> None:
    with pytest.raises(
        ConfigError, match=r"window_size must be >= 1, got 0; num_representatives 9 is larger"
    ):
        InfLLMSettings(window_size=0, num_representatives=9, block_size=4)
