"""Trainers that know nothing of this package: transformers' Trainer, PEFT and TRL train a converted model."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.data import Dataset

from nsa_convert.evaluation.metrics.mass import MassProbe
from nsa_convert.methods.parts.registry import METHODS
from nsa_convert.patch.patching import patch_model
from nsa_convert.patch.training_pass import TrainingPass
from tests.marks import slow
from tests.models import DSA, MSA, NSA, SSA, VARIANTS, dense_model, plan, tokens

LENGTH = 96
CHOOSERS = {
    "dsa": {**DSA, "index_key": "shared"},
    "msa": {**MSA, "index_key": "shared"},
    "ssa": {**SSA, "key_compressor": "token_mlp"},
    "nsa": {**NSA, "key_compressor": "token_mlp"},
}
"""Plans in which something that chooses has weights."""
TRAINABLE = [
    pytest.param(name, marks=pytest.mark.slow) if "-" in name else name
    for name, settings in VARIANTS.items()
    if METHODS[settings["method"]].spec.trainable
]
"""The options of a method are tested in the slow run."""


class Rows(Dataset):
    """The same random rows in every run, each with its labels."""

    def __init__(self, count: int, length: int = LENGTH) -> None:
        self.rows = tokens(count, length, seed=5)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def start(settings: dict, family: str = "llama", **changes: Any) -> transformers.PreTrainedModel:
    """Return a fresh conversion in float32; an index starts from nothing, as published."""
    model = patch_model(dense_model(family, initializer_range=0.3, **changes).float(), plan(settings))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".index.q" in name or ".index.k" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def trainer(
    model: torch.nn.Module,
    out: Path,
    steps: int,
    rows: Any = None,
    data_collator: Any = None,
    **changes: Any,
) -> transformers.Trainer:
    values = {
        "output_dir": str(out),
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    args = transformers.TrainingArguments(**{**values, **changes})
    rows = Rows(2 * steps) if rows is None else rows
    return transformers.Trainer(model=model, args=args, train_dataset=rows, data_collator=data_collator)


def captured_over_oracle(model: torch.nn.Module, budget: int) -> float:
    """Return captured mass over the best possible at the same budget, mean over layers, on unseen tokens."""
    probe = MassProbe(budget, num_queries=64)
    model.eval()
    with torch.no_grad(), probe.watch():
        for seed in range(90, 94):
            model(tokens(1, LENGTH, seed=seed), use_cache=False)
    return sum(row.captured / row.oracle for row in probe.rows) / len(probe.rows)


@contextlib.contextmanager
def losses_of_passes() -> Iterator[list[tuple[float, float]]]:
    """Collect the loss of every training pass, and the auxiliary part in it; logs are rounded."""
    found, join = [], TrainingPass.join

    def watched(self: TrainingPass, out: Any) -> Any:
        out = join(self, out)
        found.append((out.loss.item(), out.aux_loss.item()))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingPass, "join", watched)
        yield found


@pytest.mark.parametrize("checkpointing", [slow(False), True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize(
    "variant", [pytest.param(n, marks=pytest.mark.slow) if "-" in n else n for n in TRAINABLE]
)
def test_trainer_trains_every_method_in_mixed_precision(
    variant: str, checkpointing: bool, tmp_path: Path
) -> None:
    model = start(VARIANTS[variant])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = trainer(model, tmp_path, 3, bf16=True, gradient_checkpointing=checkpointing)
    run.train()
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))
    learned = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    # An inner map that starts behind a zero one gets its gradient from the second step on.
    assert learned == set(before), set(before) - learned


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CHOOSERS))
def test_trainer_alone_teaches_what_chooses(name: str, tmp_path: Path) -> None:
    """With the base frozen only the auxiliary loss moves the choice; bf16 as TRL and recipes have it."""
    settings = CHOOSERS[name]
    budget = settings["num_tokens"] if name == "dsa" else settings["block_size"] * settings["num_blocks"]
    model = start(settings, num_hidden_layers=2)
    for parameter, p in model.named_parameters():
        p.requires_grad_(".index" in parameter or "compress_key" in parameter)
    first = None if name == "nsa" else captured_over_oracle(model, budget)
    rate = 5e-3
    with losses_of_passes() as passes:
        trainer(model.train(), tmp_path, 300, bf16=True, learning_rate=rate, logging_steps=100).train()
    taught = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is None or p.grad.abs().max() > 0 for p in taught)
    aux = [extra for _, extra in passes]
    assert sum(aux[-30:]) < 0.95 * sum(aux[:30])
    if first is not None:  # NSA's three branches have no single budget to compare with
        assert captured_over_oracle(model, budget) > first + 0.003


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_minimises_what_our_own_trainer_does(accumulation: int, tmp_path: Path) -> None:
    """Step by step the losses of both are within 1e-5 in float32."""
    from nsa_convert.training.recipe.schema import recipe_from_dict
    from nsa_convert.training.run.runner import train_recipe
    from tests.training.recipes import recipe_values, stage

    settings = {"method": "dsa", "num_tokens": 12, "num_sinks": 1, "window_size": 4}
    text = tmp_path / "rows.txt"
    text.write_text("".join(chr(97 + (i * i) % 26) for i in range(4000)))
    steps = stage(
        seq_len=32,
        batch_tokens=64,
        micro_batch=2 // accumulation,
        tokens=64 * 4,
        lr=1e-3,
        lr_new=1e-3,
        weight_decay=0.0,
        warmup=0.0,
        schedule="constant",
        clip=1.0,
        data=[{"kind": "text", "path": str(text)}],
    )
    values = recipe_values(tmp_path / "ours", settings, steps)
    with losses_of_passes() as ours:
        train_recipe(recipe_from_dict(copy.deepcopy(values)), None, base=tmp_path)

    from nsa_convert.training.data.rows import collate
    from nsa_convert.training.run.models import fresh_tokenizer, load_first, read_start
    from nsa_convert.training.run.stages import stage_rows

    recipe = recipe_from_dict({**values, "out": str(tmp_path / "theirs")})
    model = load_first(recipe, read_start(recipe, None))
    found = recipe.stages[0]
    rows = stage_rows(recipe, 0, fresh_tokenizer(recipe, tmp_path), tmp_path)
    run = trainer(
        model,
        tmp_path / "theirs",
        found.steps,
        rows=rows,
        data_collator=collate,
        per_device_train_batch_size=2 // accumulation,
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type="constant",
        adam_beta1=found.betas[0],
        adam_beta2=found.betas[1],
        max_grad_norm=found.clip,
        remove_unused_columns=False,
        seed=recipe.seed,
        accelerator_config={"dispatch_batches": False},
    )
    with losses_of_passes() as theirs:
        run.train()
    assert len(ours) == len(theirs) == 4 * accumulation
    for our, their in zip(ours, theirs, strict=True):
        assert our == pytest.approx(their, abs=1e-5)
        assert their[1] > 0


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["dsa"], id="dsa", marks=pytest.mark.slow),
        pytest.param([n for n in VARIANTS if n != "dsa"], id="all", marks=pytest.mark.slow),
    ],
)
def test_two_processes_and_checkpointing_are_one(names: list[str], tmp_path: Path) -> None:
    """Data parallel with gradient checkpointing: every new weight has its gradient in every process."""
    from safetensors.torch import load_file

    from tests.training.processes import launch

    names = [name for name in names if METHODS[VARIANTS[name]["method"]].spec.trainable]
    for count in (1, 2):
        launch(["-m", "tests.training.ddp_worker", str(tmp_path), *names], count, timeout=1500)
    worst = {}
    for name in names:
        alone, shared = (load_file(tmp_path / f"{name}.{kind}.safetensors") for kind in ("alone", "shared"))
        assert alone.keys() == shared.keys()
        worst[name] = max((shared[key] - alone[key]).abs().max().item() for key in alone)
    assert {name: size for name, size in worst.items() if not size < 1e-5} == {}
