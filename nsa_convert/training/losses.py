"""The loss of one training step: next-token loss, auxiliary losses of the layers, and the stream they see."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from nsa_convert.config import FULL
from nsa_convert.methods.parts.base import SparseMethod
from nsa_convert.methods.parts.training_mode import Stream, TrainingMode
from nsa_convert.patch.training_pass import LABELS
from nsa_convert.training.recipe.schema import Stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageLosses:
    """The losses of a stage and their weights.

    Attributes:
        cross_entropy: Weight of the next-token loss.
        names: Auxiliary losses, in the order of the columns of ``SparseCausalLMOutput.auxiliary``.
        weights: Weight of each auxiliary loss.
        layers: For each auxiliary loss, the number of layers that have it.
        dual_stream: Whether every step draws the sparse or the dense stream.
        full_ratio: Share of the steps with the dense stream (``full``).
        teacher: Whether the residual stream carries dense attention (``align``).
        seed: Seed of the draws.
        teacher_kl: Weight of the divergence of the logits from those of dense attention, same weights.
    """

    cross_entropy: float
    names: tuple[str, ...]
    weights: tuple[float, ...]
    layers: tuple[int, ...]
    dual_stream: bool
    full_ratio: float
    teacher: bool
    seed: int
    teacher_kl: float = 0.0

    def mode(self, step: int, *, draw: int = 0, share: float = 1.0, processes: int = 1) -> TrainingMode:
        """Return what the layers compute in optimizer step ``step``.

        A pure function: the same in every process, for every micro-batch, and after a resume.

        Args:
            step: Number of the optimizer step.
            draw: Number of the micro-batch, from which auxiliary losses draw their sample of queries.
            share: Weight of this pass in the step's mean of the auxiliary losses.
            processes: Number of processes over which gradients are averaged; next-token losses are already
                divided by the labels of all of them.
        """
        # Which attention the residual stream carries in this step.
        stream: Stream = "sparse"
        if self.teacher:
            stream = "teacher"
        elif self.dual_stream and uniform(self.seed, step) < self.full_ratio:
            stream = "full"

        # Auxiliary losses are means over the layers that have them.
        pairs = zip(self.weights, self.layers, strict=True)
        return TrainingMode(
            stream=stream,
            losses=self.names,
            weights=tuple(share * weight / max(1, layers) for weight, layers in pairs),
            cross_entropy=processes * self.cross_entropy,
            teacher_kl=processes * self.teacher_kl if stream == "sparse" else 0.0,
            draw=draw,
            keep_logits=False,
        )

    def run(self, model: nn.Module, inputs: Mapping[str, Any], mode: TrainingMode) -> Any:
        """Run one forward pass; ``loss`` of its output is what the pass minimises.

        Without a next-token loss and without a divergence only the last token's logits are computed.

        Returns:
            :class:`SparseCausalLMOutput`.
        """
        if mode.cross_entropy > 0 or mode.teacher_kl > 0:
            return model(**inputs, training_mode=mode)

        rest = {name: x for name, x in inputs.items() if name not in LABELS}
        return model(**rest, training_mode=mode, logits_to_keep=1)

    def means(self, auxiliary: Tensor) -> Tensor:
        """Return the mean of each loss over the layers that have it: ``[layers, K]`` -> ``[K]``."""
        return auxiliary.sum(0) / auxiliary.new_tensor(self.layers or (), dtype=auxiliary.dtype).clamp(min=1)


def stage_losses(stage: Stage, methods: Sequence[SparseMethod], seed: int, stage_index: int) -> StageLosses:
    """Return the losses of a stage, with the weights of the stage or else the defaults of its methods."""
    weights = stage_weights(stage, methods)
    layers = [sum(name in known_losses(m) for m in methods) for name in weights]

    # The alignment stage has no next-token loss and no draws: its stream is always the dense one.
    align = stage.kind == "align"
    default = 0.0 if align else 1.0
    return StageLosses(
        cross_entropy=default if stage.cross_entropy is None else stage.cross_entropy,
        names=tuple(weights),
        weights=tuple(weights.values()),
        layers=tuple(layers),
        dual_stream=not align and full_ratio(stage, methods) > 0,
        full_ratio=full_ratio(stage, methods),
        teacher=align,
        seed=mix(seed, stage_index),
        teacher_kl=stage.teacher_kl,
    )


def full_ratio(stage: Stage, methods: Sequence[SparseMethod]) -> float:
    """Return the share of steps with the dense stream: the stage's, or else the default of the methods."""
    if stage.full_ratio is not None:
        return stage.full_ratio
    return 0.5 if any(m.training_spec.dual_stream for m in methods) else 0.0


def known_losses(method: SparseMethod | type[SparseMethod]) -> set[str]:
    """Return the names of all auxiliary losses of a method, over all stages."""
    return {name for names in method.training_spec.stage_losses.values() for name in names}


def stage_weights(stage: Stage, methods: Sequence[SparseMethod]) -> dict[str, float]:
    """Return name -> weight of the auxiliary losses of a stage; those of weight 0 are left out."""
    if stage.losses is not None:
        return {name: weight for name, weight in stage.losses.items() if weight > 0}

    usual: dict[str, float] = {}
    for method in methods:
        usual |= method.training_spec.stage_losses.get(stage.kind, {})
    return {name: weight for name, weight in usual.items() if weight > 0}


def loss_problems(stage: Stage, methods: Sequence[SparseMethod]) -> list[str]:
    """Return why these methods cannot be trained with the losses of a stage, one sentence per problem."""
    known = sorted({name for method in methods for name in known_losses(method)})
    problems = [
        f"loss '{name}' is none of the method's; it has {', '.join(known) or 'none'}"
        for name in stage.losses or {}
        if name not in known
    ]

    # The dense stream needs methods that can compute dense attention too.
    able = {m.spec.name for m in methods if m.training_spec.dual_stream or m.training_spec.has_dense_mode}
    unable = sorted({m.spec.name for m in methods} - able - {FULL})
    if stage.full_ratio and unable:
        problems.append(
            f"full_ratio {stage.full_ratio:g} needs a method that also runs dense; {', '.join(unable)} cannot"
        )

    # A method that looks ahead leaks the next token into a next-token loss.
    ahead = sorted({m.spec.name for m in methods if not m.reach().is_causal})
    if ahead and stage.kind != "align" and full_ratio(stage, methods) < 1:
        problems.append(
            f"{', '.join(ahead)} chooses keys by later tokens, which a next-token loss would learn to read; "
            "train another method, or dense layers"
        )

    # The stage must have something to minimise.
    if stage.teacher_kl and not methods:
        problems.append("teacher_kl needs a sparse model: the recipe has no sparse_attention")
    if stage.kind == "align" and not problems and not stage_weights(stage, methods):
        problems.append("nothing to minimise: every loss has weight 0, or no layer is sparse")

    return problems


def mix(*numbers: int | str) -> int:
    """Return a 63-bit hash of all arguments, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def uniform(*numbers: int | str) -> float:
    """Return a number in [0, 1) derived from :func:`mix`."""
    return mix(*numbers) / 2.0**63
