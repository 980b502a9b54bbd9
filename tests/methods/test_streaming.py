"""StreamingLLM against the paper's cache, played back token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nsa_convert.methods.streaming import Streaming
from tests.methods.evicting import (
    Sequences,
    assert_rows_equal,
    attend,
    build,
    run,
    sequences,
    turn,
    uncached,
)


def oracle(data: Sequences, b: int, sinks: int, window: int, in_cache: bool) -> Tensor:
    """Play the published cache: unrotated keys, numbered by their place in it when they are read."""
    q, k, v = data.row(b)
    group, out, cached = q.shape[1] // k.shape[1], torch.empty_like(q), []
    for t in range(len(q)):
        cached.append(t)
        if len(cached) > sinks + window:
            del cached[sinks]
        places = torch.arange(len(cached)) if in_cache else torch.tensor(cached)
        for h in range(q.shape[1]):
            keys = turn(k[cached, h // group], places)
            out[t, h] = attend(turn(q[t, h], places[-1]), keys, v[cached, h // group])
    return out


@pytest.mark.parametrize("positions", ["absolute", "cache"])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7])
def test_equals_the_published_cache(positions: str, group: int) -> None:
    data = sequences(61, group, starts=(0, 17, 58))
    method = build(Streaming, group, num_sinks=3, window_size=10, positions=positions)
    expected = [oracle(data, b, 3, 10, positions == "cache") for b in range(3)]
    for calls in ([61], [20, 41], [61 - 12, *[1] * 12], [5, 1, 30, 1, 1, 23]):
        assert_rows_equal(run(method, data, calls), data, expected)
    assert_rows_equal(uncached(method, data), data, expected)


@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (0, 7), (4, 1), (1, 2), (60, 5)])
def test_small_and_large_budgets(sinks: int, window: int) -> None:
    data = sequences(40, 2)
    for positions in ("absolute", "cache"):
        method = build(Streaming, 2, num_sinks=sinks, window_size=window, positions=positions)
        expected = [oracle(data, 0, sinks, window, positions == "cache")]
        assert_rows_equal(run(method, data, [17, *[1] * 23]), data, expected)


def test_positions_matter_only_beyond_the_budget() -> None:
    data = sequences(30, 2)
    out = {
        p: run(build(Streaming, 2, num_sinks=3, window_size=10, positions=p), data, [30])
        for p in ("absolute", "cache")
    }
    gap = (out["absolute"] - out["cache"]).abs().amax((0, 2, 3))
    assert gap[:13].max() < 1e-12
    assert gap[13:].min() > 1e-6


def test_distances_to_the_sinks_stay_bounded() -> None:
    """A sink's weight depends on the query alone once the cache is full, however long the text is."""
    method = build(Streaming, 1, 1, num_sinks=1, window_size=1, positions="cache")
    data = sequences(50, 1, 1)
    data.q[:] = data.q[:, :1]
    data.k[:] = data.k[:, :1]
    out = run(method, data, [1] * 50)[0, 1:, 0]
    weight = (
        (out - data.v[0, 1:, 0]) @ data.v[0, 0, 0] / ((data.v[0, 0, 0] - data.v[0, 1:, 0]) @ data.v[0, 0, 0])
    )
    assert (weight - weight[0]).abs().max() < 1e-10
