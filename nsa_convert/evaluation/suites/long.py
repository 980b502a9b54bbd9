"""The suites ``long`` and ``full``: texts, needles, RULER's offline tasks, recall, time and memory.

A result is one text read with both kinds of attention, or one prompt read with one. Finished results are
kept, so a run that was killed continues where it ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nsa_convert.config import SparseAttentionConfig
from nsa_convert.evaluation.metrics.case_scores import (
    busy_warnings,
    empty_warnings,
    few_repeats,
    needle_rows,
    prompt_rows,
    speed_rows,
)
from nsa_convert.evaluation.metrics.mass import LayerMass, MassProbe
from nsa_convert.evaluation.metrics.perplexity import Readout, read_out
from nsa_convert.evaluation.metrics.text_metrics import text_result
from nsa_convert.evaluation.models import ModelFacts, dense_attention_in, load_model, read_both_facts
from nsa_convert.evaluation.report.html import require_html
from nsa_convert.evaluation.report.identity import choose_device, describe_machine, model_fingerprint
from nsa_convert.evaluation.report.result import after_prompt_warnings
from nsa_convert.evaluation.report.suite_report import SuiteReport, envelope, finish
from nsa_convert.evaluation.suites.finished_cells import CellStore
from nsa_convert.evaluation.suites.long_settings import RECALL, LongSettings
from nsa_convert.evaluation.suites.preflight import SuiteInputs, check_positions, prepare_inputs
from nsa_convert.evaluation.suites.quick_settings import QuickSettings
from nsa_convert.evaluation.tasks.cases import Case, fit_needle, hash_of
from nsa_convert.evaluation.tasks.qa import build_qa, read_questions
from nsa_convert.evaluation.tasks.recall import build_recall
from nsa_convert.evaluation.tasks.ruler import build_ruler
from nsa_convert.evaluation.tasks.scoring import run_case
from nsa_convert.evaluation.tasks.text import prose_text
from nsa_convert.loading import load_tokenizer
from nsa_convert.notices import Progress, Say, silent

"""Called with the name of a part, the number of results done and of all results of the part."""

ATTENTIONS = ("sparse", "dense")
WARM_UP = 64
"""Tokens of the untimed pass that a model runs after it was loaded."""


def run_long(
    model_path: str | Path,
    *,
    suite: str = "long",
    against: str | Path | None = None,
    text_file: str | Path | None = None,
    out_dir: str | Path | None = None,
    length: int | None = None,
    say: Say = silent,
    progress: Progress = silent,
    plan: SparseAttentionConfig | None = None,
    **settings: Any,
) -> SuiteReport:
    """Run the long or the full suite.

    Args:
        model_path: Folder of a converted (or dense) checkpoint.
        suite: ``"long"`` or ``"full"``; they differ in their defaults.
        against: Folder of the dense checkpoint to compare with; the same weights when left out.
        text_file: UTF-8 text; by default Python sources and the language reference.
        out_dir: Folder for the report, tables, plots and finished results; None writes nothing.
        length: Tokens per text; four visible budgets when left out.
        say: Called with one line before something slow.
        progress: Called after every result.
        plan: Sparse plan with which the dense checkpoint at ``model_path`` is converted in memory.
        **settings: Fields of :class:`LongSettings`.

    Raises:
        ConfigError: A bad setting, a length beyond the model's positions, a prompt that does not fit, a text
            that is too short, or a dense model with other tokens.
        CheckpointError: A folder holds no model or no tokenizer.
        CheckFailedError: A model's logits are not finite.
        MachineError: ``out_dir`` was given and matplotlib or jinja2 is missing, or it cannot be written.
    """
    begin = time.perf_counter()
    if out_dir is not None:
        require_html()
    models = read_both_facts(model_path, plan, against)
    chosen = LongSettings.read(settings, suite, models[0])

    asked = {"lengths": chosen.lengths, "task_lengths": chosen.task_lengths}
    asked["length"] = (length,) if isinstance(length, int) else ()
    warnings = check_positions(models, asked, chosen.beyond_positions)

    device = choose_device(chosen.device)
    run = _Run(models, chosen, device, say, progress)
    run.say("building the prompts")
    inputs = _inputs(models, chosen, text_file, length)
    cases = build_cases(run.tokenizer, chosen)
    store = CellStore(None if out_dir is None else Path(out_dir), run.facts(inputs))

    texts = run.texts(store, inputs)
    outcomes = run.cases(store, cases)
    speed = speed_rows(outcomes) if chosen.times else []

    warnings += [*inputs.warnings, *after_prompt_warnings(not models[0].one_pass)]
    warnings += empty_warnings(outcomes)
    warnings += few_repeats(speed) + busy_warnings() if speed else []

    files = {"text_file": text_file, "qa_file": chosen.qa_file}
    values = envelope(
        suite, models, given={"length": length, **settings}, chosen=chosen, files=files, device=device,
        begin=begin,
    )  # fmt: skip
    values |= {
        "texts": texts,
        "needles": needle_rows(outcomes),
        "tasks": prompt_rows(outcomes),
        "speed": speed,
        "prompts_sha256": hash_of(cases),
        "cells": {"total": len(store.values), "reused": store.reused},
        "warnings": warnings,
        "settings": {"length": length, **values["settings"]},
    }
    return finish(values, out_dir, run.say)


def build_cases(tokenizer: Any, chosen: LongSettings) -> list[Case]:
    """Return every prompt of a run: the needle grid, then the tasks.

    Raises:
        ConfigError: A prompt does not fit into its length (EV02).
    """
    # The needle grid.
    haystack = prose_text().text if chosen.haystack == "prose" else None
    cases = [
        fit_needle(tokenizer, length, depth, haystack=haystack, seed=chosen.seed)
        for length in chosen.lengths
        for depth in chosen.depths
    ]

    # The tasks, by length; questions of a file are a task of their own.
    questions = [] if chosen.qa_file is None else read_questions(chosen.qa_file)
    for length in chosen.task_lengths:
        for index in range(chosen.samples if questions else 0):
            cases.append(build_qa(tokenizer, questions, length, index, chosen.seed))
        for task in chosen.tasks:
            for index in range(chosen.samples):
                if task == RECALL:
                    cases.append(build_recall(tokenizer, length, index, chosen.seed))
                else:
                    cases.append(build_ruler(tokenizer, task, length, index, chosen.seed))

    return cases


class _Run:
    """The models of one evaluation; at most one checkpoint is in memory at a time."""

    def __init__(
        self,
        models: list[ModelFacts],
        chosen: LongSettings,
        device: str,
        say: Say,
        progress: Progress,
    ) -> None:
        self.models = models
        self.chosen = chosen
        self.device = device
        self.say = say
        self.progress = progress
        self.tokenizer = load_tokenizer(models[0].path)
        self.loaded: tuple[ModelFacts, nn.Module] | None = None

    def facts(self, inputs: SuiteInputs) -> dict[str, Any]:
        """Return everything that the results depend on."""
        names = ("dtype", "num_queries", "seed", "haystack")
        machine = describe_machine(self.device)
        return {
            "models": [model_fingerprint(model) for model in self.models],
            "settings": {name: getattr(self.chosen, name) for name in names},
            "texts": [text.sha256 for text, _ in inputs.texts],
            "machine": {key: value for key, value in machine.items() if key != "date"},
        }

    @contextlib.contextmanager
    def attention(self, kind: str) -> Iterator[nn.Module]:
        """Load the model of a kind of attention if needed, and give it inside the block.

        Args:
            kind: ``"sparse"`` or ``"dense"``.
        """
        # Loading another checkpoint drops the one before it.
        facts = self.models[-1] if kind == "dense" else self.models[0]
        if self.loaded is None or self.loaded[0] != facts:
            self.loaded = None
            self.say(f"loading {facts.path.resolve().name}")
            self.loaded = (facts, load_model(facts.path, self.chosen.dtype, self.device, facts.plan))
            self._warm_up(facts)

        # Without a dense checkpoint the converted model itself attends densely.
        model = self.loaded[1]
        same_weights = kind == "dense" and len(self.models) == 1 and facts.methods
        with dense_attention_in(model) if same_weights else contextlib.nullcontext():
            yield model

    def _warm_up(self, facts: ModelFacts) -> None:
        """Run one short pass, so that later times do not include one-time costs such as compiling kernels."""
        assert self.loaded is not None
        ids = torch.zeros(
            1, min(WARM_UP, facts.max_positions or WARM_UP), dtype=torch.long, device=self.device
        )
        with torch.inference_mode():
            self.loaded[1](input_ids=ids, use_cache=False, logits_to_keep=1)

    def texts(self, store: CellStore, inputs: SuiteInputs) -> list[dict[str, Any]]:
        """Compare both kinds of attention on every text; each model is loaded once for all of them."""
        names = {text.name: f"text/{text.name}/{len(ids)}" for text, ids in inputs.texts}
        pending = [(text, ids) for text, ids in inputs.texts if names[text.name] not in store.values]
        budget = self.models[0].visible_budget
        read: dict[str, dict[str, tuple[Readout, tuple[LayerMass, ...]]]] = {kind: {} for kind in ATTENTIONS}

        # Read the texts that have no result yet.
        for kind in ATTENTIONS:
            for number, (text, ids) in enumerate(pending, 1):
                with self.attention(kind) as model:
                    probe = MassProbe(budget or 0, self.chosen.num_queries)
                    watch = probe.watch if kind == "sparse" else contextlib.nullcontext
                    readout = read_out(model, ids, self.models[0].prompt_of(len(ids)), watch)
                    read[kind][text.name] = (readout, tuple(probe.rows))
                self.progress(f"texts, {kind}", number, len(pending))

        # Compare the two readings of each text.
        out = []
        for text, ids in inputs.texts:

            def result(text: Any = text, ids: list[int] = ids) -> dict[str, Any]:
                dense, (sparse, layers) = read["dense"][text.name][0], read["sparse"][text.name]
                return text_result(self.models[0], text, ids, dense, sparse, layers).to_dict(budget)

            out.append(store.get(names[text.name], result))
        return out

    def cases(self, store: CellStore, cases: list[Case]) -> list[tuple[Case, str, dict[str, Any]]]:
        """Run every case with both kinds of attention: case by case where they share the weights."""
        pairs = [(case, kind) for case in cases for kind in ATTENTIONS]
        # Two checkpoints: all sparse cases first, then all dense ones, so that each is loaded once.
        if len(self.models) == 2:
            pairs.sort(key=lambda pair: pair[1], reverse=True)

        out = []
        for number, (case, kind) in enumerate(pairs, 1):
            name = f"{kind}/{case.task}/{case.length}/{case.index}/{case.depth}/{hash_of([case])[:12]}"

            def work(case: Case = case, kind: str = kind) -> dict[str, Any]:
                with self.attention(kind) as model:
                    return run_case(model, self.tokenizer, case).to_dict()

            out.append((case, kind, store.get(name, work)))
            self.progress(f"{case.task}, {case.length} tokens, {kind}", number, len(pairs))
        return out


def _inputs(
    models: list[ModelFacts], chosen: LongSettings, text_file: str | Path | None, length: int | None
) -> SuiteInputs:
    """Return the texts of the run; ``beyond_positions`` allows four times the models' positions."""
    if chosen.beyond_positions:
        models = [
            dataclasses.replace(m, max_positions=4 * m.max_positions if m.max_positions else None)
            for m in models
        ]
    return prepare_inputs(models, text_file, length, QuickSettings(seed=chosen.seed))
