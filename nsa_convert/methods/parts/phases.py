"""One method while a prompt is read, another one while decoding, over the same projections and cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nsa_convert.config import AttentionGeometry, raise_problems
from nsa_convert.methods.parts.base import AttentionInputs, IndexSize, MethodSpec, Pool, SparseMethod
from nsa_convert.methods.parts.cache_policy import CachePolicy
from nsa_convert.methods.parts.inputs import select_heads
from nsa_convert.methods.parts.prefill import is_step
from nsa_convert.methods.parts.training_mode import TrainingMode


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhasePart:
    """A method and its checked settings."""

    method: type[SparseMethod]
    settings: Any

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping that names the method and every setting."""
        return {"method": self.method.spec.name, **dataclasses.asdict(self.settings)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhasesSettings:
    """Settings of a pair of methods.

    Attributes:
        prefill: Method that reads prompts: a name, or a mapping with ``method`` and its settings.
        decode: Method of every call on a cache with at most 16 new tokens, in the same form.
    """

    prefill: str | dict | PhasePart = "full"
    decode: str | dict | PhasePart = "full"

    def __post_init__(self) -> None:
        problems = []
        for name, part in vars(self).items():
            if isinstance(part, dict) and ("method" not in part or {"layers", "heads"} & part.keys()):
                problems.append(f"{name} must be a mapping with 'method' and its settings, got {part!r}")
            if (part if isinstance(part, str) else isinstance(part, dict) and part.get("method")) == "phases":
                problems.append(f"{name} cannot be phases again")
        raise_problems(problems, code="CF22")

    def resolved(self, read: Callable[[Mapping[str, Any], str], PhasePart]) -> PhasesSettings:
        """Return the settings with both methods read by ``read(mapping with 'method', name of the phase)``.

        Raises:
            ConfigError: An unknown method, a bad setting, or a method that cannot share the cache.
        """
        parts, problems = {}, []
        for name, part in vars(self).items():
            parts[name] = read({"method": part} if isinstance(part, str) else part, name)
            if getattr(parts[name].settings, "reuse_from", -1) != -1:
                problems.append(f"{name}: reuse_from is not possible inside phases")
        raise_problems(problems, code="CF22")
        return PhasesSettings(**parts)


class Phases(SparseMethod):
    """Hands each call to the method of its phase; both see the whole cache.

    Args:
        settings: With both methods resolved.
        geometry: Sizes of the layer.
        layer_index: Index of the layer in the model.
    """

    spec = MethodSpec(
        name="phases",
        title="Phases",
        paper="",
        summary="one method while the prompt is read, another one while decoding",
        trainable=True,
        phases=("train", "prefill", "decode"),
        granularity="as its parts",
        sources={"prefill": "dense", "decode": "dense"},
    )
    Settings = PhasesSettings

    def __init__(self, settings: PhasesSettings, geometry: AttentionGeometry, layer_index: int) -> None:
        super().__init__(settings, geometry, layer_index)
        self.prefill = settings.prefill.method(settings.prefill.settings, geometry, layer_index)
        self.decode = settings.decode.method(settings.decode.settings, geometry, layer_index)
        raise_problems(self._problems(), code="CF22")
        self.stage_losses = self.prefill.stage_losses
        self.dual_stream, self.runs_full = self.prefill.dual_stream, self.prefill.runs_full
        self.couples_heads = self.prefill.couples_heads or self.decode.couples_heads
        self.cached_streams = tuple(
            f"{name}.{own}" for name, part in self._parts().items() for own in part.cached_streams
        )

    def _parts(self) -> dict[str, SparseMethod]:
        return {"prefill": self.prefill, "decode": self.decode} if hasattr(self, "decode") else {}

    def _problems(self) -> list[str]:
        """Return why the two methods cannot share a layer."""
        problems = [
            f"{name}: {part.spec.name} changes the keys themselves, which the other phase reads too"
            for name, part in self._parts().items()
            if part.key_taps > 1
        ]
        if self.prefill.cache_policy() is not None:
            problems.append(
                f"prefill: {self.prefill.spec.name} forgets tokens, which belongs to decoding; where it can, "
                "set cache: keep"
            )
        policy = self.decode.cache_policy()
        if policy is not None and policy.per_token:
            problems.append(
                f"decode: {self.decode.spec.name} has to read the prompt itself to know what to forget"
            )
        return problems

    @property
    def cover(self) -> int | None:
        """Tokens that the budgets of both methods are widened to; None for the budgets they have."""
        return self._cover

    @cover.setter
    def cover(self, tokens: int | None) -> None:
        self._cover = tokens
        for part in self._parts().values():
            part.cover = tokens

    @property
    def heads(self) -> tuple[int, ...] | None:
        """Key/value heads of the layer in a hybrid; None for all."""
        return self._heads

    @heads.setter
    def heads(self, heads: tuple[int, ...] | None) -> None:
        self._heads = heads
        for part in self._parts().values():
            part.heads = heads

    def chooses_causally(self) -> bool:
        """Return whether both methods choose causally."""
        return all(part.chooses_causally() for part in self._parts().values())

    def pools(self) -> tuple[Pool, ...]:
        """Return the pools of both methods."""
        return tuple(
            own for name, part in self._parts().items() for own in self._own_pools(name, part.pools())
        )

    def loss_pools(self) -> tuple[Pool, ...]:
        """Return the further pools that the losses of the trained method read."""
        return self._own_pools("prefill", self.prefill.loss_pools())

    def _own_pools(self, name: str, pools: tuple[Pool, ...]) -> tuple[Pool, ...]:
        """Return the pools of a method under its phase, reading its heads."""
        heads = self._own_heads(name)
        return tuple(
            dataclasses.replace(
                pool, name=f"{name}.{pool.name}", heads=tuple(heads[head] for head in pool.heads)
            )
            for pool in pools
        )

    def compress(self, name: str, windows: Tensor) -> Tensor:
        """Compress with the method that owns the pool."""
        phase, _, own = name.partition(".")
        return self._parts()[phase].compress(own, windows)

    def extra_head_sets(self) -> int:
        """Return the further sets of heads of both methods."""
        return sum(part.extra_head_sets() for part in self._parts().values())

    def extra_kv(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the further keys and values of both methods, one after the other."""
        extra = [pair for part in self._parts().values() if (pair := part.extra_kv(hidden)) is not None]
        if not extra:
            return None
        keys, values = zip(*extra, strict=True)
        return torch.cat(keys, 2), torch.cat(values, 2)

    def streams(self, hidden: Tensor, rotate: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return the streams of both methods."""
        return {
            f"{name}.{own}": x
            for name, part in self._parts().items()
            for own, x in part.streams(hidden, rotate).items()
        }

    def dense_copies(self) -> dict[str, str]:
        """Return the copies of both methods."""
        return {
            f"{name}.{own}": dense
            for name, part in self._parts().items()
            for own, dense in part.dense_copies().items()
        }

    def initial_rows(self, own: str, dense: str, rows: Tensor) -> Tensor:
        """Return where a method's parameter starts."""
        phase, _, name = own.partition(".")
        return self._parts()[phase].initial_rows(name, dense, rows)

    def cache_policy(self) -> CachePolicy | None:
        """Return what decoding may forget."""
        return self.decode.cache_policy()

    def visible_budget(self) -> int:
        """Return the smaller budget."""
        return min(part.visible_budget() for part in self._parts().values())

    def keys_per_query(self) -> int | None:
        """Return what decoding reads."""
        return self.decode.keys_per_query()

    def keys_per_prompt_query(self) -> int | None:
        """Return what a query of a prompt reads."""
        return self.prefill.keys_per_prompt_query()

    def adapts_to_prompt(self) -> bool:
        """Return whether the method that reads prompts adapts to them."""
        return self.prefill.adapts_to_prompt()

    def index_size(self) -> IndexSize | None:
        """Return what choosing reads, of both methods together."""
        sizes = [size for part in self._parts().values() if (size := part.index_size()) is not None]
        if not sizes:
            return None
        return IndexSize(
            query_heads=sum(size.query_heads for size in sizes),
            key_heads=sum(size.key_heads for size in sizes),
            cached=any(size.cached for size in sizes),
        )

    def forward(self, x: AttentionInputs) -> Tensor:
        """Attend with the method of the phase; returns ``[B, TQ, HQ, D]``."""
        phase = "decode" if is_step(x) else "prefill"
        return self._parts()[phase](self._own(x, phase))

    def train_forward(self, x: AttentionInputs, mode: TrainingMode) -> tuple[Tensor, dict[str, Tensor]]:
        """Train the method that reads prompts: a training text is read like one."""
        return self.prefill.train_forward(self._own(x, "prefill"), mode)

    def _own_heads(self, phase: str) -> tuple[int, ...]:
        """Return the cached heads a method reads: the dense ones, then its further ones."""
        count, place = self.geometry.num_kv_heads, self.geometry.num_kv_heads
        if phase == "decode":
            place += count * self.prefill.extra_head_sets()
        extra = count * self._parts()[phase].extra_head_sets()
        return (*range(count), *range(place, place + extra))

    def _own(self, x: AttentionInputs, phase: str) -> AttentionInputs:
        heads, prefix = self._own_heads(phase), f"{phase}."
        if x.k.shape[2] != len(heads):
            x = dataclasses.replace(x, k=select_heads(x.k, heads), v=select_heads(x.v, heads))
        own = {
            kind: {k.removeprefix(prefix): y for k, y in tensors.items() if k.startswith(prefix)}
            for kind, tensors in (("pooled", x.pooled), ("streams", x.streams))
        }
        return dataclasses.replace(x, **own)
