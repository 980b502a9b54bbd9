"""RazorAttention's compensation token against the tokens it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nsa_convert.methods.razor import Razor
from nsa_convert.patch.eviction import EvictingLayer
from tests.methods import evicting
from tests.methods.evicting import Sequences, assert_rows_equal, attend, build, run, sequences, turn, uncached


def oracle(
    data: Sequences, b: int, calls: list[int], sinks: int, window: int, share: int, repeats: bool
) -> Tensor:
    """Attend to kept tokens and to the mean of those that left, repeated as often as they were."""
    q, k, v = data.row(b)
    at = torch.arange(len(q))[:, None]
    q, k, out, begin = turn(q, at), turn(k, at), torch.zeros_like(q), -data.starts[b]
    for count in calls:
        seen = max(0, begin)
        size = max(window, seen // share if share else 0)
        kept = [u for u in range(seen) if u < sinks or u >= seen - size]
        left = [u for u in range(seen) if u not in kept]
        for t in range(seen, begin + count):
            for h in range(q.shape[1]):
                own = h // (q.shape[1] // k.shape[1])
                now = kept + list(range(seen, t + 1))
                keys, values = [k[now, own]], [v[now, own]]
                if left:
                    times = len(left) if repeats else 1
                    keys.append(k[left, own].mean(0).expand(times, -1))
                    values.append(v[left, own].mean(0).expand(times, -1))
                out[t, h] = attend(q[t, h], torch.cat(keys), torch.cat(values))
        begin += count
    return out


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("bias", ["log_count", "none"])
def test_equals_repeated_mean_tokens(group: int, bias: str) -> None:
    data = sequences(47, group, starts=(0, 11, 44), spread=1.0)
    method = build(Razor, group, num_sinks=2, window_size=6, window_share=0, comp_bias=bias)
    for calls in ([30, *[1] * 17], [9, 13, 1, 1, 22, 1], [1] * 47):
        expected = [oracle(data, b, calls, 2, 6, 0, bias == "log_count") for b in range(3)]
        assert_rows_equal(run(method, data, calls), data, expected)


def test_the_window_grows_with_the_text() -> None:
    data = sequences(90, 2, starts=(0, 21))
    method, layer = build(Razor, 2, num_sinks=2, window_size=6, window_share=4), EvictingLayer()
    calls = [40, *[1] * 50]
    out = run(method, data, calls, layer)
    assert_rows_equal(out, data, [oracle(data, b, calls, 2, 6, 4, True) for b in range(2)])
    assert layer.held[0].keys.shape[2] == 2 + 90 // 4


def test_sums_hold_what_left() -> None:
    data, layer = sequences(50, 1, starts=(0, 45)), EvictingLayer()
    run(build(Razor, 1, num_sinks=2, window_size=6, window_share=0), data, [20, *[1] * 30], layer)
    memory = layer.held[0].memory
    assert (memory["value_sum"][0] - data.v[0, 2:44].sum(0)).abs().max() < 1e-12
    assert (memory["value_sum"][1]).abs().max() == 0  # five tokens: nothing has left


def test_a_window_that_covers_the_text_is_dense() -> None:
    data = sequences(40, 3)
    dense = uncached(build(Razor, 3), data)
    small = build(Razor, 3, num_sinks=1, window_size=2, window_share=0)
    assert (run(small, data, [17, *[1] * 23]) - dense).abs().max() > 0.1
    small.forced_budget = 40
    assert (run(small, data, [17, *[1] * 23]) - dense).abs().max() < 1e-12


def test_size_never_jumps() -> None:
    policy = build(Razor, 1, num_sinks=3, window_size=5, window_share=2).cache_needs().policy
    sizes = [policy.size(n) for n in range(200)]
    assert all(0 <= b - a <= 1 for a, b in zip(sizes, sizes[1:], strict=False))
    assert evicting.HEAD_DIM == 16
