"""The suite ``quick``: perplexity, divergence from the dense model, captured mass, on one or two texts."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from nsa_convert.config import SparseAttentionConfig
from nsa_convert.evaluation.metrics.mass import LayerMass, MassProbe
from nsa_convert.evaluation.metrics.perplexity import Readout, read_out
from nsa_convert.evaluation.metrics.text_metrics import text_result
from nsa_convert.evaluation.models import ModelFacts, dense_attention_in, load_model, read_both_facts
from nsa_convert.evaluation.report.html import require_html, write_html
from nsa_convert.evaluation.report.identity import (
    choose_device,
    command_line,
    describe_machine,
    describe_model,
)
from nsa_convert.evaluation.report.plots import write_plots
from nsa_convert.evaluation.report.result import QuickReport, TextResult, after_prompt_warnings
from nsa_convert.evaluation.suites.preflight import SuiteInputs, prepare_inputs
from nsa_convert.evaluation.suites.quick_settings import QuickSettings
from nsa_convert.evaluation.tasks.needle import NeedleScore, score_case
from nsa_convert.notices import Say, silent


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Reading:
    """One model's results on all inputs: a readout and rows per text, a score per needle."""

    readouts: list[Readout]
    layers: list[tuple[LayerMass, ...]]
    needles: tuple[NeedleScore, ...]


def run_quick(
    model_path: str | Path,
    *,
    against: str | Path | None = None,
    text_file: str | Path | None = None,
    out_dir: str | Path | None = None,
    length: int | None = None,
    say: Say = silent,
    plan: SparseAttentionConfig | None = None,
    **settings: Any,
) -> QuickReport:
    """Compare a converted model with its dense model.

    Without ``against`` the dense model is the converted one with dense attention over the same weights, which
    is exactly the original as long as the model was not trained after conversion.

    Args:
        model_path: Folder of a converted (or dense) checkpoint.
        against: Folder of the dense checkpoint to compare with.
        text_file: UTF-8 text; by default standard-library source code and the Python language reference.
        out_dir: Folder for ``report.json``, CSV files and plots; None writes nothing.
        length: Tokens per text; by default four visible budgets, as far as model and text allow.
        say: Called with one line before each slow step.
        plan: Sparse plan with which the dense checkpoint at ``model_path`` is converted in memory.
        **settings: Fields of :class:`QuickSettings`.

    Returns:
        The report.

    Raises:
        ConfigError: A bad setting, a text that is too short, a length beyond the model's positions, or a
            dense model with other tokens.
        CheckpointError: A folder holds no model or no tokenizer.
        CheckFailedError: A model's logits are not finite.
        MachineError: ``out_dir`` was given and matplotlib is missing.
    """
    begin = time.perf_counter()
    chosen = QuickSettings.read(settings)

    if out_dir is not None:
        require_html()
    models = read_both_facts(model_path, plan, against)
    inputs = prepare_inputs(models, text_file, length, chosen)
    device = choose_device(chosen.device)

    sparse, dense = _read_both(models, inputs, chosen, device, say)
    say("comparing the distributions")
    report = QuickReport(
        command=command_line(
            models[0],
            models[1] if against is not None else None,
            "quick",
            _given(length, text_file, settings),
        ),
        model=describe_model(models[0]),
        against=describe_model(models[-1], same_weights=against is None),
        visible_budget=models[0].visible_budget,
        texts=_results(models[0], inputs, sparse, dense),
        needles={"dense": dense.needles, "sparse": sparse.needles} if inputs.cases else {},
        warnings=(*inputs.warnings, *after_prompt_warnings(not models[0].one_pass)),
        settings={"length": length, **dataclasses.asdict(chosen)},
        environment=describe_machine(device),
        seconds=time.perf_counter() - begin,
    )

    if out_dir is None:
        return report

    say("drawing")
    values = report.to_dict()
    folder = Path(out_dir)
    report = dataclasses.replace(report, files=(*write_plots(values, folder), write_html(values, folder)))
    return dataclasses.replace(report, files=(*report.files, *report.write(folder)))


def _read_both(
    models: list[ModelFacts], inputs: SuiteInputs, chosen: QuickSettings, device: str, say: Say
) -> tuple[_Reading, _Reading]:
    """Run the sparse model, then the dense one; two checkpoints are never in memory at the same time."""
    say(f"loading {models[0].path}")
    model = load_model(models[0].path, chosen.dtype, device, models[0].plan)
    prompt_of = models[0].prompt_of
    sparse = _read(model, inputs, models[0].visible_budget, chosen.num_queries, prompt_of, say)

    if len(models) == 2:
        del model
        say(f"loading {models[1].path}")
        model = load_model(models[1].path, chosen.dtype, device)

    same_weights = len(models) == 1 and models[0].methods
    with dense_attention_in(model) if same_weights else contextlib.nullcontext():
        say("dense attention")
        dense = _read(model, inputs, None, chosen.num_queries, prompt_of, say)
    return sparse, dense


def _read(
    model: nn.Module,
    inputs: SuiteInputs,
    budget: int | None,
    num_queries: int,
    prompt_of: Callable[[int], int],
    say: Say,
) -> _Reading:
    """Run a model on all texts and needles.

    Args:
        model: The model.
        inputs: Texts and needles.
        budget: Visible budget; captured mass is measured on queries beyond it. None measures it on all.
        num_queries: Queries per layer and text that the mass is measured on.
        prompt_of: Tokens of a text -> tokens to read as a prompt.
        say: Called with one line before each text and needle.
    """
    readouts = []
    layers = []
    needles = []

    for text, ids in inputs.texts:
        say(f"{text.name}: {len(ids)} tokens")
        probe = MassProbe(budget or 0, num_queries)
        readouts.append(read_out(model, ids, prompt_of(len(ids)), probe.watch))
        layers.append(tuple(probe.rows))

    for case in inputs.cases:
        say(f"needle: {case.length} tokens, depth {case.depth:.0%}")
        needles.append(score_case(model, case))
    return _Reading(readouts=readouts, layers=layers, needles=tuple(needles))


def _results(
    model: ModelFacts, inputs: SuiteInputs, sparse: _Reading, dense: _Reading
) -> tuple[TextResult, ...]:
    """Return the comparison of both readings, text by text."""
    return tuple(
        text_result(model, text, ids, dense.readouts[i], sparse.readouts[i], sparse.layers[i])
        for i, (text, ids) in enumerate(inputs.texts)
    )


def _given(length: int | None, text_file: str | Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that were given, without folders, for the report's command line."""
    given = {"length": length, "text_file": None if text_file is None else Path(text_file).name, **settings}
    return {key: value for key, value in given.items() if value is not None}
