"""A layer whose key/value heads run different methods, or one method with different budgets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nsa_convert.config import AttentionGeometry
from nsa_convert.methods.parts.base import AttentionInputs, MethodSpec, Pool, SparseMethod
from nsa_convert.methods.parts.inputs import CachedPart, select_heads
from nsa_convert.methods.parts.training_mode import TrainingMode


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadPart:
    """Some key/value heads of a layer and the method they run.

    Attributes:
        method: Class of the method.
        settings: Its checked settings.
        heads: Key/value heads, ascending.
    """

    method: type[SparseMethod]
    settings: Any
    heads: tuple[int, ...]


def neighbours(heads: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Split ascending heads into runs of neighbours: a run is a view of the cache, a list would be a copy."""
    runs: list[list[int]] = []
    for head in heads:
        if runs and head == runs[-1][-1] + 1:
            runs[-1].append(head)
        else:
            runs.append([head])
    return [tuple(run) for run in runs]


class HeadMix(SparseMethod):
    """Runs one method per group of key/value heads over the same projections and cache.

    Args:
        settings: The parts; together they name every key/value head once.
        geometry: Sizes of the layer.
        layer_index: Index of the layer in the model.
    """

    spec = MethodSpec(
        name="hybrid",
        title="hybrid",
        paper="",
        summary="different methods or budgets for different heads of a layer",
        trainable=True,
        phases=("train", "prefill", "decode"),
        granularity="as its parts",
        sources={},
    )

    def __init__(self, settings: tuple[HeadPart, ...], geometry: AttentionGeometry, layer_index: int) -> None:
        super().__init__(settings, geometry, layer_index)
        self.parts = nn.ModuleList(
            part.method(part.settings, _geometry_of(geometry, part.heads), layer_index) for part in settings
        )
        for part, method in zip(settings, self.parts, strict=True):
            method.heads = part.heads
        order = [head for part in settings for head in _query_heads(geometry, part.heads)]
        in_order = order == sorted(order)
        self.query_order = None if in_order else sorted(range(len(order)), key=order.__getitem__)
        """Where each query head's output is among the outputs of the parts; None where they are in order."""
        self.stage_losses = _merge(method.stage_losses for method in self.parts)
        self.dual_stream = any(method.dual_stream for method in self.parts)
        self.runs_full = True
        self.key_taps = max(method.key_taps for method in self.parts)
        self.cached_streams = tuple(
            f"{i}.{name}" for i, method in enumerate(self.parts) for name in method.cached_streams
        )

    def leaves(self) -> Iterator[SparseMethod]:
        """Yield the methods of the parts."""
        yield from self.parts

    def chooses_causally(self) -> bool:
        """Return whether all parts choose causally."""
        return all(method.chooses_causally() for method in self.parts)

    def pools(self) -> tuple[Pool, ...]:
        """Return the pools of all parts, reading the part's heads."""
        return self._own_pools([method.pools() for method in self.parts])

    def loss_pools(self) -> tuple[Pool, ...]:
        """Return the further pools of all parts that losses read."""
        return self._own_pools([method.loss_pools() for method in self.parts])

    def _own_pools(self, pools: Sequence[tuple[Pool, ...]]) -> tuple[Pool, ...]:
        """Return the pools of each part under the part's number, reading the part's heads."""
        renamed = []
        for i, (own, heads) in enumerate(zip(pools, self.cached_heads(), strict=True)):
            for pool in own:
                places = tuple(heads[head] for head in pool.heads)
                renamed.append(dataclasses.replace(pool, name=f"{i}.{pool.name}", heads=places))
        return tuple(renamed)

    def compress(self, name: str, windows: Tensor) -> Tensor:
        """Compress with the part that owns the pool."""
        part, _, own = name.partition(".")
        return self.parts[int(part)].compress(own, windows)

    def extra_kv(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the further keys and values of all parts, one part after another."""
        extra = [pair for pair in (method.extra_kv(hidden) for method in self.parts) if pair is not None]
        if not extra:
            return None
        keys, values = zip(*extra, strict=True)
        return torch.cat(keys, 2), torch.cat(values, 2)

    def mix_keys(self, taps: Sequence[Tensor]) -> Tensor:
        """Let each part mix the keys of its heads."""
        mixed = taps[0].clone()
        for method, cached in zip(self.parts, self.cached_heads(), strict=True):
            if method.key_taps > 1:
                own = method.mix_keys([select_heads(x, cached) for x in taps[: method.key_taps]])
                mixed[:, :, list(cached)] = own.to(mixed.dtype)
        return mixed

    def streams(self, hidden: Tensor, rotate: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return the streams of all parts."""
        return {
            f"{i}.{name}": x
            for i, method in enumerate(self.parts)
            for name, x in method.streams(hidden, rotate).items()
        }

    def dense_copies(self) -> dict[str, str]:
        """Return the copies of all parts."""
        return {
            f"parts.{i}.{own}": dense
            for i, method in enumerate(self.parts)
            for own, dense in method.dense_copies().items()
        }

    def initial_rows(self, own: str, dense: str, rows: Tensor) -> Tensor:
        """Return where a part's parameter starts: from the rows of the part's heads."""
        _, part, name = own.split(".", 2)
        heads, geometry = self.settings[int(part)].heads, self.geometry
        per_head = geometry.head_dim * (geometry.group_size if dense.startswith("q_proj") else 1)
        kept = rows.unflatten(0, (-1, per_head))[list(heads)].flatten(0, 1)
        return self.parts[int(part)].initial_rows(name, dense, kept)

    def visible_budget(self) -> int:
        """Return the smallest budget of a part."""
        return min(method.visible_budget() for method in self.parts)

    def keys_per_query(self) -> int | None:
        """Return the largest number of keys a part reads; None when one reads all."""
        limits = [method.keys_per_query() for method in self.parts]
        return None if None in limits else max(limits)

    def forward(self, x: AttentionInputs) -> Tensor:
        """Attend part by part; returns ``[B, TQ, HQ, D]``."""
        return self._join([method(part) for method, part in zip(self.parts, self._split(x), strict=True)])

    def train_forward(self, x: AttentionInputs, mode: TrainingMode) -> tuple[Tensor, dict[str, Tensor]]:
        """Attend part by part; a loss is the mean over the heads whose method has it."""
        outputs, sums, weights = [], {}, {}
        for method, part, inputs in zip(self.parts, self.settings, self._split(x), strict=True):
            stream = mode
            if mode.stream == "full" and not method.runs_full and not method.dual_stream:
                stream = dataclasses.replace(mode, stream="sparse")
            o, losses = method.train_forward(inputs, stream)
            outputs.append(o)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + len(part.heads) * value
                weights[name] = weights.get(name, 0) + len(part.heads)
        return self._join(outputs), {name: value / weights[name] for name, value in sums.items()}

    def _split(self, x: AttentionInputs) -> Iterator[AttentionInputs]:
        for i, (part, cached) in enumerate(zip(self.settings, self.cached_heads(), strict=True)):
            if x.parts:
                own = x.parts[i]
            else:
                own = CachedPart(k=select_heads(x.k, cached), v=select_heads(x.v, cached), layout=x.layout)
            yield dataclasses.replace(
                x,
                **vars(own),
                q=select_heads(x.q, _query_heads(self.geometry, part.heads)),
                pooled=_own(x.pooled, i),
                streams=_own(x.streams, i),
                plain_keys=None if x.plain_keys is None else select_heads(x.plain_keys, cached),
                parts=(),
            )

    def cached_heads(self) -> list[tuple[int, ...]]:
        """Return the cached heads of each part: its share of the dense ones, then its further ones."""
        place, heads = self.geometry.num_kv_heads, []
        for part, method in zip(self.settings, self.parts, strict=True):
            extra = method.extra_head_sets() * len(part.heads)
            heads.append((*part.heads, *range(place, place + extra)))
            place += extra
        return heads

    def _join(self, outputs: list[Tensor]) -> Tensor:
        o = torch.cat(outputs, 2)
        return o if self.query_order is None else o[:, :, self.query_order]


def _geometry_of(geometry: AttentionGeometry, heads: tuple[int, ...]) -> AttentionGeometry:
    queries = len(heads) * geometry.group_size
    return dataclasses.replace(geometry, num_kv_heads=len(heads), num_query_heads=queries)


def _query_heads(geometry: AttentionGeometry, heads: tuple[int, ...]) -> tuple[int, ...]:
    group = geometry.group_size
    return tuple(head * group + g for head in heads for g in range(group))


def _own(tensors: Mapping[str, Tensor], part: int) -> dict[str, Tensor]:
    prefix = f"{part}."
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def _merge(tables: Iterator[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    merged: dict[str, dict[str, Any]] = {}
    for table in tables:
        for stage, losses in table.items():
            merged.setdefault(stage, {}).update(losses)
    return merged
