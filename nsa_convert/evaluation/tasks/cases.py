"""A prompt with its answer, and the fitting of prompts to a length."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable, Sequence
from typing import Any

from nsa_convert.evaluation.tasks.fitting import encode_answer, largest_fit
from nsa_convert.evaluation.tasks.needle import build_case


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A prompt and its answer.

    Attributes:
        task: Name of the task.
        length: Largest number of tokens of prompt, answer and generation together.
        index: Number of the sample.
        prompt_ids: Tokens up to the answer.
        answer_ids: Tokens fed after the prompt when the answer is scored by teacher forcing.
        spans: ``(begin, end)`` parts of ``answer_ids`` that are scored.
        gold: Strings that a generated answer should contain; empty if nothing is generated.
        max_new: Number of tokens to generate.
        depth: Depth of a needle, 0 to 1; None for other tasks.
        any_of: Whether one of the gold strings is enough.
    """

    task: str
    length: int
    index: int
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    gold: tuple[str, ...]
    max_new: int
    depth: float | None = None
    any_of: bool = False

    def score(self, text: str) -> float:
        """Return the share of ``gold`` strings in a text; with ``any_of`` 1 if it contains any of them."""
        if self.any_of:
            return float(any(contained([part], text) for part in self.gold))
        return contained(self.gold, text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
    """A prompt as text, before it is tokenised.

    Attributes:
        prompt: Text up to the answer, without a space at the end.
        gold: The right answers.
        answer: The answer as text; ``gold`` joined by commas when left out.
    """

    prompt: str
    gold: tuple[str, ...]
    answer: str | None = None

    @property
    def text(self) -> str:
        """Return the answer as text."""
        return ", ".join(self.gold) if self.answer is None else self.answer


def rng_of(*parts: object) -> random.Random:
    """Return a generator whose draws depend only on these values: other samples do not change them."""
    return random.Random("/".join(str(part) for part in parts))


def fit_case(
    tokenizer: Any,
    task: str,
    length: int,
    index: int,
    draft: Callable[[int], Draft],
    max_new: int,
    least: int = 0,
    any_of: bool = False,
) -> Case:
    """Return the longest prompt of a task that fits into a length.

    Args:
        tokenizer: Tokenizer of transformers.
        task: Name of the task.
        length: Largest number of tokens of prompt, answer and generation together.
        index: Number of the sample.
        draft: Number of filler units -> the prompt.
        max_new: Number of tokens to generate.
        least: Least number of units for which the task makes sense.
        any_of: Whether one of the gold strings is enough.

    Raises:
        ConfigError: Not even the smallest prompt fits (EV02).
    """

    def encode(units: int) -> tuple[Draft, list[int], list[int]]:
        made = draft(units)
        return made, *encode_answer(tokenizer, made.prompt, made.text)

    def size(units: int) -> int:
        _, prompt, answer = encode(units)
        return len(prompt) + max(len(answer), max_new)

    made, prompt, answer = encode(largest_fit(size, length, least=least, what=f"a prompt of {task}"))
    return Case(
        task=task,
        length=length,
        index=index,
        prompt_ids=tuple(prompt),
        answer_ids=tuple(answer),
        spans=((0, len(answer)),),
        gold=made.gold,
        max_new=max_new,
        any_of=any_of,
    )


def fit_needle(
    tokenizer: Any, length: int, depth: float, *, haystack: str | None, seed: int, max_new: int = 16
) -> Case:
    """Return a case of the needle grid, whose number is also to be generated.

    Args:
        tokenizer: Tokenizer of transformers.
        length: Largest number of tokens of prompt, answer and generation together.
        depth: Position of the needle, 0 to 1.
        haystack: Text around the needle, or None for noise.
        seed: Seed of key, number and start in the haystack.
        max_new: Number of tokens to generate.
    """
    made = build_case(tokenizer, length - max_new, depth, haystack=haystack, seed=seed)

    return Case(
        task="needle",
        length=length,
        index=0,
        prompt_ids=made.prompt_ids,
        answer_ids=made.answer_ids,
        spans=((0, len(made.answer_ids)),),
        gold=(made.value,),
        max_new=max_new,
        depth=depth,
    )


def hash_of(cases: Sequence[Case]) -> str:
    """Return the SHA-256 hash of all prompts and answers, so that a report identifies what was asked."""
    digest = hashlib.sha256()
    for case in cases:
        digest.update(repr((case.task, case.length, case.prompt_ids, case.answer_ids, case.gold)).encode())
    return digest.hexdigest()


def contained(gold: Sequence[str], text: str) -> float:
    """Return the share of the gold strings that a text contains, ignoring case (RULER's match of all)."""
    low = text.lower()
    return sum(part.lower() in low for part in gold) / len(gold)
