"""Layers that run several methods: one for each group of heads, or one for each phase (phases.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from nsa_convert.config import AttentionGeometry
from nsa_convert.methods.parts.base import (
    AttentionInputs,
    CacheNeeds,
    DenseCopy,
    IndexSize,
    MethodSpec,
    Pool,
    Projection,
    Reach,
    SparseMethod,
    TrainingSpec,
)
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """One method of a mix.

    Attributes:
        name: What its pools and token states are told apart by.
        path: Its place among the submodules of the mix.
        method: The method.
        heads: Key/value heads of the layer that it reads.
    """

    name: str
    path: str
    method: SparseMethod
    heads: tuple[int, ...]


class Mix(SparseMethod):
    """Several methods over the same projections and one cache; a subclass says who serves what.

    What each member keeps, projects and learns stands under its name. The further key/value heads of the
    members lie one after the other behind the dense ones.
    """

    members: tuple[Member, ...]
    """The methods, in the order of their further heads."""
    cached_heads: list[tuple[int, ...]]
    """The cached heads of each member: its share of the dense ones, then its further ones."""

    def _share(self, members: Iterable[Member]) -> None:
        """Note who serves what; a layer asks for it in every call."""
        self.members = tuple(members)
        self.cached_heads = []
        place = self.geometry.num_kv_heads
        for member in self.members:
            extra = member.method.cache_needs().extra_head_sets * len(member.heads)
            self.cached_heads.append((*member.heads, *range(place, place + extra)))
            place += extra

    def cache_needs(self) -> CacheNeeds:
        """Return the needs of all members, each under its name; what is forgotten is the members' own."""
        pools = []
        loss_pools = []
        states = []
        taps = 1

        for member, heads in zip(self.members, self.cached_heads, strict=True):
            needs = member.method.cache_needs()
            pools += [_renamed(pool, member.name, heads) for pool in needs.pools]
            loss_pools += [_renamed(pool, member.name, heads) for pool in needs.loss_pools]
            states += [f"{member.name}.{state}" for state in needs.token_states]
            taps = max(taps, needs.key_taps)

        return CacheNeeds(
            pools=tuple(pools), loss_pools=tuple(loss_pools), token_states=tuple(states), key_taps=taps
        )

    def reach(self) -> Reach:
        """Return the smallest visible budget, the most keys that a member reads, and all indexes together."""
        reaches = [member.method.reach() for member in self.members]
        return Reach(
            visible_budget=min(reach.visible_budget for reach in reaches),
            decode_keys=_most(reach.decode_keys for reach in reaches),
            prompt_keys=_most(reach.prompt_keys for reach in reaches),
            adapts_to_prompt=any(reach.adapts_to_prompt for reach in reaches),
            index=_joined_index([reach.index for reach in reaches if reach.index is not None]),
            is_causal=all(reach.is_causal for reach in reaches),
        )

    def project(self, hidden: Tensor, rotate: Callable[[Tensor], Tensor]) -> Projection:
        """Return what all members project."""
        keys: list[Tensor] = []
        values: list[Tensor] = []
        states: dict[str, Tensor] = {}

        for member in self.members:
            own = member.method.project(hidden, rotate)
            if own.k is not None and own.v is not None:
                keys.append(own.k)
                values.append(own.v)
            states |= {f"{member.name}.{name}": x for name, x in own.token_states.items()}

        if not keys:
            return Projection(token_states=states)
        return Projection(k=torch.cat(keys, 2), v=torch.cat(values, 2), token_states=states)

    def compress(self, name: str, windows: Tensor) -> Tensor:
        """Compress with the member that owns the pool."""
        owner, _, own = name.partition(".")
        return next(m.method for m in self.members if m.name == owner).compress(own, windows)

    def mix_keys(self, taps: Sequence[Tensor]) -> Tensor:
        """Let each member mix the keys of its heads."""
        mixed = taps[0].clone()
        for member, cached in zip(self.members, self.cached_heads, strict=True):
            reached = member.method.cache_needs().key_taps
            if reached > 1:
                own = member.method.mix_keys([select_heads(x, cached) for x in taps[:reached]])
                mixed[:, :, list(cached)] = own.to(mixed.dtype)
        return mixed

    def dense_copies(self) -> dict[str, DenseCopy]:
        """Return the copies of all members, from the rows of their heads."""
        return {
            f"{member.path}.{own}": DenseCopy(dense=copy.dense, rows=self._rows_of(member.heads, copy))
            for member in self.members
            for own, copy in member.method.dense_copies().items()
        }

    def _rows_of(self, heads: tuple[int, ...], copy: DenseCopy) -> Callable[[Tensor], Tensor]:
        geometry = self.geometry
        per_head = geometry.head_dim * (geometry.group_size if copy.dense.startswith("q_proj") else 1)
        return lambda rows: copy.rows(rows.unflatten(0, (-1, per_head))[list(heads)].flatten(0, 1))


class HeadMix(Mix):
    """Runs one method per group of key/value heads.

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
        methods = nn.ModuleList(
            part.method(part.settings, _geometry_of(geometry, part.heads), layer_index) for part in settings
        )
        self.parts = cast(Sequence[SparseMethod], methods)
        for part, method in zip(settings, self.parts, strict=True):
            for module in methods_in(method):
                module.heads = part.heads
        pairs = enumerate(zip(settings, self.parts, strict=True))
        self._share(
            Member(name=str(i), path=f"parts.{i}", method=method, heads=part.heads)
            for i, (part, method) in pairs
        )

        order = [head for part in settings for head in _query_heads(geometry, part.heads)]
        in_order = order == sorted(order)
        self.query_order = None if in_order else sorted(range(len(order)), key=order.__getitem__)
        """Where each query head's output is among the outputs of the parts; None where they are in order."""

        specs = [method.training_spec for method in self.parts]
        self.training_spec = TrainingSpec(
            stage_losses=_merge(spec.stage_losses for spec in specs),
            dual_stream=any(spec.dual_stream for spec in specs),
            has_dense_mode=True,
        )

    @staticmethod
    def split(method: type[SparseMethod], settings: Any, heads: tuple[int, ...]) -> list[HeadPart]:
        """Return the parts of a rule: runs of neighbouring heads, where the method lets heads be apart."""
        # The settings of a pair of methods, one for each phase, answer for both.
        couples = getattr(settings, "couples_heads", method.spec.couples_heads)
        runs = [heads] if couples else neighbours(heads)
        return [HeadPart(method=method, settings=settings, heads=run) for run in runs]

    def forward(self, x: AttentionInputs) -> Tensor:
        """Attend part by part; returns ``[B, TQ, HQ, D]``."""
        return self._join([method(part) for method, part in zip(self.parts, self._split(x), strict=True)])

    def train_forward(self, x: AttentionInputs, mode: TrainingMode) -> tuple[Tensor, dict[str, Tensor]]:
        """Attend part by part; a loss is the mean over the heads whose method has it."""
        outputs: list[Tensor] = []
        sums: dict[str, Tensor] = {}
        weights: dict[str, int] = {}
        for method, part, inputs in zip(self.parts, self.settings, self._split(x), strict=True):
            # A part that has neither a dense mode nor two streams stays sparse where the others run dense.
            spec = method.training_spec
            own_mode = mode
            if mode.stream == "full" and not spec.has_dense_mode and not spec.dual_stream:
                own_mode = dataclasses.replace(mode, stream="sparse")
            o, losses = method.train_forward(inputs, own_mode)
            outputs.append(o)

            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + len(part.heads) * value
                weights[name] = weights.get(name, 0) + len(part.heads)
        return self._join(outputs), {name: value / weights[name] for name, value in sums.items()}

    def _split(self, x: AttentionInputs) -> Iterator[AttentionInputs]:
        for i, (part, cached) in enumerate(zip(self.settings, self.cached_heads, strict=True)):
            # Where a part forgets, the cache holds what each of them may read; else it is a slice of one.
            if x.parts:
                own = x.parts[i]
            else:
                own = CachedPart(k=select_heads(x.k, cached), v=select_heads(x.v, cached), layout=x.layout)

            # Queries, pools and token states of its heads, under the names that the part knows.
            yield dataclasses.replace(
                x,
                **vars(own),
                q=select_heads(x.q, _query_heads(self.geometry, part.heads)),
                pooled=of_member(x.pooled, str(i)),
                token_states=of_member(x.token_states, str(i)),
                plain_keys=None if x.plain_keys is None else select_heads(x.plain_keys, cached),
                parts=(),
            )

    def _join(self, outputs: list[Tensor]) -> Tensor:
        o = torch.cat(outputs, 2)
        return o if self.query_order is None else o[:, :, self.query_order]


def leaves(method: SparseMethod) -> tuple[SparseMethod, ...]:
    """Return the methods that share a layer by heads: those of a hybrid layer, else the method itself."""
    return tuple(method.parts) if isinstance(method, HeadMix) else (method,)


def leaves_of(methods: Iterable[SparseMethod]) -> list[SparseMethod]:
    """Return the :func:`leaves` of several layers, one after the other."""
    return [leaf for method in methods for leaf in leaves(method)]


def cached_heads(method: SparseMethod) -> list[tuple[int, ...]]:
    """Return the cached heads of each of the :func:`leaves`, its further ones included."""
    if isinstance(method, HeadMix):
        return method.cached_heads
    return [tuple(range(method.geometry.num_kv_heads * (1 + method.cache_needs().extra_head_sets)))]


def methods_in(method: SparseMethod) -> list[SparseMethod]:
    """Return a method and all methods inside it."""
    return [module for module in method.modules() if isinstance(module, SparseMethod)]


def of_member(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the tensors of one member of a mix, by the names it knows them by."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}


def _renamed(pool: Pool, owner: str, heads: tuple[int, ...]) -> Pool:
    """Return the pool of a member under its name, reading the heads that the layer's cache has them at."""
    places = tuple(heads[head] for head in pool.heads)
    return dataclasses.replace(pool, name=f"{owner}.{pool.name}", heads=places)


def _most(limits: Iterable[int | None]) -> int | None:
    """Return the largest of some limits; None where one of them is none."""
    given = list(limits)
    known = [limit for limit in given if limit is not None]
    return max(known) if len(known) == len(given) else None


def _joined_index(sizes: list[IndexSize]) -> IndexSize | None:
    if not sizes:
        return None
    return IndexSize(
        query_heads=sum(size.query_heads for size in sizes),
        key_heads=sum(size.key_heads for size in sizes),
        cached=any(size.cached for size in sizes),
    )


def _geometry_of(geometry: AttentionGeometry, heads: tuple[int, ...]) -> AttentionGeometry:
    queries = len(heads) * geometry.group_size
    return dataclasses.replace(geometry, num_kv_heads=len(heads), num_query_heads=queries)


def _query_heads(geometry: AttentionGeometry, heads: tuple[int, ...]) -> tuple[int, ...]:
    group = geometry.group_size
    return tuple(head * group + g for head in heads for g in range(group))


def _merge(tables: Iterator[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    merged: dict[str, dict[str, Any]] = {}
    for table in tables:
        for stage, losses in table.items():
            merged.setdefault(stage, {}).update(losses)
    return merged
