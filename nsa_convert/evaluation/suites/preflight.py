"""Texts and prompts of an evaluation, prepared and checked before any weight is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from nsa_convert.errors import ConfigError
from nsa_convert.evaluation.models import ModelFacts
from nsa_convert.evaluation.suites.quick_settings import QuickSettings
from nsa_convert.evaluation.tasks.contamination import seen_in_training
from nsa_convert.evaluation.tasks.needle import NeedleCase, build_needles
from nsa_convert.evaluation.tasks.text import (
    MIN_TOKENS,
    EvalText,
    default_texts,
    file_text,
    first_tokens,
    prose_text,
)
from nsa_convert.loading import load_tokenizer
from nsa_convert.settings import raise_problems

BUDGETS = 4
"""Default length in visible budgets: far beyond the point where the first keys are hidden."""
DENSE_LENGTH = 2048
"""Default length when no layer is sparse."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuiteInputs:
    """Token ids of the texts, and the needle prompts.

    Attributes:
        texts: Each text with its token ids.
        cases: Needle prompts; may be empty.
        warnings: What the texts cannot show.
    """

    texts: tuple[tuple[EvalText, list[int]], ...]
    cases: tuple[NeedleCase, ...]
    warnings: tuple[str, ...]


def prepare_inputs(
    models: list[ModelFacts], text_file: str | Path | None, length: int | None, settings: QuickSettings
) -> SuiteInputs:
    """Read and tokenise the texts and build the needle prompts.

    Args:
        models: The evaluated model, and the dense reference if it is another checkpoint.
        text_file: UTF-8 text, or None for the default texts.
        length: Tokens per text, or None for four visible budgets as far as models and texts allow.
        settings: Settings of the suite.

    Raises:
        ConfigError: A length beyond the models' positions (EV01), a text that is too short (DA02), or models
            that tokenise differently (EV07).
        CheckpointError: A tokenizer is missing.
    """
    # The shortest of the models' position limits, and a length that hides keys.
    limit = min((model.max_positions for model in models if model.max_positions), default=None)
    _check_lengths(length, limit, settings.needle_lengths)
    budget = models[0].visible_budget
    wanted = length or min(BUDGETS * budget if budget else DENSE_LENGTH, limit or 2 * DENSE_LENGTH)

    tokenizer = load_tokenizer(models[0].path)
    sources = default_texts() if text_file is None else [file_text(text_file)]
    texts = tuple((text, first_tokens(tokenizer, text, wanted)) for text in sources)
    check_texts(texts, length)
    if len(models) == 2:
        _check_same_tokens(models, texts, wanted)

    cases = build_needles(
        tokenizer,
        settings.needle_lengths,
        settings.needle_depths,
        haystack=prose_text().text if settings.needle_haystack == "prose" else None,
        chat=settings.needle_chat,
        seed=settings.seed,
    )

    warnings = [*_warnings(texts, budget, wanted), *seen_in_training(models[0].path, sources)]
    return SuiteInputs(texts=texts, cases=tuple(cases), warnings=tuple(warnings))


def check_positions(
    models: Sequence[ModelFacts], asked: Mapping[str, Sequence[int]], beyond: bool = False
) -> list[str]:
    """Check lengths against the positions that models were trained for.

    Args:
        models: All models of one evaluation.
        asked: Setting -> lengths.
        beyond: Allow up to four times the positions.

    Returns:
        A warning for lengths beyond the positions that are allowed.

    Raises:
        ConfigError: A length is too long (EV01).
    """
    limit = min((model.max_positions for model in models if model.max_positions), default=None)
    if limit is None:
        return []

    most = 4 * limit if beyond else limit
    lines = []
    for name, lengths in asked.items():
        if too_long := sorted({n for n in lengths if n > most}):
            lines.append(f"{name} {too_long} are beyond the model's {limit} positions")

    hint = "give shorter lengths; --suite long takes beyond_positions=true for up to four times as many"
    raise_problems(lines, code="EV01", hint=hint)

    longer = sorted({n for lengths in asked.values() for n in lengths if n > limit})
    return [f"lengths {longer} are beyond the {limit} positions the model was made for"] if longer else []


def _check_lengths(length: int | None, limit: int | None, needle_lengths: tuple[int, ...]) -> None:
    """Raise ConfigError (EV01) for lengths that are no numbers, too small, or beyond the positions."""
    problems = []
    is_count = isinstance(length, int) and not isinstance(length, bool) and length >= MIN_TOKENS
    if length is not None and not is_count:
        problems.append(f"length must be a whole number of at least {MIN_TOKENS} tokens, got {length!r}")
    elif length is not None and limit and length > limit:
        problems.append(f"length {length} is beyond the model's {limit} positions (max_position_embeddings)")

    beyond = [n for n in needle_lengths if limit and n > limit]
    if beyond:
        problems.append(f"needle_lengths {beyond} are beyond the model's {limit} positions")

    hint = f"give lengths from {MIN_TOKENS} to the model's positions"
    raise_problems(problems, code="EV01", hint=hint)


def check_texts(texts: Sequence[tuple[EvalText, list[int]]], length: int | None) -> None:
    """Raise ConfigError (DA02) for a text with fewer tokens than were asked for."""
    for text, ids in texts:
        if length is not None and len(ids) < length:
            raise ConfigError(
                f"text too short: {text.source} has {len(ids)} tokens, {length} were asked for",
                code="DA02",
                where=text.source,
                expected=f">= {length} tokens",
                found=str(len(ids)),
                hint="give a shorter length or a longer text",
            )


def _check_same_tokens(
    models: list[ModelFacts], texts: tuple[tuple[EvalText, list[int]], ...], length: int
) -> None:
    """Raise ConfigError (EV07) if two models turn the texts into different tokens."""
    other = load_tokenizer(models[1].path)
    differs = [text.name for text, ids in texts if first_tokens(other, text, length) != ids]
    # Equal texts are not enough: a vocabulary may have more tokens than they use.
    sizes = [model.vocab_size for model in models]
    if not differs and sizes[0] == sizes[1]:
        return

    reason = f"read the text {differs[0]!r} as different tokens" if differs else f"know {sizes} tokens"
    raise ConfigError(
        f"the model and the dense reference {reason}: they cannot be compared",
        code="EV07",
        where=str(models[1].path),
        hint="give the dense checkpoint this model was converted from",
    )


def _warnings(texts: tuple[tuple[EvalText, list[int]], ...], budget: int | None, wanted: int) -> list[str]:
    """Return what the texts cannot show: within the budget dense and sparse attention are equal."""
    if not budget:
        return ["no layer of this model is sparse: there is no sparsity to measure"]

    lines = []
    for text, ids in texts:
        if len(ids) - 1 <= budget:  # the last token is predicted from all tokens before it
            lines.append(
                f"{text.name}: {len(ids)} tokens do not exceed the visible budget of {budget}: no sparsity "
                "exercised, dense and sparse are equal by construction"
            )
        elif len(ids) < wanted:
            lines.append(f"{text.name}: the text ends after {len(ids)} of {wanted} tokens")
    return lines
