"""One method while a prompt is read, another one while decoding, over the same projections and cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from nsa_convert.config import AttentionGeometry
from nsa_convert.methods.parts.base import AttentionInputs, CacheNeeds, MethodSpec, Reach, SparseMethod
from nsa_convert.methods.parts.inputs import select_heads
from nsa_convert.methods.parts.mix import Member, Mix, of_member
from nsa_convert.methods.parts.prefill import is_step
from nsa_convert.methods.parts.training_mode import TrainingMode
from nsa_convert.settings import raise_problems


@dataclasses.dataclass(frozen=True)
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

    @property
    def couples_heads(self) -> bool:
        """Whether the heads of a layer choose together in either phase; of resolved settings."""
        return any(part.method.spec.couples_heads for part in vars(self).values())

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping that names both methods and every setting; of resolved settings."""
        return {name: part.to_dict() for name, part in vars(self).items()}

    def resolved(
        self, read: Callable[[Mapping[str, Any], str], tuple[type[SparseMethod], Any]]
    ) -> PhasesSettings:
        """Return the settings with both methods read by ``read(mapping with 'method', name of the phase)``.

        Raises:
            ConfigError: An unknown method, a bad setting, or a method that cannot share the cache.
        """
        parts, problems = {}, []
        for name, part in vars(self).items():
            parts[name] = PhasePart(*read({"method": part} if isinstance(part, str) else part, name))
            if getattr(parts[name].settings, "reuse_from", -1) != -1:
                problems.append(f"{name}: reuse_from is not possible inside phases")
        raise_problems(problems, code="CF22")
        return PhasesSettings(**parts)


class Phases(Mix):
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
        prefill, decode = settings.prefill, settings.decode
        assert isinstance(prefill, PhasePart)
        assert isinstance(decode, PhasePart)
        self.prefill = prefill.method(prefill.settings, geometry, layer_index)
        self.decode = decode.method(decode.settings, geometry, layer_index)
        heads = tuple(range(geometry.num_kv_heads))  # both read all of them
        pairs = {"prefill": self.prefill, "decode": self.decode}
        self._share(Member(name=name, path=name, method=own, heads=heads) for name, own in pairs.items())
        raise_problems(self._problems(), code="CF22")
        # A training text is read like a prompt.
        self.training_spec = self.prefill.training_spec

    def _problems(self) -> list[str]:
        """Return why the two methods cannot share a layer."""
        needs = {member.name: member.method.cache_needs() for member in self.members}
        problems = [
            f"{member.name}: {member.method.spec.name} changes the keys themselves, which the other phase "
            "reads too"
            for member in self.members
            if needs[member.name].key_taps > 1
        ]
        if needs["prefill"].policy is not None:
            problems.append(
                f"prefill: {self.prefill.spec.name} forgets tokens, which belongs to decoding; where it can, "
                "set cache: keep"
            )
        policy = needs["decode"].policy
        if policy is not None and policy.per_token:
            problems.append(
                f"decode: {self.decode.spec.name} has to read the prompt itself to know what to forget"
            )
        return problems

    def cache_needs(self) -> CacheNeeds:
        """Return the needs of both methods; training reads prompts, decoding decides what is forgotten."""
        needs, decode = super().cache_needs(), self.decode.cache_needs()
        sets = self.prefill.cache_needs().extra_head_sets + decode.extra_head_sets
        trained = tuple(pool for pool in needs.loss_pools if pool.name.startswith("prefill."))
        return dataclasses.replace(needs, loss_pools=trained, extra_head_sets=sets, policy=decode.policy)

    def reach(self) -> Reach:
        """Return what each phase reads, and what both have to be asked for together."""
        prefill, decode = self.prefill.reach(), self.decode.reach()
        return dataclasses.replace(
            super().reach(),
            decode_keys=decode.decode_keys,
            prompt_keys=prefill.prompt_keys,
            adapts_to_prompt=prefill.adapts_to_prompt,
        )

    def forward(self, x: AttentionInputs) -> Tensor:
        """Attend with the method of the phase; returns ``[B, TQ, HQ, D]``."""
        phase = "decode" if is_step(x) else "prefill"
        return getattr(self, phase)(self._own(x, phase))

    def train_forward(self, x: AttentionInputs, mode: TrainingMode) -> tuple[Tensor, dict[str, Tensor]]:
        """Train the method that reads prompts: a training text is read like one."""
        return self.prefill.train_forward(self._own(x, "prefill"), mode)

    def _own(self, x: AttentionInputs, phase: str) -> AttentionInputs:
        heads = self.cached_heads[0 if phase == "prefill" else 1]
        if x.k.shape[2] != len(heads):
            x = dataclasses.replace(x, k=select_heads(x.k, heads), v=select_heads(x.v, heads))
        return dataclasses.replace(
            x, pooled=of_member(x.pooled, phase), token_states=of_member(x.token_states, phase)
        )
