"""Layers that read prompts with one method and decode with another, over the same projections and cache."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from nsa_convert.config import AttentionGeometry
from nsa_convert.methods.parts.base import AttentionInputs, CacheNeeds, MethodSpec, Reach, SparseMethod
from nsa_convert.methods.parts.inputs import select_heads
from nsa_convert.methods.parts.mix import Member, Mix, of_member
from nsa_convert.methods.parts.prefill import is_step
from nsa_convert.methods.parts.selection import NO_REUSE
from nsa_convert.methods.parts.training_mode import TrainingMode
from nsa_convert.settings import raise_problems


@dataclasses.dataclass(frozen=True)
class PhasePart:
    """The method of one phase.

    Attributes:
        method: Its class.
        settings: Its checked settings.
    """

    method: type[SparseMethod]
    settings: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseParts:
    """The methods of both phases.

    Attributes:
        prefill: Reads prompts.
        decode: Serves every call on a cache with at most 16 new tokens.
    """

    prefill: PhasePart
    decode: PhasePart

    @property
    def couples_heads(self) -> bool:
        """Whether the heads of a layer choose together in either phase."""
        return any(part.method.spec.couples_heads for part in (self.prefill, self.decode))


class PhaseMix(Mix):
    """Hands each call to the method of its phase; both see the whole cache.

    Args:
        settings: The methods of both phases.
        geometry: Sizes of the layer.
        layer_index: Index of the layer in the model.
    """

    spec = MethodSpec(
        name="phases",
        title="phases",
        paper="",
        summary="one method while the prompt is read, another one while decoding",
        trainable=True,
        phases=("train", "prefill", "decode"),
        granularity="as its parts",
        sources={},
    )

    def __init__(self, settings: PhaseParts, geometry: AttentionGeometry, layer_index: int) -> None:
        super().__init__(settings, geometry, layer_index)
        self.prefill = settings.prefill.method(settings.prefill.settings, geometry, layer_index)
        self.decode = settings.decode.method(settings.decode.settings, geometry, layer_index)

        # Both methods read all heads of the layer.
        heads = tuple(range(geometry.num_kv_heads))
        pairs = {"prefill": self.prefill, "decode": self.decode}
        self._share(Member(name=name, path=name, method=own, heads=heads) for name, own in pairs.items())
        raise_problems(self._problems(), code="CF22")

        # A training text is read like a prompt.
        self.training_spec = self.prefill.training_spec

    def _problems(self) -> list[str]:
        """Return why the two methods cannot share a layer."""
        problems = []
        for member in self.members:
            method = member.method
            if method.cache_needs().key_taps > 1:
                problems.append(
                    f"{member.name}: {method.spec.name} changes the keys themselves, which the other phase "
                    "reads too"
                )
            if getattr(method.settings, "reuse_from", NO_REUSE) != NO_REUSE:
                problems.append(f"{member.name}: reuse_from is not possible where the phases differ")

        # What a layer forgets, it forgets while decoding, and from a prompt that the other method has read.
        if self.prefill.cache_needs().policy is not None:
            problems.append(
                f"prefill: {self.prefill.spec.name} forgets tokens, which belongs to decoding; where it can, "
                "set cache: keep"
            )
        policy = self.decode.cache_needs().policy
        if policy is not None and policy.per_token:
            problems.append(
                f"decode: {self.decode.spec.name} has to read the prompt itself to know what to forget"
            )
        return problems

    def cache_needs(self) -> CacheNeeds:
        """Return the needs of both methods; training reads prompts, decoding decides what is forgotten."""
        needs = super().cache_needs()
        decode = self.decode.cache_needs()
        sets = self.prefill.cache_needs().extra_head_sets + decode.extra_head_sets
        trained = tuple(pool for pool in needs.loss_pools if pool.name.startswith("prefill."))
        return dataclasses.replace(needs, loss_pools=trained, extra_head_sets=sets, policy=decode.policy)

    def reach(self) -> Reach:
        """Return what each phase reads, and what both have to be asked for together."""
        prefill = self.prefill.reach()
        decode = self.decode.reach()
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
