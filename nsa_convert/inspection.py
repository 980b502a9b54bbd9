"""Say what a checkpoint is and what conversion would cost, from its headers alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nsa_convert.checkpoint.gguf import is_gguf, open_gguf
from nsa_convert.checkpoint.headers import WEIGHT_DTYPES
from nsa_convert.checkpoint.source import (
    SPARSE_TENSOR,
    Checkpoint,
    is_converted,
    open_checkpoint,
    open_converted,
)
from nsa_convert.checkpoint.staging import gigabytes
from nsa_convert.config import LayerRule, SparseAttentionConfig
from nsa_convert.errors import CheckpointError, ConfigError
from nsa_convert.estimate import (
    CONTEXTS,
    ContextCost,
    context_costs,
    cost_lines,
    dense_until,
    parameter_count,
)
from nsa_convert.families import rope_parameters
from nsa_convert.methods.parts.base import SparseMethod
from nsa_convert.methods.parts.registry import METHODS, method_class
from nsa_convert.plan import resolve_plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodOutlook:
    """What one method would mean for a model.

    Attributes:
        method: Its name; ``"as converted"`` for a converted model.
        reason: Why it cannot be used; None when it can.
        new_parameters: Weights it adds.
        dense_until: Tokens up to which nothing is sparse; None when nothing ever is.
        costs: Cache size and attention work at several lengths.
    """

    method: str
    reason: str | None
    new_parameters: int
    dense_until: int | None
    costs: list[ContextCost]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectionReport:
    """What a checkpoint is.

    Attributes:
        path: Folder or file.
        converted: Whether it is a converted model.
        family: Title of its family.
        model_type: Of its config.
        num_layers: Decoder layers.
        hidden_size: Width.
        num_query_heads: HQ.
        num_kv_heads: H.
        group_size: G.
        head_dim: D.
        rope: Type and numbers of the position encoding.
        max_positions: Longest sequence the model was built for, or None.
        dtype: Of most weights.
        parameters: Number of weights.
        weight_bytes: Size of the weight files.
        shards: Number of weight files.
        tied: Whether embeddings and head share a tensor.
        methods: One outlook per method.
        warnings: What is odd but harmless.
    """

    path: Path
    converted: bool
    family: str
    model_type: str
    num_layers: int
    hidden_size: int
    num_query_heads: int
    num_kv_heads: int
    group_size: int
    head_dim: int
    rope: dict[str, Any]
    max_positions: int | None
    dtype: str
    parameters: int
    weight_bytes: int
    shards: int
    tied: bool
    methods: list[MethodOutlook]
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {**dataclasses.asdict(self), "path": str(self.path)}

    def to_text(self) -> str:
        """Return the report for people."""
        rope = " ".join(f"{key}={value}" for key, value in self.rope.items())
        files = f"{self.shards} weight file{'s' if self.shards > 1 else ''}"

        lines = [
            f"{self.path}: {self.family} ({self.model_type}){', converted' if self.converted else ''}",
            f"  parameters   {self.parameters:,} {self.dtype}, {gigabytes(self.weight_bytes)} in {files}",
            f"  layers       {self.num_layers} of width {self.hidden_size}",
            f"  heads        {self.num_query_heads} query / {self.num_kv_heads} key-value "
            f"(G = {self.group_size}), head dim {self.head_dim}",
            f"  positions    {self.max_positions or 'not stated'}, {rope}",
            f"  embeddings   {'tied' if self.tied else 'untied'}",
        ]

        for outlook in self.methods:
            lines += ["", *_outlook_lines(outlook)]

        return "\n".join(lines)


def inspect_checkpoint(
    model: str | Path, method: str | None = None, contexts: Sequence[int] = CONTEXTS
) -> InspectionReport:
    """Describe a dense or converted checkpoint; reads headers and config only.

    Args:
        model: Folder or ``.gguf`` file.
        method: Look at this method alone; all when left out. Not for a converted model, which has its own.
        contexts: Lengths for the cost tables.

    Raises:
        ConfigError: The method is not known, or the plan of a converted model is wrong.
        UnsupportedModelError: The architecture cannot be converted.
        CheckpointError: The checkpoint is damaged, all problems in one message; or it is converted and a
            method was asked for.
    """
    path = Path(model)

    if method is not None:
        method_class(method)

    converted = not is_gguf(path) and is_converted(path)
    if converted and method is not None:
        raise CheckpointError(
            f"{str(path)!r} is converted already", code="CK35", where=str(path), hint="leave out --method"
        )

    if is_gguf(path):
        checkpoint = open_gguf(path, "float32")
    else:
        checkpoint = open_converted(path) if converted else open_checkpoint(path, allow_extra_tensors=True)

    # One outlook for the plan it has, or one for every method it could get.
    if converted:
        plan = SparseAttentionConfig.from_dict(checkpoint.config["sparse_attention"])
        resolve_plan(plan, checkpoint.num_layers, checkpoint.geometry)
        outlooks = [_outlook("as converted", plan, checkpoint, contexts)]
    else:
        names = [method] if method is not None else list(METHODS)
        outlooks = [
            _outlook(name, SparseAttentionConfig(default=LayerRule(method=name)), checkpoint, contexts)
            for name in names
        ]

    return _describe(checkpoint, path, converted, outlooks)


def _outlook_lines(outlook: MethodOutlook) -> list[str]:
    if outlook.reason is not None:
        return [f"{outlook.method}: not possible: {outlook.reason}"]

    head = f"{outlook.method}: {outlook.new_parameters:,} new parameters"
    if outlook.dense_until is not None:
        head += f"; no sparsity below {outlook.dense_until:,} tokens"
    return [head, *cost_lines(outlook.costs)]


def _outlook(
    name: str, plan: SparseAttentionConfig, checkpoint: Checkpoint, contexts: Sequence[int]
) -> MethodOutlook:
    methods: list[SparseMethod] = []
    reason = None
    try:
        methods = resolve_plan(plan, checkpoint.num_layers, checkpoint.geometry)
    except ConfigError as error:
        reason = error.message

    width = checkpoint.weights.value_bytes()
    return MethodOutlook(
        method=name,
        reason=reason,
        new_parameters=parameter_count(methods),
        dense_until=dense_until(methods),
        costs=context_costs(methods, checkpoint.geometry, width, contexts) if methods else [],
    )


def _describe(
    checkpoint: Checkpoint, path: Path, converted: bool, outlooks: list[MethodOutlook]
) -> InspectionReport:
    geometry = checkpoint.geometry
    config = checkpoint.config

    # Dense weights only: what conversion added is counted by the outlooks.
    kept = [t for name, t in checkpoint.weights.tensors().items() if not SPARSE_TENSOR.match(name)]

    return InspectionReport(
        path=path,
        converted=converted,
        family=checkpoint.family.title,
        model_type=config["model_type"],
        num_layers=checkpoint.num_layers,
        hidden_size=geometry.hidden_size,
        num_query_heads=geometry.num_query_heads,
        num_kv_heads=geometry.num_kv_heads,
        group_size=geometry.group_size,
        head_dim=geometry.head_dim,
        rope=rope_parameters(config),
        max_positions=config.get("max_position_embeddings"),
        dtype=WEIGHT_DTYPES[checkpoint.weights.dtype()],
        parameters=sum(tensor.size for tensor in kept),
        weight_bytes=checkpoint.weight_bytes,
        shards=len(checkpoint.weights.shards),
        tied=bool(config.get("tie_word_embeddings", False)),
        methods=outlooks,
        warnings=list(checkpoint.warnings),
    )
