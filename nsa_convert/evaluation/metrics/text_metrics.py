"""The result of a text from the readings of two models."""

from __future__ import annotations

from nsa_convert.evaluation.metrics.divergence import compare
from nsa_convert.evaluation.metrics.mass import LayerMass
from nsa_convert.evaluation.metrics.perplexity import Readout, position_buckets, scored_ids
from nsa_convert.evaluation.models import ModelFacts
from nsa_convert.evaluation.report.result import TextResult
from nsa_convert.evaluation.tasks.text import EvalText


def text_result(
    model: ModelFacts,
    text: EvalText,
    ids: list[int],
    dense: Readout,
    sparse: Readout,
    layers: tuple[LayerMass, ...],
) -> TextResult:
    """Compare two readings of a text: of all of it, or of what follows a prompt.

    Args:
        model: The evaluated model.
        text: The text.
        ids: Tokens of the text.
        dense: What the dense model read.
        sparse: What the evaluated model read.
        layers: Captured mass of the layers of the evaluated model.
    """
    prompt = model.prompt_of(len(ids))
    return TextResult(
        text=text,
        tokens=len(ids),
        divergence=compare(dense, sparse, scored_ids(ids, prompt)),
        buckets=tuple(position_buckets(len(ids) - 1, model.visible_budget, prompt)),
        layers=layers,
        prompt=prompt,
    )
