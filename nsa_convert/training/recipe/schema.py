"""Recipes as data: which model, which method, which stages; read strictly, all problems at once."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from nsa_convert.config import SparseAttentionConfig
from nsa_convert.errors import ConfigError
from nsa_convert.redaction import secret_places
from nsa_convert.settings import raise_problems, read_settings
from nsa_convert.training.recipe.bases import read_recipe_values
from nsa_convert.training.recipe.sections import (
    GENERATED,
    MOST_LANES,
    FreshModel,
    Lora,
    Machine,
    RopeScaling,
    Source,
)

SCHEMA = 1
"""Version of the recipe format; a newer one is refused."""
UNBOUND_KEYS = (
    "out",
    "schema",
    "report_to",
    "measure",
    "fsdp",
    "tensor",
    "context",
    "alarms",
    "save_dtype",
    "profile",
    "workers",
    "machine",
    "control",
)
UNBOUND_STAGE_KEYS = (
    "save_every",
    "log_every",
    "keep",
    "checkpointing",
    "micro_batch",
    "eval_every",
    "eval_rows",
)
"""Keys that decide no number of a run, so that a resume may change them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a recipe.

    Attributes:
        name: Names the stage in folders, logs and ``--set stages.NAME.key=value``.
        kind: ``align`` (the new weights against dense attention, layer by layer), ``pretrain`` (next token),
            ``extend`` (the same on longer sequences) or ``sft`` (chats, TRL).
        train: ``new`` (weights that conversion added), ``attention`` (all of the attention layers), ``all``,
            or ``lora`` (adapters, and the new weights whole).
        seq_len: Tokens in a row.
        tokens: Budget of the stage.
        batch_tokens: Tokens of one optimizer step, over all processes.
        micro_batch: Rows of one forward pass on one device; 0 for the most that fit its memory with 10 % to
            spare, by the estimate of ``--dry-run``.
        data: The mixture.
        lanes: Most lanes that deal the documents among them, which processes and their workers share. Each
            holds what it reads, of a streamed Parquet data set a whole row group.
        lr: Learning rate of the dense weights (of the adapters with ``lora``).
        lr_new: Learning rate of the new weights; ``lr`` when left out.
        lr_gate: Learning rate of the matrices of gates; when left out ``lr_new`` times 64 / hidden size, at
            most ``lr_new``: a gate sums over the hidden width, and moves by the more at one rate, the wider
            that is.
        schedule: Form of the decay after the warm-up.
        warmup: Share of the steps.
        min_lr: Learning rate at the end, as a share of the peak.
        weight_decay: On matrices of dense weights; new weights and vectors have none.
        betas: Of AdamW.
        clip: Largest norm of the gradient; 0 for no limit.
        cross_entropy: Weight of the next-token loss; 1, or 0 in ``align``.
        losses: Weight of each auxiliary loss of the method, by name; the method's own when left out.
        teacher_kl: Weight of the KL from the logits of dense attention over the same weights, which a second
            forward pass computes; in sparse steps.
        full_ratio: Share of the steps whose residual stream carries dense attention; 0.5 where the method
            trains both ways (SSA), else 0. MoBA's published schedule is a last stage with 1.
        rope: RoPE scaling set at the start of the stage.
        lora: Adapters; used with ``train: lora``.
        checkpointing: Recompute activations in the backward pass.
        save_every: Steps between checkpoints; 0 for none but the last.
        eval_every: Steps between evaluations on held-out documents and needles, besides those at the start
            and at the end; 0 for none. Every evaluation is also a line of ``log.jsonl``.
        eval_rows: Held-out rows of an evaluation, over all processes.
        keep_best: Figure by which the best evaluated weights become the stage's model; the last ones do when
            left out.
        patience: Evaluations in a row without a better ``keep_best`` after which the stage ends; 0 for none.
        log_every: Steps between progress lines.
        keep: Checkpoints kept.
    """

    name: str
    kind: Literal["align", "pretrain", "extend", "sft"]
    train: Literal["new", "attention", "all", "lora"]
    seq_len: int
    tokens: int
    batch_tokens: int
    data: tuple[Source, ...]
    micro_batch: int = 1
    lanes: int = MOST_LANES
    lr: float = 1e-5
    lr_new: float | None = None
    lr_gate: float | None = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.02
    min_lr: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, ...] = (0.9, 0.95)
    clip: float = 1.0
    cross_entropy: float | None = None
    losses: Mapping[str, float] | None = None
    teacher_kl: float = 0.0
    full_ratio: float | None = None
    rope: RopeScaling | None = None
    lora: Lora | None = None
    checkpointing: bool = False
    save_every: int = 0
    eval_every: int = 0
    eval_rows: int = 16
    keep_best: Literal["loss", "kl", "needles"] | None = None
    patience: int = 0
    log_every: int = 10
    keep: int = 2

    def __post_init__(self) -> None:
        raise_problems([*self._size_problems(), *self._rate_problems(), *self._kind_problems()], code="RC08")

    def _size_problems(self) -> list[str]:
        problems = []
        least_of = {"seq_len": 2, "micro_batch": 0}
        for key in ("seq_len", "tokens", "batch_tokens", "micro_batch", "lanes", "log_every", "keep"):
            least = least_of.get(key, 1)
            if getattr(self, key) < least:
                problems.append(f"{key} must be >= {least}, got {getattr(self, key)}")

        # Whole rows make a step, and whole steps the budget.
        if not problems:
            rows = self.seq_len * (self.micro_batch or 1)
            if self.batch_tokens % rows:
                problems.append(
                    f"batch_tokens {self.batch_tokens} is not a multiple of micro_batch * seq_len = {rows}"
                )
            if self.tokens < self.batch_tokens:
                problems.append(
                    f"a budget of {self.tokens} tokens is below one step of {self.batch_tokens} tokens"
                )

        if self.save_every < 0:
            problems.append(f"save_every must be >= 0, got {self.save_every}")
        if not self.data:
            problems.append("data is empty")
        return problems

    def _rate_problems(self) -> list[str]:
        problems = []
        for key in ("lr", "lr_new", "lr_gate"):
            value = getattr(self, key)
            if value is not None and not (value > 0 and math.isfinite(value)):
                problems.append(f"{key} must be a positive number, got {value}")
        for key in ("warmup", "min_lr", "full_ratio"):
            value = getattr(self, key)
            if value is not None and not 0 <= value <= 1:
                problems.append(f"{key} must be between 0 and 1, got {value}")

        # The optimizer.
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            problems.append(f"betas must be two numbers from 0 and below 1, got {list(self.betas)}")
        if self.weight_decay < 0 or self.clip < 0:
            problems.append(f"weight_decay and clip must be >= 0, got {self.weight_decay} and {self.clip}")

        # Losses.
        weights = {"cross_entropy": self.cross_entropy or 0.0, "teacher_kl": self.teacher_kl}
        weights |= self.losses or {}
        problems += [
            f"the weight of {name} must be a number from 0, got {weight}"
            for name, weight in weights.items()
            if not (weight >= 0 and math.isfinite(weight))
        ]
        return problems

    def _kind_problems(self) -> list[str]:
        problems = []
        if not self.name or not self.name.replace("-", "").replace("_", "").isalnum():
            problems.append(f"name must be letters, digits, - and _, got {self.name!r}")

        # What the kind of the stage leaves no room for.
        if self.kind == "align" and self.train in ("all", "lora"):
            problems.append(f"kind align trains new or attention, got {self.train}")
        if self.kind == "align" and self.cross_entropy:
            problems.append("kind align has no next-token loss; leave cross_entropy out")
        if self.kind == "align" and self.teacher_kl:
            problems.append("kind align has the dense model in its stream; leave teacher_kl out")
        if self.lora is not None and self.train != "lora":
            problems.append("lora has settings, but train is not lora")
        if self.eval_every < 0 or self.eval_rows < 1 or self.patience < 0:
            problems.append(
                "eval_every and patience must be >= 0 and eval_rows >= 1, got "
                f"{self.eval_every}, {self.patience} and {self.eval_rows}"
            )
        if (self.keep_best or self.patience) and not self.eval_every:
            problems.append("keep_best and patience need evaluations; set eval_every")
        if self.patience and not self.keep_best:
            problems.append("patience needs the figure that has to improve; set keep_best")
        if self.kind == "sft" and self.eval_every:
            problems.append("eval_every reads packed texts, not chats; leave it out of kind sft")
        if self.kind == "sft" and any(source.kind in GENERATED for source in self.data):
            problems.append("kind sft needs chats: data of kind jsonl, parquet or hub")
        if self.kind == "sft" and any(s.streaming or s.min_tokens or s.max_tokens for s in self.data):
            problems.append("kind sft takes no streaming, min_tokens or max_tokens: TRL packs all chats")
        return problems

    @property
    def steps(self) -> int:
        """Optimizer steps; the budget rounded down to whole steps."""
        return self.tokens // self.batch_tokens

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step, over all processes."""
        return self.batch_tokens // self.seq_len

    @property
    def weights(self) -> float:
        """Sum of the weights of the sources."""
        return sum(source.weight for source in self.data)

    @property
    def adapters(self) -> Lora:
        """LoRA settings, given or default."""
        return self.lora or Lora()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A model, a plan of sparse attention, and the stages that train it.

    Attributes:
        model: Folder, Hub id or .gguf file of a dense or converted model, ``demo``, or a fresh model.
        out: Folder for checkpoints, logs and the trained model.
        stages: What is trained, in order.
        sparse_attention: The plan as ``convert`` takes it; None trains the model as it is.
        schema: Version of the recipe format.
        seed: Of weights, data order, and the choice of sparse or dense steps.
        precision: ``fp32``; ``bf16-mixed`` (fp32 weights, bf16 arithmetic); ``bf16`` (bf16 weights, of which
            the optimizer keeps fp32 masters).
        save_dtype: Dtype of the weights of the last stage's model; ``auto`` is that of the checkpoint the run
            starts from. The models of earlier stages keep the dtype that they were trained in.
        revision: Branch, tag or commit of a Hub model.
        report_to: Where curves go beside ``log.jsonl``; ``auto`` is tensorboard where it is installed.
        measure: Let ``--dry-run`` load the model and time two steps of each stage, in one process.
        profile: Optimizer step of each stage that torch.profiler records, as a trace for Perfetto or
            chrome://tracing in the folder of the stage; 0 for none.
        fsdp: Neighbouring processes that share each weight (FSDP2). It divides the processes; with fewer than
            all of them there are several shared copies (HSDP), one for each node for example.
        fsdp_send: Dtype in which FSDP2 sends weights to the other processes; ``bfloat16`` with ``precision:
            bf16-mixed`` alone, halves what is sent and gathered. Gradients are sent in float32.
        tensor: Processes that share the heads and the inner width of every layer: all of them, or 1.
        context: Processes that share the tokens of every row.
        alarms: Whether a diverging loss or shut gates ``stop`` the run, or ``warn``.
        workers: Most processes that read, tokenise and pack rows beside each training process; 0 does it in
            the training process itself. A step of N micro-batches has work for a divisor of N of them.
        machine: What the recipe is meant for; ``--dry-run`` says whether it fits with 10 % to spare.
        control: After the last stage, train the dense model too, in ``out/control``: on the same rows, by the
            stages that train dense weights for the next token. The report compares both on held-out
            documents.
    """

    model: str | FreshModel
    out: str
    stages: tuple[Stage, ...]
    sparse_attention: Mapping[str, Any] | None = None
    schema: int = SCHEMA
    seed: int = 0
    precision: Literal["fp32", "bf16-mixed", "bf16"] = "fp32"
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    revision: str | None = None
    report_to: Literal["auto", "none", "tensorboard", "trackio", "wandb"] = "auto"
    measure: bool = False
    profile: int = 0
    fsdp: int = 1
    fsdp_send: Literal["float32", "bfloat16"] = "float32"
    tensor: int = 1
    context: int = 1
    alarms: Literal["stop", "warn"] = "stop"
    workers: int = 1
    machine: Machine | None = None
    control: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.schema > SCHEMA:
            problems.append(
                f"schema {self.schema} is newer than this version, which reads {SCHEMA}; update nsa-convert"
            )
        elif self.schema < 1:
            problems.append(f"schema {self.schema} is not known; this version reads {SCHEMA}")

        if not self.stages:
            problems.append("stages is empty")
        names = [stage.name for stage in self.stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            problems.append(f"stages share a name: {', '.join(twice)}")

        if self.seed < 0 or self.profile < 0:
            problems.append(f"seed and profile must be >= 0, got {self.seed} and {self.profile}")
        for key in ("fsdp", "tensor", "context"):
            if getattr(self, key) < 1:
                problems.append(f"{key} counts processes, from 1, got {getattr(self, key)}")

        half = self.fsdp_send == "bfloat16"
        if half and (self.precision != "bf16-mixed" or self.fsdp == 1):
            problems.append(
                "fsdp_send bfloat16 goes with precision bf16-mixed and fsdp above 1, got "
                f"{self.precision} and fsdp {self.fsdp}"
            )

        if self.workers < 0:
            problems.append(f"workers must be >= 0, got {self.workers}")

        if self.sparse_attention is not None:
            try:
                SparseAttentionConfig.from_dict(self.sparse_attention)
            except ConfigError as error:
                problems += [own.message for own in error.problems or (error,)]
        raise_problems(problems, code="RC08")

    @property
    def plan(self) -> SparseAttentionConfig | None:
        """The plan of sparse attention."""
        if self.sparse_attention is None:
            return None
        return SparseAttentionConfig.from_dict(self.sparse_attention)

    @property
    def readers(self) -> tuple[Stage, ...]:
        """Stages that share the documents of a source among them."""
        return self.stages

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that :func:`recipe_from_dict` reads."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def fingerprint(self, stage: int) -> str:
        """Return a hash of all that decides the numbers of a stage: what a resumed run must agree with."""
        values = self.to_dict()
        rows = [dict(row) for row in values.pop("stages")[: stage + 1]]
        for key in UNBOUND_KEYS:
            values.pop(key)
        for row in rows:
            for key in UNBOUND_STAGE_KEYS:
                row.pop(key)
        text = json.dumps({**values, "stages": rows}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe file, and what it builds on.

    Args:
        path: YAML file.
        overrides: Dotted key -> value, such as ``stages.align.tokens``; applied before anything is checked.

    Raises:
        ConfigError: A syntax error, or every unknown key, wrong type and impossible value in one message.
    """
    return recipe_from_dict(read_recipe_values(path), overrides, where=path.name)


def recipe_from_dict(
    values: Mapping[str, Any], overrides: Mapping[str, Any] | None = None, where: str = "recipe"
) -> Recipe:
    """Build a recipe from plain values; see :func:`read_recipe`."""
    values = copy.deepcopy(dict(values))
    problems = list[str]()
    if secrets := [*secret_places(values), *secret_places(dict(overrides or {}))]:
        raise ConfigError(
            f"{where}: {', '.join(secrets)} is a secret, which does not belong in a recipe",
            code="RC14",
            where=where,
            hint="remove it, and set HF_TOKEN (or WANDB_API_KEY) in the environment, or `hf auth login`",
        )

    # Overrides come first, so that the recipe is checked as it will run.
    for key, value in (overrides or {}).items():
        _override(values, key.split("."), value, key, problems)

    recipe: Recipe | None = None
    try:
        recipe = read_settings(Recipe, values, where)
    except ConfigError as error:
        problems += [own.message for own in error.problems or (error,)]
    raise_problems(
        [line.removeprefix(f"{where}: ") if len(problems) == 1 else line for line in problems],
        code="RC08",
        hint="docs/reference/recipes.md lists every key; secrets such as HF_TOKEN belong in the environment",
    )
    assert recipe is not None
    return recipe


def _override(values: Any, path: Sequence[str], value: Any, key: str, problems: list[str]) -> None:
    """Set one dotted key; stages are named by their name or their number."""
    # Go down to what holds the last part; sections that the recipe lacks are made.
    for part in path[:-1]:
        if isinstance(values, list):
            names = [row.get("name") if isinstance(row, dict) else None for row in values]
            if part not in names and not (part.isdigit() and int(part) < len(values)):
                problems.append(f"--set {key}: there is no '{part}'")
                return
            values = values[names.index(part) if part in names else int(part)]
        elif isinstance(values, dict):
            if not isinstance(values.get(part), (dict, list)):
                values[part] = {}
            values = values[part]

    if isinstance(values, list) and path[-1].isdigit() and int(path[-1]) < len(values):
        values[int(path[-1])] = value
    elif isinstance(values, dict):
        values[path[-1]] = value
    else:
        problems.append(f"--set {key}: there is no '{path[-1]}'")
