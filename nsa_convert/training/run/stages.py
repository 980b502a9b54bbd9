"""Put a stage together: its model, its trainer and the arguments of both."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nsa_convert.checkpoint.staging import staged
from nsa_convert.errors import ConfigError, MachineError
from nsa_convert.loading import load_causal_model, load_tokenizer, quiet
from nsa_convert.notices import Say
from nsa_convert.training.data.documents import Order
from nsa_convert.training.data.rows import PackedRows, check_enough, collate
from nsa_convert.training.losses import mix, stage_losses
from nsa_convert.training.recipe.schema import Recipe, Stage
from nsa_convert.training.run.distributed import load_sharded
from nsa_convert.training.run.flops import flops_per_token, peak_flops
from nsa_convert.training.run.held_out import largest_budget, open_held_out
from nsa_convert.training.run.models import (
    DTYPES,
    Start,
    fresh_tokenizer,
    load_first,
    methods_of,
    prepare_model,
    set_rope,
)
from nsa_convert.training.run.parallel import Parallel, parallel_of
from nsa_convert.training.run.trainer import StageTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL = "model"
"""Folder of a stage's trained model."""
START = "start"
"""Folder of the first model, where its weights have to be sharded."""


def stage_folder(recipe: Recipe, index: int) -> Path:
    """Return the folder of a stage."""
    return Path(recipe.out) / recipe.stages[index].name


def stage_tokenizer(recipe: Recipe, index: int, start: Start, base: Path) -> Any:
    """Return the tokenizer of a stage.

    The first stage takes that of the start model, or trains one for a fresh model; every later stage takes
    the one that the stage before it saved.
    """
    if index > 0:
        return load_tokenizer(stage_folder(recipe, index - 1) / MODEL)
    return fresh_tokenizer(recipe, base) if start.folder is None else load_tokenizer(start.folder)


def check_data(recipe: Recipe, start: Start, base: Path) -> None:
    """Check the tokenizer and the data against the model, before any weight is read.

    Raises:
        ConfigError: The tokenizer knows tokens that the model has no row for (DA09), or a stage has less data
            than one step takes (DA06).
    """
    tokenizer = stage_tokenizer(recipe, 0, start, base)
    # The largest token id must have a row in the embedding matrix.
    last = max(tokenizer.get_vocab().values())
    rows = start.config["vocab_size"]
    if last >= rows:
        raise ConfigError(
            f"the tokenizer has token {last}, the model has embeddings for 0 to {rows - 1}",
            code="DA09",
            hint="use the model's own tokenizer",
        )

    # Each source of a stage must hold its share of at least one optimizer step.
    for stage in recipe.stages:
        check_enough(stage.data, tokenizer, stage.batch_tokens, base, chats=stage.kind == "sft")


def write_start(recipe: Recipe, start: Start) -> Path:
    """Write the first model as a folder and return it; the main process writes, the others wait.

    Weights are sharded while they are loaded from disk, so a model made in memory has to be written first.
    """
    folder = Path(recipe.out) / START
    if int(os.environ.get("RANK", "0")) == 0 and not folder.is_dir():
        with staged(folder) as place, quiet():
            # why: the first model of a sharded run, inside a staging folder
            load_first(recipe, start).save_pretrained(place)

    torch.distributed.barrier()
    return folder


def load_base(
    recipe: Recipe, index: int, start: Start, parallel: Parallel, checkpoint: Path | None = None
) -> PreTrainedModel:
    """Return the model a stage begins with, sharded over the processes, with the RoPE of the stage.

    Args:
        recipe: The recipe.
        index: Number of the stage.
        start: The first model.
        parallel: How the processes share its weights.
        checkpoint: Folder to load a sharded model from instead of the folder of the stage before.
    """
    stage = recipe.stages[index]
    dtype = DTYPES[recipe.precision]
    written = stage_folder(recipe, index - 1) / MODEL if index else Path(recipe.out) / START

    # A sharded model can only be loaded from a folder; the first one may have to be written before.
    if parallel.sharded:
        folder = checkpoint or (written if index else write_start(recipe, start))
        model = load_sharded(folder, dtype, parallel, half=recipe.fsdp_send == "bfloat16")
    elif written.is_dir():
        model = load_causal_model(written, dtype)
    else:
        model = load_first(recipe, start)

    if stage.rope is not None:
        set_rope(model, stage.rope)
    return model


def load_stage_model(
    recipe: Recipe, index: int, start: Start, checkpoint: Path | None = None
) -> PreTrainedModel:
    """Return the model a stage begins with, its trained weights unfrozen, adapters added.

    Args:
        recipe: The recipe.
        index: Number of the stage.
        start: The first model.
        checkpoint: Checkpoint to resume from; read here only for a sharded model, the Trainer loads others.
    """
    stage = recipe.stages[index]
    parallel = parallel_of(recipe)
    # Adapters of a checkpoint are loaded below, into a model with its first weights.
    adapts = stage.train == "lora"
    model = load_base(recipe, index, start, parallel, None if adapts else checkpoint)

    # Adapters start from the same random numbers in every process and after every resume.
    if adapts:
        torch.manual_seed(mix(recipe.seed, stage.name, "adapters"))
    model = prepare_model(model, stage)

    if adapts and parallel.sharded and checkpoint is not None:
        from nsa_convert.training.run.lora import load_adapters

        load_adapters(model, checkpoint)
    return model


def make_trainer(
    recipe: Recipe,
    index: int,
    model: nn.Module,
    tokenizer: Any,
    base: Path,
    facts: dict[str, Any],
    say: Say,
    lost: frozenset[str] = frozenset(),
) -> StageTrainer:
    """Return the trainer of a stage.

    Args:
        recipe: The recipe.
        index: Number of the stage.
        model: Its model, as from :func:`load_stage_model`.
        tokenizer: Its tokenizer.
        base: Folder that relative data paths start from.
        facts: What a resumed run must agree with.
        say: Called with progress lines.
        lost: State files of the checkpoint that are missing or damaged and are not loaded.
    """
    stage = recipe.stages[index]
    methods = methods_of(model)
    losses = stage_losses(stage, methods, recipe.seed, index)
    args = training_arguments(recipe, index)

    # What both trainers take: that on packed rows and that on TRL's chats.
    common = {
        "stage": stage,
        "parallel": parallel_of(recipe),
        "losses": losses,
        "sparse": bool(methods),
        "facts": facts,
        "say": say,
        "log_file": Path(recipe.out) / "log.jsonl",
        "alarms": recipe.alarms,
        "lost": lost,
        "model": model,
        "args": args,
        "flops_per_token": flops_per_token(model, stage),
        "peak_flops": peak_flops(),
    }

    if stage.kind == "sft":
        from nsa_convert.training.run.sft_trainer import make_sft_trainer

        return make_sft_trainer(common, tokenizer, stage, base)

    if stage.eval_every:
        common["open_held_out"] = partial(open_held_out, stage, tokenizer, base, largest_budget(methods))

    rows = stage_rows(recipe, index, tokenizer, base)
    return StageTrainer(**common, train_dataset=rows, data_collator=collate, workers=recipe.workers)


def stage_rows(recipe: Recipe, index: int, tokenizer: Any, base: Path) -> PackedRows:
    """Return the rows of a stage."""
    stage = recipe.stages[index]
    order = data_order(recipe, index)
    return PackedRows(stage.data, tokenizer, stage.seq_len, order, base, stage.rows_per_step, stage.lanes)


def data_order(recipe: Recipe, index: int) -> Order:
    """Return the order in which a stage reads its documents.

    The stages that read one source share it: the last one begins at the start of its shuffle, the one before
    where the last one will end if every stage takes its share of the tokens, and so on. So two stages read
    the same document only where a source has less text than they take together, and a control run that skips
    a stage before the last one reads the same rows in it as the run it is compared with.
    """
    stage = recipe.stages[index]

    def tokens(name: str, stages: Sequence[Stage]) -> float:
        """Return the tokens that stages take of a source."""
        shares = ((one, source.weight / one.weights, source.name) for one in stages for source in one.data)
        return sum(one.tokens * share for one, share, other in shares if other == name)

    place = [one.name for one in recipe.readers].index(stage.name)
    later = recipe.readers[place + 1 :]
    names = [source.name for source in stage.data]
    starts = tuple(tokens(name, later) / tokens(name, recipe.readers) for name in names)
    return Order(seed=recipe.seed, stage=stage.name, starts=starts)


def argument_values(recipe: Recipe, index: int) -> dict[str, Any]:
    """Return the arguments of transformers' Trainer for a stage."""
    stage = recipe.stages[index]
    return {
        "output_dir": str(stage_folder(recipe, index)),
        "max_steps": stage.steps,
        "per_device_train_batch_size": stage.micro_batch,
        "gradient_accumulation_steps": stage.rows_per_step // (stage.micro_batch * parallel_of(recipe).data),
        "learning_rate": stage.lr,
        # 0 turns gradient clipping off in transformers.
        "max_grad_norm": stage.clip,
        "logging_steps": stage.log_every,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if stage.save_every else "no",
        "save_steps": stage.save_every or stage.steps,
        "bf16": recipe.precision != "fp32",
        "seed": recipe.seed,
        "report_to": _reporters(recipe.report_to),
        "remove_unused_columns": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ignore_data_skip": True,
        "disable_tqdm": True,
        "accelerator_config": {"dispatch_batches": False, "split_batches": False},
        "use_cpu": not torch.cuda.is_available(),
    }


def training_arguments(recipe: Recipe, index: int) -> Any:
    """Return transformers' TrainingArguments for a stage."""
    stage = recipe.stages[index]
    values = argument_values(recipe, index)
    if stage.kind == "sft":
        from nsa_convert.training.run.sft_trainer import sft_arguments

        return sft_arguments(values, stage)
    from transformers import TrainingArguments

    return TrainingArguments(**values)


def _reporters(choice: str) -> list[str]:
    """Return the services the Trainer reports to.

    Raises:
        MachineError: A service asked for by name is not installed (CL11).
    """
    from importlib.util import find_spec

    if choice == "auto":
        return ["tensorboard"] if find_spec("tensorboard") else []

    if choice != "none" and not find_spec(choice):
        raise MachineError(
            f"report_to asks for {choice}, which is not installed", code="CL11", hint=f"pip install {choice}"
        )

    return [] if choice == "none" else [choice]


def frozen_hash(model: nn.Module) -> str:
    """Return a SHA-256 hash of the weights that are not trained; of a sharded model, of the local parts."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            # A sharded parameter (DTensor) holds this process's part in `_local_tensor`.
            local = getattr(parameter, "_local_tensor", parameter).detach()
            digest.update(local.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
