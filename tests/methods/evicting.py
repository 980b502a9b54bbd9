"""Running one method over a cache that forgets, call by call, and what oracles need."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nsa_convert.config import AttentionGeometry
from nsa_convert.methods.parts.base import SparseMethod
from nsa_convert.methods.parts.inputs import AttentionInputs
from nsa_convert.patch.eviction import EvictingLayer, append, evict
from nsa_convert.patch.layout import SparseContext
from nsa_convert.patch.rope import mover
from nsa_convert.patterns import SequenceLayout

HEAD_DIM = 16


class Rotary(nn.Module):
    """Angles of RoPE as transformers hands them out."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None] * angle_rates(x.shape[-1]).to(x.dtype)
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()


def angle_rates(dim: int) -> Tensor:
    return 100.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def turn(x: Tensor, position: float | Tensor) -> Tensor:
    """Rotate ``x [..., D]`` to a position, pair by pair."""
    half = x.shape[-1] // 2
    angle = torch.as_tensor(position, dtype=torch.float64)[..., None] * angle_rates(x.shape[-1])
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


@dataclasses.dataclass
class Sequences:
    """Unrotated queries, keys and values ``[B, T, h, D]`` of left-padded rows."""

    q: Tensor
    k: Tensor
    v: Tensor
    starts: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.q.shape[1]

    def row(self, b: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the real tokens of a row."""
        return tuple(x[b, self.starts[b] :] for x in (self.q, self.k, self.v))


def sequences(
    length: int,
    group: int,
    kv_heads: int = 2,
    starts: tuple[int, ...] = (0,),
    seed: int = 0,
    spread: float = 2.0,
) -> Sequences:
    generator = torch.Generator().manual_seed(seed)
    heads = (group * kv_heads, kv_heads, kv_heads)
    q, k, v = (
        spread * torch.randn(len(starts), length, h, HEAD_DIM, generator=generator, dtype=torch.float64)
        for h in heads
    )
    return Sequences(q=q, k=k, v=v, starts=starts)


def build(cls: type[SparseMethod], group: int, kv_heads: int = 2, **settings: object) -> SparseMethod:
    geometry = AttentionGeometry(
        hidden_size=32, num_query_heads=group * kv_heads, num_kv_heads=kv_heads, head_dim=HEAD_DIM
    )
    return cls(cls.Settings(**settings), geometry, 0)


def run(
    method: SparseMethod, data: Sequences, calls: Sequence[int], layer: EvictingLayer | None = None
) -> Tensor:
    """Feed the tokens in calls of the given sizes through a cache; returns ``[B, T, HQ, D]``."""
    assert sum(calls) == data.length
    layer = EvictingLayer() if layer is None else layer
    starts = data.starts if any(data.starts) else None
    out, past, rotary = [], 0, Rotary()
    for count in calls:
        new = slice(past, past + count)
        start = None if starts is None else torch.tensor(starts)
        context = SparseContext(layout=SequenceLayout(offset=past, start=start), starts=starts, rotary=rotary)
        positions = (torch.arange(past, past + count) - torch.tensor(data.starts)[:, None])[:, :, None]
        q, k = turn(data.q[:, new], positions), turn(data.k[:, new], positions)
        parts = append(method, layer, k, data.v[:, new], context)
        hidden = torch.zeros(len(data.starts), count, 32, dtype=torch.float64)
        x = AttentionInputs(
            **vars(parts[0]), q=q, hidden=hidden, pooled={}, scale=HEAD_DIM**-0.5, move=mover(rotary)
        )
        out.append(method(x))
        evict(method, layer, parts, context, count)
        past += count
    return torch.cat(out, 1)


def uncached(method: SparseMethod, data: Sequences) -> Tensor:
    """Run the method over all tokens without a cache."""
    positions = (torch.arange(data.length) - torch.tensor(data.starts)[:, None])[:, :, None]
    start = torch.tensor(data.starts) if any(data.starts) else None
    x = AttentionInputs(
        q=turn(data.q, positions),
        k=turn(data.k, positions),
        v=data.v,
        pooled={},
        scale=HEAD_DIM**-0.5,
        hidden=torch.zeros(len(data.starts), data.length, 32, dtype=torch.float64),
        layout=SequenceLayout(start=start),
        move=mover(Rotary()),
    )
    return method(x)


def attend(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Return one head's softmax attention of one query ``[D]`` over keys ``[N, D]``."""
    return torch.softmax(keys @ q / HEAD_DIM**0.5 + bias, 0) @ values


def assert_rows_equal(out: Tensor, data: Sequences, expected: list[Tensor]) -> None:
    for b, row in enumerate(expected):
        assert (out[b, data.starts[b] :] - row).abs().max() < 1e-11, f"row {b}"
