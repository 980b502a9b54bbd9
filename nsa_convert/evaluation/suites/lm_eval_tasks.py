"""Tasks of the lm-eval harness, with sparse and with dense attention.

Importing this module and calling :func:`register_adapter` gives lm-eval the model ``nsa-convert``; the suite
``tasks`` does so itself. lm-eval is an optional extra and is imported only when it is needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nsa_convert.config import SparseAttentionConfig
from nsa_convert.errors import CheckFailedError, CheckpointError, ConfigError, MachineError
from nsa_convert.evaluation.models import (
    Dtype,
    ModelFacts,
    dense_attention_in,
    load_model,
    read_both_facts,
    read_model_facts,
)
from nsa_convert.evaluation.report.html import require_html
from nsa_convert.evaluation.report.identity import choose_device
from nsa_convert.evaluation.report.suite_report import SuiteReport, envelope, finish
from nsa_convert.evaluation.report.verdict import wilson
from nsa_convert.evaluation.suites.quick_settings import Device, read_suite_settings
from nsa_convert.extras import pip_line
from nsa_convert.loading import load_tokenizer
from nsa_convert.notices import Say, silent

NAME = "nsa-convert"
RUNS_FOREIGN_CODE = re.compile(r"ruler|niah_|longcxt")
"""For these tasks lm-eval loads the tokenizer with ``trust_remote_code=True``, whatever the user chose."""

SHARES = {"acc", "acc_norm", "exact_match", "em"}
"""Metrics that are shares of right answers, so that an interval follows from the number of samples."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """Settings of the suite ``tasks`` (``--set key=value``).

    Attributes:
        tasks: Names of lm-eval tasks.
        include_path: Folder with YAML files of own tasks; then lm-eval's own index, which takes a while to
            read, is left out.
        limit: Samples per task; all when left out.
        num_fewshot: Examples in the prompt; as the task says when left out.
        batch_size: Prompts at a time.
        max_length: Longest prompt; the model's positions when left out.
        dtype: Of weights and activations.
        device: ``"auto"`` takes CUDA when there is one.
        seed: Of everything lm-eval draws.
    """

    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 1
    max_length: int | None = None
    dtype: Dtype = "float32"
    device: Device = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError("the suite needs tasks", code="RC10", hint="--set tasks=arc_easy,hellaswag")
        if foreign := [name for name in self.tasks if RUNS_FOREIGN_CODE.search(name)]:
            raise ConfigError(
                f"lm-eval runs code of the model's repository for {', '.join(foreign)}",
                code="EV11",
                hint="--suite long has these tasks and runs no code of the model",
            )

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> TaskSettings:
        """Return checked settings.

        Raises:
            ConfigError: Unknown keys, no tasks, or tasks that would run foreign code (EV11).
        """
        return read_suite_settings(cls, values)


@functools.cache
def register_adapter() -> type:
    """Register the model ``nsa-convert`` with lm-eval and return its class.

    It loads a converted folder with this package's own classes and never runs code of the folder. Its
    argument ``attention`` is ``"sparse"`` or ``"dense"`` (the same weights).

    Raises:
        MachineError: lm-eval is not installed.
    """
    try:
        from lm_eval.api.registry import register_model
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise MachineError("these tasks need lm-eval", code="CL11", hint=pip_line("lm-eval")) from error

    @register_model(NAME)
    class NsaConvertLM(HFLM):
        """A converted (or dense) checkpoint in lm-eval."""

        def __init__(
            self,
            pretrained: str,
            attention: str = "sparse",
            dtype: str = "float32",
            device: str = "cpu",
            batch_size: int = 1,
            max_length: int | None = None,
            plan: SparseAttentionConfig | None = None,
            **ignored: Any,
        ) -> None:
            # Dense attention has to last as long as this object.
            self.held = contextlib.ExitStack()
            facts = read_model_facts(pretrained, plan)
            require_one_pass(facts)
            model = load_model(pretrained, dtype, device, plan)
            if attention == "dense" and facts.methods:
                self.held.enter_context(dense_attention_in(model))

            tokenizer = load_tokenizer(pretrained)
            if tokenizer.eos_token_id is None:
                raise CheckpointError("lm-eval needs a tokenizer with an end token", code="TK01")

            sizes = {"batch_size": batch_size, "max_length": max_length}
            super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", **sizes)
            model.register_forward_hook(refuse_broken_logits)

    return NsaConvertLM


def require_one_pass(facts: ModelFacts) -> None:
    """Raise ConfigError unless texts may be scored in one pass, as lm-eval does."""
    if not facts.one_pass:
        raise ConfigError(
            "lm-eval scores texts in one pass, which is no measure of methods whose layers choose keys by "
            f"later tokens or attend otherwise while decoding: {', '.join(dict.fromkeys(facts.methods))}",
            code="EV15",
            hint="take --suite quick or long: they score what follows a prompt",
        )


def refuse_broken_logits(model: nn.Module, args: Any, out: Any) -> None:
    """Forward hook that stops an evaluation with logits that are not finite.

    The harness would count them as wrong answers.

    Raises:
        CheckFailedError: A logit is not finite (EV04).
    """
    if not bool(torch.isfinite(out.logits).all()):
        raise CheckFailedError("the model's logits are not finite in an lm-eval task", code="EV04")


def run_tasks(
    model_path: str | Path,
    *,
    against: str | Path | None = None,
    out_dir: str | Path | None = None,
    say: Say = silent,
    plan: SparseAttentionConfig | None = None,
    **settings: Any,
) -> SuiteReport:
    """Run lm-eval tasks with sparse and with dense attention.

    Args:
        model_path: Folder of a converted (or dense) checkpoint.
        against: Folder of the dense checkpoint to compare with; the same weights when left out.
        out_dir: Folder for the report; None writes nothing.
        say: Called with one line before something slow.
        plan: Sparse plan with which the dense checkpoint at ``model_path`` is converted in memory.
        **settings: Fields of :class:`TaskSettings`.

    Returns:
        A report whose ``benchmarks`` hold a row for each task and metric.

    Raises:
        ConfigError: A bad setting, a task lm-eval does not know (EV14), or a method that cannot be scored in
            one pass (EV15).
        MachineError: lm-eval is not installed.
    """
    begin = time.perf_counter()
    chosen = TaskSettings.read(settings)
    if out_dir is not None:
        require_html()

    models = read_both_facts(model_path, plan, against)
    require_one_pass(models[0])
    device = choose_device(chosen.device)
    adapter = register_adapter()

    # One kind of attention after the other, so that only one model is in memory.
    results = {}
    for attention in ("sparse", "dense"):
        facts = models[-1] if attention == "dense" else models[0]
        say(f"{', '.join(chosen.tasks)}, {attention}")
        model = adapter(
            pretrained=str(facts.path),
            attention=attention,
            dtype=chosen.dtype,
            device=device,
            batch_size=chosen.batch_size,
            max_length=chosen.max_length,
            plan=facts.plan,
        )
        results[attention] = _evaluate(model, chosen)
        del model

    files = {"include_path": chosen.include_path}
    values = envelope("tasks", models, given=settings, chosen=chosen, files=files, device=device, begin=begin)
    values |= {
        "benchmarks": benchmark_rows(results),
        "warnings": [f"only {chosen.limit} samples per task"] if chosen.limit else [],
        "environment": {**values["environment"], "lm_eval": _version()},
    }
    return finish(values, out_dir, say)


def benchmark_rows(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per task and metric.

    Args:
        results: Attention -> what lm-eval returned.

    Returns:
        Rows ``task, metric, n, dense, sparse, low, high``; the last two are the 95 % interval of ``sparse``,
        where the metric is a share, else None.
    """
    rows = []
    for task, metrics in results["sparse"]["results"].items():
        for metric, value in metrics.items():
            # lm-eval's keys are `name,filter`; others hold the task's alias and standard errors.
            name, _, part = metric.partition(",")
            if not part or name.endswith("_stderr") or not isinstance(value, (int, float)):
                continue

            # A Wilson interval needs the number of right answers.
            count = results["sparse"].get("n-samples", {}).get(task, {}).get("effective")
            low, high = wilson(value * count, count) if name in SHARES and count else (None, None)
            dense = results["dense"]["results"][task].get(metric)
            row = {"task": task, "metric": name, "n": count, "dense": dense, "sparse": value}
            rows.append({**row, "low": low, "high": high})
    return rows


def _evaluate(model: Any, chosen: TaskSettings) -> Mapping[str, Any]:
    """Run the tasks with lm-eval and return its results; ConfigError (EV14) names unknown tasks."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=chosen.include_path, include_defaults=chosen.include_path is None)
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    known = set(manager.all_tasks)

    if unknown := [name for name in chosen.tasks if name not in known]:
        raise ConfigError(
            f"lm-eval does not know the task {', '.join(unknown)}",
            code="EV14",
            found=", ".join(unknown),
            hint="`lm-eval ls tasks` lists them; --set include_path=FOLDER adds your own",
        )

    return simple_evaluate(
        model=model,
        tasks=list(chosen.tasks),
        task_manager=manager,
        limit=chosen.limit,
        num_fewshot=chosen.num_fewshot,
        log_samples=False,
        bootstrap_iters=0,
        **dict.fromkeys(seeds, chosen.seed),
    )


def _version() -> str:
    """Return the version of lm-eval."""
    from importlib.metadata import version

    return version("lm_eval")
