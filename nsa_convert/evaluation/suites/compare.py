"""The suite ``compare``: several methods on one dense model, at equal budgets; a killed run can continue.

Every result is one text or one needle read with one plan. All but the last tokens of a text are read as a
prompt, the last ones follow in decoding steps. Both parts are scored where reading in one pass shows what the
method does, else only the steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from nsa_convert.errors import ConfigError
from nsa_convert.evaluation.metrics.density import PairCounter, capture_inputs, search_density
from nsa_convert.evaluation.metrics.divergence import Divergence, compare
from nsa_convert.evaluation.metrics.mass import LayerMass, MassProbe
from nsa_convert.evaluation.metrics.perplexity import Bucket, Readout, read_out
from nsa_convert.evaluation.models import ModelFacts, load_model, patched_in, prompt_tokens, read_model_facts
from nsa_convert.evaluation.report.html import require_html
from nsa_convert.evaluation.report.identity import choose_device, describe_machine, model_fingerprint
from nsa_convert.evaluation.report.suite_report import SuiteReport, envelope, finish
from nsa_convert.evaluation.suites.compare_plans import NamedPlan, Row, make_rows, named_plans
from nsa_convert.evaluation.suites.compare_settings import CompareSettings
from nsa_convert.evaluation.suites.finished_cells import CellStore
from nsa_convert.evaluation.suites.preflight import check_positions, check_texts
from nsa_convert.evaluation.tasks.cases import Case, fit_needle, hash_of
from nsa_convert.evaluation.tasks.scoring import run_case
from nsa_convert.evaluation.tasks.text import EvalText, code_text, file_text, first_tokens, prose_text
from nsa_convert.families import geometry_of
from nsa_convert.heads.profile import density_of
from nsa_convert.loading import load_tokenizer
from nsa_convert.methods.parts.base import AttentionRecord, observe
from nsa_convert.methods.parts.registry import method_class
from nsa_convert.notices import Progress, Say, silent
from nsa_convert.strict_files import read_json_mapping


def run_compare(
    model_path: str | Path,
    *,
    plans: Sequence[NamedPlan] = (),
    text_file: str | Path | None = None,
    out_dir: str | Path | None = None,
    say: Say = silent,
    progress: Progress = silent,
    **settings: Any,
) -> SuiteReport:
    """Compare methods on a dense checkpoint, which is converted in memory.

    Args:
        model_path: Folder of a dense checkpoint.
        plans: Plans to compare besides the methods: mixes of methods, plans of head profiles.
        text_file: UTF-8 text instead of the texts of the settings.
        out_dir: Folder for the report, tables, plots and finished results; None writes nothing.
        say: Called with one line before something slow.
        progress: Called after every result.
        **settings: Fields of :class:`CompareSettings`.

    Raises:
        ConfigError: A bad setting, a budget that a method cannot have, a plan that does not fit the model,
            a length beyond its positions, a text that is too short, or a model that is converted already.
        CheckpointError: The folder holds no model or no tokenizer.
        CheckFailedError: A model's logits are not finite.
        MachineError: ``out_dir`` was given and matplotlib or jinja2 is missing, or it cannot be written.
    """
    begin = time.perf_counter()
    chosen = CompareSettings.read(settings)
    if out_dir is not None:
        require_html()

    # What can be checked without weights is checked first.
    facts = read_model_facts(model_path)
    if facts.methods:
        raise ConfigError(
            f"{str(model_path)!r} is converted already; methods are compared on a dense model", code="CK35",
            where=str(model_path), hint="give the dense checkpoint, or take --suite quick or long",
        )  # fmt: skip
    check_positions([facts], {"lengths": chosen.lengths, "needle_lengths": chosen.needle_lengths or ()})
    named = named_plans(chosen, plans)
    config = read_json_mapping(facts.path / "config.json")
    size = (config["num_hidden_layers"], geometry_of(config))
    make_rows(chosen, named, *size, lambda *_: {})  # only to raise the problems of all plans

    # Then the model is loaded, where a search or a result needs it.
    run = _Run(facts, chosen, text_file, out_dir, say, progress)
    rows = make_rows(chosen, named, *size, run.search)
    results = run.measure(rows)

    values = envelope(
        "compare", [facts], given=settings, chosen=chosen, files={"text_file": text_file}, device=run.device,
        begin=begin, plans=[f"{plan.name}={plan.source}" for plan in plans],
    )  # fmt: skip
    return finish({**values, **run.about(), "rows": results}, out_dir, say)


class _Run:
    """The model, its texts and prompts, and the finished results of one comparison."""

    def __init__(
        self,
        facts: ModelFacts,
        chosen: CompareSettings,
        text_file: str | Path | None,
        out_dir: str | Path | None,
        say: Say,
        progress: Progress,
    ) -> None:
        self.facts = facts
        self.chosen = chosen
        self.say = say
        self.progress = progress
        self.device = choose_device(chosen.device)
        self.tokenizer = load_tokenizer(facts.path)

        # Texts are tokenised once, to the greatest length; shorter ones are their beginnings.
        named = {"code": code_text, "prose": prose_text}
        self.texts = [file_text(text_file)] if text_file else [named[name]() for name in chosen.texts]
        self.ids = {
            text.name: first_tokens(self.tokenizer, text, chosen.all_lengths()[-1]) for text in self.texts
        }
        longest = max(chosen.lengths, default=None)
        check_texts([(text, self.ids[text.name][:longest]) for text in self.texts], longest)

        # The needle grid: one prompt for each length and depth.
        haystack = prose_text().text if chosen.haystack == "prose" else None
        self.cases = [
            fit_needle(self.tokenizer, n, depth, haystack=haystack, seed=chosen.seed, max_new=1)
            for n in chosen.needle_lengths or ()
            for depth in chosen.depths
        ]

        self.store = CellStore(None if out_dir is None else Path(out_dir), self._depends_on())
        self.model: nn.Module | None = None
        self.done = 0
        self.total = 0

    def _depends_on(self) -> dict[str, Any]:
        """Return what every result depends on."""
        machine = describe_machine(self.device)
        return {
            "suite": "compare",
            "model": model_fingerprint(self.facts),
            "settings": {name: getattr(self.chosen, name) for name in ("dtype", "num_queries")},
            "machine": {key: value for key, value in machine.items() if key != "date"},
        }

    def about(self) -> dict[str, Any]:
        """Return the report's description of texts, prompts and results."""
        sources = [{"name": text.name, "source": text.source, "sha256": text.sha256} for text in self.texts]
        return {
            "sources": sources,
            "prompts_sha256": hash_of(self.cases),
            "cells": {"total": len(self.store.values), "reused": self.store.reused},
        }

    def loaded(self) -> nn.Module:
        """Return the dense model; it is loaded when it is first needed."""
        if self.model is None:
            self.say(f"loading {self.facts.path.resolve().name}")
            self.model = load_model(self.facts.path, self.chosen.dtype, self.device)
        return self.model

    def search(self, method: str, tokens: int, length: int) -> Mapping[str, Any]:
        """Return the settings with which a method keeps as many pairs of a prompt as the budget."""
        # Searched on the first text's prompt; the settings hold for all texts of this length.
        ids = self.ids[self.texts[0].name][: prompt_tokens(length)]
        name = f"search/{method}/{tokens}/{length}/{_hash(ids)}"

        def work() -> dict[str, Any]:
            self.say(f"searching {method} at {tokens} of {length} tokens")
            inputs = capture_inputs(self.loaded(), ids)
            wanted = density_of(tokens, len(ids))
            meaning: Any = method_class(method).Settings
            settings, found = search_density(method, lambda x: meaning.at_share(x, len(ids)), inputs, wanted)
            return {"settings": settings, "wanted": wanted, "found": found}

        value = self._cell(name, work)
        return {} if value is None else value["settings"]

    def _cell(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """Return a result; None where only finished results are wanted and this one is not finished."""
        if self.chosen.finished and name not in self.store.values:
            return None
        return self.store.get(name, work)

    def measure(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Return the results of each row, in the order of the rows.

        Texts come first, then the needles depth by depth: a run that is stopped early has results for every
        row.
        """
        # All rows of a length read the same texts and prompts.
        found: dict[int, dict[str, Any]] = {id(row): {"texts": {}, "needles": []} for row in rows}
        lengths = {n: [row for row in rows if row.length == n] for n in self.chosen.all_lengths()}
        texts = [(text, n) for n in sorted(self.chosen.lengths) for text in self.texts]
        cases = sorted(self.cases, key=lambda case: self.chosen.depths.index(case.depth))
        self.total = sum(len(lengths[n]) for n in [n for _, n in texts] + [case.length for case in cases])

        for text, n in texts:
            for row, value in zip(lengths[n], self._text(text, n, lengths[n]), strict=True):
                if value is not None:
                    found[id(row)]["texts"][text.name] = value

        for case in cases:
            for row in lengths[case.length]:
                value = self._needle(row, case)
                found[id(row)]["needles"] += [] if value is None else [value]

        # Rows without any result are left out of a report of finished results.
        measured = [{**row.facts(), **found[id(row)]} for row in rows]
        return [row for row in measured if row["texts"] or row["needles"]]

    def _step(self, what: str) -> None:
        """Report one more result as done."""
        self.done += 1
        if not self.chosen.finished:
            self.progress(what, self.done, self.total)

    def _text(self, text: EvalText, length: int, rows: Sequence[Row]) -> Iterator[dict[str, Any] | None]:
        """Yield the result of each row for a text; the dense model reads it only if a result is missing."""
        ids = self.ids[text.name][:length]
        dense: list[Readout] = []
        for row in rows:

            def work(row: Row = row) -> dict[str, Any]:
                if not dense:
                    dense.append(read_out(self.loaded(), ids, prompt_tokens(length), whole=True))
                return self._read(row, ids, dense[0])

            yield self._cell(f"text/{_hash(ids)}/{row.tokens}/{_plan_hash(row)}", work)
            self._step(f"{text.name}, {length} tokens, {row.name} {row.budget}".rstrip())

    def _read(self, row: Row, ids: list[int], dense: Readout) -> dict[str, Any]:
        """Read a text with one plan; return its difference from dense attention, density and captured mass.

        Args:
            row: The plan with its budget and length.
            ids: Tokens of the text.
            dense: What dense attention predicts for every token.
        """
        begin = time.perf_counter()
        prompt = prompt_tokens(len(ids))
        seen = row.tokens or row.visible or 0
        counter = PairCounter()
        probe = MassProbe(seen, self.chosen.num_queries)

        # Where read_out enters `watch`, this observer replaces the outer one, and also measures the mass.
        @contextlib.contextmanager
        def watch() -> Iterator[None]:
            def add(record: AttentionRecord) -> None:
                counter.add(record)
                probe.add(record)

            with observe(add):
                yield

        with patched_in(self.loaded(), row.plan) as model, observe(counter.add):
            readout = read_out(model, ids, prompt, watch, whole=row.one_pass)
        gc.collect()

        # Where one pass shows nothing, only the predictions of the decoding steps are compared.
        if row.one_pass:
            found = compare(dense, readout, ids)
        else:
            after = dataclasses.replace(dense, states=dense.states[prompt - 1 :])
            found = compare(after, readout, ids[prompt - 1 :])

        figures = text_figures(found, len(ids), prompt, seen, row.one_pass)
        return {
            **figures, **mass_of(probe.rows), "density": counter.densities(),
            "seconds": time.perf_counter() - begin,
        }  # fmt: skip

    def _needle(self, row: Row, case: Case) -> dict[str, Any] | None:
        """Return the result of a row for one needle prompt."""

        def work() -> dict[str, Any]:
            begin = time.perf_counter()
            counter = PairCounter()

            with patched_in(self.loaded(), row.plan) as model, observe(counter.add):
                outcome = run_case(model, self.tokenizer, case)
            gc.collect()
            return {
                "depth": case.depth, "tokens": outcome.tokens, "hit": outcome.forced == 1,
                "forced_tokens": outcome.forced_tokens, "nll": outcome.nll,
                "cache_bytes": outcome.cache_bytes, "density": counter.densities(),
                "seconds": time.perf_counter() - begin,
            }  # fmt: skip

        # Prompt and plan are part of the name: a changed one is computed again.
        key = _hash((*case.prompt_ids, *case.answer_ids))
        value = self._cell(f"needle/{case.length}/{case.depth}/{key}/{_plan_hash(row)}", work)
        self._step(f"needle, {case.length} tokens, {row.name} {row.budget}".rstrip())
        return value


def text_figures(found: Divergence, tokens: int, prompt: int, seen: int, whole: bool) -> dict[str, Any]:
    """Return the figures of a text: of everything beyond the budget, and of what follows the prompt.

    Args:
        found: Divergence at all predictions, or at those from the prompt's last token on.
        tokens: Number of tokens of the text.
        prompt: Tokens read as a prompt.
        seen: Number of tokens up to which every layer is dense.
        whole: Whether ``found`` has all predictions.

    Returns:
        ``ppl, ratio, kl, top1`` of the text (None unless ``whole``), the same with ``_after`` of what follows
        the prompt, and ``tokens, prompt``.
    """
    # The last token predicts nothing: there are tokens - 1 predictions.
    last = tokens - 1
    after = found.summary(Bucket(prompt - 1, last, 0 if whole else prompt - 1))

    out: dict[str, float | None] = {"tokens": tokens, "prompt": prompt}
    out |= dict.fromkeys(("ppl", "ratio", "kl", "top1"))

    # The figures of the whole text, except its perplexity, leave out predictions within the budget.
    if whole:
        beyond = found.summary(Bucket(min(seen, last - 1), last))
        out |= {"ppl": found.summary()["sparse_ppl"], "ratio": beyond["ppl_ratio"], "kl": beyond["kl_mean"]}
        out["top1"] = beyond["top1"]

    names = {"ppl": "sparse_ppl", "ratio": "ppl_ratio", "kl": "kl_mean", "top1": "top1"}
    return {**out, **{f"{own}_after": after[name] for own, name in names.items()}}


def mass_of(rows: Sequence[LayerMass]) -> dict[str, float | None]:
    """Return captured mass and, if it is known for all layers, the oracle; means over heads that hide keys.

    Patterns of a layer's heads share one softmax: their masses are added. Of gated branches, each with a
    softmax of its own, only the selected one counts.
    """
    groups: dict[tuple, list[LayerMass]] = {}
    for row in rows:
        if row.gates is None or len(row.gates) == 1 or row.pattern == "selected":
            groups.setdefault((row.layer, row.heads), []).append(row)

    # Each layer counts with its number of heads.
    captured = 0.0
    oracle = 0.0
    heads = 0
    chosen = all(len(group) == 1 and group[0].oracle is not None for group in groups.values())
    for group in groups.values():
        weight = len(group[0].captured_by_head)
        heads += weight
        captured += weight * sum(row.captured for row in group)
        oracle += weight * (group[0].oracle or 0.0)

    if not heads:
        return {"captured": None, "oracle": None}
    return {"captured": captured / heads, "oracle": oracle / heads if chosen else None}


def _hash(ids: Sequence[int]) -> str:
    """Return a hash of token ids."""
    return hashlib.sha256(repr(tuple(ids)).encode()).hexdigest()[:16]


def _plan_hash(row: Row) -> str:
    """Return a hash of a row's plan, with all its settings."""
    text = "dense" if row.plan is None else json.dumps(row.plan.to_dict(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
