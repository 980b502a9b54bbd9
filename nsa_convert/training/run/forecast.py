"""Forecast of a run by arithmetic: steps, trained weights, memory; and every reason why it cannot run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nsa_convert.checkpoint.staging import gigabytes
from nsa_convert.errors import ConfigError, NsaConvertError
from nsa_convert.loading import load_tokenizer
from nsa_convert.methods.parts.base import SparseMethod
from nsa_convert.methods.parts.mix import leaves_of
from nsa_convert.settings import raise_problems
from nsa_convert.training.data.documents import Order
from nsa_convert.training.data.rows import PackedRows
from nsa_convert.training.data.sources import describe_source, held_out_overlap, open_source
from nsa_convert.training.losses import loss_problems, stage_weights
from nsa_convert.training.recipe.schema import Recipe, Stage
from nsa_convert.training.recipe.sections import Machine, Source
from nsa_convert.training.run.control import CONTROL, control_of, control_problems, dense_start
from nsa_convert.training.run.flops import flops_per_token
from nsa_convert.training.run.held_out import evaluation_problems
from nsa_convert.training.run.lengths import SAMPLE_LANES, Lengths, sample_lengths
from nsa_convert.training.run.models import Start, fresh_tokenizer, is_trained, scaled_rope
from nsa_convert.training.run.needs import (
    ASSUMED_MFU,
    Weights,
    device_memory,
    disk_bytes,
    fit_problem,
    host_bytes,
    step_hours,
    weights_of,
)
from nsa_convert.training.run.parallel import (
    Parallel,
    context_problems,
    method_problems,
    parallel_of,
    sending_problems,
    size_problems,
)
from nsa_convert.training.run.parallel import sharing_problems as sharing_problems
from nsa_convert.training.run.rehearsal import shallow_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageForecast:
    """Forecast of one stage.

    Attributes:
        name: Name of the stage.
        kind: Kind of the stage.
        train: Which weights are trained.
        seq_len: Tokens in a row.
        steps: Optimizer steps.
        tokens: Tokens that will be read.
        trained: Number of weights trained.
        trained_new: Those among them that conversion added.
        losses: Loss -> weight.
        disk: Bytes that the run has on disk at most until the end of the stage.
        host: Bytes of memory that one host with all processes needs to load and save.
        flops: FLOPs of a token, forward and backward.
        memory: Bytes that one device needs at most; None where it was not asked for.
        hours: Estimated hours on the recipe's machine; None where it names none.
        seconds_per_step: Measured seconds, or None.
        lengths: What a sample of the data says of the visible budget; None for a dense model, and for chats.
        warnings: What works but is probably not intended.
        data: The sources, with paths resolved.
    """

    name: str
    kind: str
    train: str
    seq_len: int
    steps: int
    tokens: int
    trained: int
    trained_new: int
    losses: Mapping[str, float]
    disk: int
    host: int
    flops: float
    memory: int | None = None
    hours: float | None = None
    seconds_per_step: float | None = None
    lengths: Lengths | None = None
    warnings: tuple[str, ...] = ()
    data: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeForecast:
    """Forecast of all stages of a recipe.

    Attributes:
        model: What the run starts from.
        out: Folder that it writes to.
        parameters: Number of weights of the model.
        method: Names of the sparse methods, or ``dense``.
        parallel: How the processes share the work.
        stages: One forecast for each stage.
        machine: What the recipe is meant for, or None.
    """

    model: str
    out: str
    parameters: int
    method: str
    parallel: Parallel
    stages: tuple[StageForecast, ...]
    machine: Machine | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings of all stages."""
        return tuple(f"{stage.name}: {line}" for stage in self.stages for line in stage.warnings)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**dataclasses.asdict(self), "warnings": self.warnings}

    def to_text(self) -> str:
        """Return the forecast for people."""
        lines = [f"{self.model} ({self.parameters:,} weights, {self.method}) -> {self.out}"]
        lines.append(f"  {self.parallel.to_text()}")
        if self.machine is not None:
            m = self.machine
            lines.append(
                f"  meant for {m.devices} x {m.memory:g} GB; hours are those of {m.gpu} at MFU {ASSUMED_MFU}"
            )

        for stage in self.stages:
            losses = " + ".join(
                name if weight == 1 else f"{weight:g} {name}" for name, weight in stage.losses.items()
            )

            lines.append(
                f"  {stage.name} ({stage.kind}): {stage.steps:,} steps, {stage.tokens:,} tokens in rows of "
                f"{stage.seq_len:,}"
            )
            lines.append(
                f"    trains {stage.train}: {stage.trained:,} weights, {stage.trained_new:,} of them new; "
                f"minimises {losses}"
            )

            lines.append(f"    reads {', '.join(stage.data)}")
            if stage.lengths is not None:
                lines.append(f"    {stage.lengths.to_text()}")

            # What was not asked for is not said: the memory, and the time.
            parts = [] if stage.memory is None else [f"about {gigabytes(stage.memory)} on one device"]
            parts += [f"{gigabytes(stage.disk)} of disk so far", f"{gigabytes(stage.host)} of host memory"]
            if stage.hours is not None:
                parts.append(f"{stage.hours:.1f} h")
            if stage.seconds_per_step is not None:
                hours = stage.steps * stage.seconds_per_step / 3600
                parts.append(f"measured {stage.seconds_per_step:.2f} s a step, {hours:.2f} h")
            lines.append(f"    {', '.join(parts)}")

        lines += [f"  warning: {line}" for line in self.warnings]
        return "\n".join(lines)


def forecast_recipe(
    recipe: Recipe, start: Start, base: Path, *, parallel: Parallel | None = None, memory: bool = False
) -> RecipeForecast:
    """Check a recipe against its model and data, and return the forecast of the run.

    Args:
        recipe: The recipe.
        start: The model's config.
        base: Folder that relative data paths start from.
        parallel: How the processes will share the work; those of this run when left out.
        memory: Whether to rehearse each stage for the memory it takes, some seconds a stage.

    Raises:
        ConfigError: Every problem of every stage, in one message (RC09).
    """
    methods = start.methods()
    model = empty_model(start)
    shapes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    problems: list[str] = []
    plans = []

    # Sizes that do not fit the number of processes would only cause more messages further on.
    config = dict(start.config)
    parallel = parallel_of(recipe) if parallel is None else parallel
    unfit = [*size_problems(parallel), *sending_problems(recipe)]
    problems += unfit or method_problems(parallel, methods, config)

    for index, stage in enumerate(recipe.stages):
        found = stage_problems(stage, methods, config)
        found += [] if unfit else sharing_problems(parallel, stage)
        found += [] if unfit else evaluation_problems(stage, methods, parallel)

        # Every source is opened: a problem of one must not hide those of the others.
        notes: list[str] = []
        for source in stage.data:
            try:
                notes += source_notes(source, base, chats=stage.kind == "sft")
            except NsaConvertError as error:
                found.append(error.message)

        problems += [f"stage {stage.name}: {line}" for line in found]
        if not found:
            # The next stage starts with the RoPE that this one sets.
            if stage.rope is not None:
                config["rope_parameters"], config["max_position_embeddings"] = scaled_rope(config, stage.rope)

            resolved = _resolve(index, recipe, start, methods, model, parallel)
            if memory:
                resolved = _with_memory(resolved, stage, recipe, start, shapes, parallel)
            data = tuple(f"{s.weight:g} {describe_source(s, base)}" for s in stage.data)
            lengths = stage_lengths(stage, recipe, start, methods, base)
            notes += [] if lengths is None else lengths.warnings
            warnings = (*resolved.warnings, *notes)
            plans.append(dataclasses.replace(resolved, data=data, lengths=lengths, warnings=warnings))

    # The control is a run of its own, after this one.
    if recipe.control:
        found = control_problems(recipe, start)
        problems += found
        if not problems:
            try:
                plans += _control_plans(recipe, start, base, parallel, memory, before=plans[-1].disk)
            except ConfigError as error:
                problems += [f"control: {own.message}" for own in error.problems or (error,)]

    raise_problems(problems, code="RC09", hint="no weight was read; correct the recipe and run again")

    names = sorted({method.spec.name for method in methods})
    return RecipeForecast(
        model=recipe.model if isinstance(recipe.model, str) else f"fresh {recipe.model.family}",
        out=str(Path(recipe.out).resolve()),
        parameters=sum(shapes.values()),
        method=", ".join(names) or "dense",
        parallel=parallel,
        stages=tuple(plans),
        machine=recipe.machine,
    )


def _control_plans(
    recipe: Recipe, start: Start, base: Path, parallel: Parallel, memory: bool, before: int
) -> list[StageForecast]:
    """Return the forecasts of a control's stages; what the run before it has on disk stays there."""
    found = forecast_recipe(control_of(recipe), dense_start(start), base, parallel=parallel, memory=memory)
    return [
        dataclasses.replace(stage, name=f"{CONTROL}/{stage.name}", disk=before + stage.disk)
        for stage in found.stages
    ]


def source_notes(source: Source, base: Path, *, chats: bool) -> list[str]:
    """Open a source and return what a user should know of it.

    Raises:
        NsaConvertError: The source cannot be read.
    """
    documents = open_source(source, base, chats=chats)
    shared, held = held_out_overlap(source, base)
    if not shared:
        return list(documents.notes)
    return [
        *documents.notes,
        f"{shared} of {held} held-out documents of {describe_source(source, base)} are also in the training "
        "part: an evaluation on them says too much",
    ]


def stage_lengths(
    stage: Stage, recipe: Recipe, start: Start, methods: Sequence[SparseMethod], base: Path
) -> Lengths | None:
    """Return what a sample of a stage's data says of the visible budget.

    None for a dense model, for chats, and where rows fit the budget, of which :func:`stage_warnings` tells.
    """
    budget = smallest_budget(methods)
    if budget is None or stage.kind == "sft" or stage.seq_len <= budget:
        return None

    try:
        tokenizer = fresh_tokenizer(recipe, base) if start.folder is None else load_tokenizer(start.folder)
    except NsaConvertError:  # why: the check of the data, which comes next, tells of it
        return None
    order = Order(seed=recipe.seed, stage=stage.name)
    lanes = math.gcd(SAMPLE_LANES, stage.rows_per_step)
    rows = PackedRows(stage.data, tokenizer, stage.seq_len, order, base, lanes)
    return sample_lengths(rows, budget, stage.tokens)


def smallest_budget(methods: Sequence[SparseMethod]) -> int | None:
    """Return the smallest visible budget of the sparse layers; None where no layer hides anything."""
    reaches = [method.reach() for method in methods]
    return min((reach.visible_budget for reach in reaches if reach.decode_keys is not None), default=None)


def stage_problems(stage: Stage, methods: Sequence[SparseMethod], config: Mapping[str, Any]) -> list[str]:
    """Return why a stage cannot run on this model; one sentence for each problem."""
    problems = loss_problems(stage, methods)

    # Rows must fit the positions of the model, after the stage's own RoPE scaling.
    positions = config.get("max_position_embeddings")
    if stage.rope is not None:
        try:
            _, positions = scaled_rope(config, stage.rope)
        except ConfigError as error:
            problems.append(error.message)

    if positions and stage.seq_len > positions:
        problems.append(
            f"seq_len {stage.seq_len} is beyond the model's {positions} positions; shorten it, or set rope"
        )

    # Rows must hold at least one block of every method.
    settings = [leaf.settings for leaf in leaves_of(methods)]
    sizes = {size for s in settings if (size := getattr(s, "block_size", None))}
    if sizes and stage.seq_len < max(sizes):
        problems.append(f"seq_len {stage.seq_len} is below a block of {max(sizes)} tokens; lengthen it")

    # The stage must have something to train.
    new = sum(parameter.numel() for method in methods for parameter in method.parameters())
    if stage.train == "new" and not new:
        what = "the plan adds no weights" if methods else "the model is dense"
        problems.append(f"train is new, but {what}; train attention or all, or leave the stage out")
    if stage.kind == "align" and not methods:
        problems.append("kind align needs a sparse model: the recipe has no sparse_attention")
    return problems


def stage_warnings(stage: Stage, methods: Sequence[SparseMethod]) -> list[str]:
    """Return what works but is probably not intended; one sentence for each."""
    lines = []

    # Rows within the budget of every sparse layer are computed densely.
    budget = smallest_budget(methods)
    if budget is not None and stage.seq_len <= budget:
        lines.append(
            f"rows of {stage.seq_len} tokens fit the visible budget of {budget}: nothing is hidden, "
            "so nothing is learned about selection"
        )

    left = stage.tokens % stage.batch_tokens
    if left:
        lines.append(f"the budget is rounded down by {left} tokens to {stage.steps} whole steps")
    return lines


def empty_model(start: Start) -> Any:
    """Return the model that will be trained, on the meta device; nothing is allocated."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from nsa_convert.patch.models import config_class, model_classes

    values = shallow_config(start.config, start.config["num_hidden_layers"])
    model_type = values.pop("model_type")

    with torch.device("meta"):
        if start.plan is None:
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
        config = config_class(start.family)(**{**values, "sparse_attention": start.plan.to_dict()})
        return model_classes(start.family)["ForCausalLM"](config)


def _resolve(
    index: int,
    recipe: Recipe,
    start: Start,
    methods: Sequence[SparseMethod],
    model: Any,
    parallel: Parallel,
) -> StageForecast:
    """Return the forecast of a stage that has no problems."""
    stage = recipe.stages[index]
    shapes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    sizes = [weight_sizes(one, recipe, start, shapes) for one in recipe.stages[: index + 1]]
    new = sum(size for name, size in shapes.items() if ".self_attn.sparse." in name)

    # The losses as StageLosses weighs them; the alignment stage has no next-token loss of its own.
    default = 0.0 if stage.kind == "align" else 1.0
    cross_entropy = default if stage.cross_entropy is None else stage.cross_entropy
    losses = {"cross_entropy": cross_entropy} if cross_entropy else {}
    losses |= {"teacher_kl": stage.teacher_kl} if stage.teacher_kl else {}

    # What a token costs depends on what is trained.
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, stage.train))
    flops = flops_per_token(model, stage)
    tokens = stage.steps * stage.batch_tokens
    hours = None
    if recipe.machine is not None:
        devices = max(recipe.machine.devices, parallel.processes)
        hours = step_hours(flops, tokens, recipe.machine, devices)

    return StageForecast(
        name=stage.name,
        kind=stage.kind,
        train=stage.train,
        seq_len=stage.seq_len,
        steps=stage.steps,
        tokens=tokens,
        trained=sizes[-1].trained,
        trained_new=new,
        losses={**losses, **stage_weights(stage, methods)},
        disk=disk_bytes(recipe, index, sizes, parallel),
        host=host_bytes(sizes[-1], parallel),
        flops=flops,
        hours=hours,
        warnings=tuple(stage_warnings(stage, methods)),
    )


def weight_sizes(stage: Stage, recipe: Recipe, start: Start, shapes: Mapping[str, int]) -> Weights:
    """Return the sizes of a model of which a stage trains a part.

    Args:
        stage: The stage.
        recipe: Its recipe, for the dtype of the weights.
        start: The model the recipe starts from.
        shapes: Parameter name -> number of elements.
    """
    trained = sum(size for name, size in shapes.items() if is_trained(name, stage.train))
    if stage.train == "lora":
        trained += _adapter_size(stage, start)
    return weights_of(shapes, trained, recipe)


def _with_memory(
    forecast: StageForecast,
    stage: Stage,
    recipe: Recipe,
    start: Start,
    shapes: Mapping[str, int],
    parallel: Parallel,
) -> StageForecast:
    """Return a forecast with the memory of a device, and a warning where the recipe's machine has less."""
    memory = device_memory(recipe, stage, start, weight_sizes(stage, recipe, start, shapes), parallel)
    warnings = list(forecast.warnings)
    if recipe.machine is not None:
        can_share = not context_problems(start.methods())
        problem = fit_problem(memory, stage, recipe.machine, parallel, can_share)
        warnings += [] if problem is None else [problem]
    return dataclasses.replace(forecast, memory=memory, warnings=tuple(warnings))


def _adapter_size(stage: Stage, start: Start) -> int:
    """Return the number of LoRA weights: rank x (inputs + outputs) of each adapted linear layer."""
    g, config = start.geometry, start.config
    q = g.num_query_heads * g.head_dim
    kv = g.num_kv_heads * g.head_dim
    inner = config["intermediate_size"]

    # Inputs + outputs of each linear layer of a decoder layer.
    sizes = {
        "q_proj": g.hidden_size + q,
        "k_proj": g.hidden_size + kv,
        "v_proj": g.hidden_size + kv,
        "o_proj": q + g.hidden_size,
        "gate_proj": g.hidden_size + inner,
        "up_proj": g.hidden_size + inner,
        "down_proj": inner + g.hidden_size,
    }

    lora = stage.adapters
    return config["num_hidden_layers"] * lora.rank * sum(sizes.get(name, 0) for name in lora.targets)
