"""Prompt and answer as tokens, and how much filler fits into a length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nsa_convert.errors import ConfigError

MAX_DOUBLINGS = 24
"""Largest number of doublings when the length of a prompt is searched."""


def encode_answer(
    tokenizer: Any, prompt: str, answer: str, *, special_tokens: bool = True
) -> tuple[list[int], list[int]]:
    """Tokenise prompt and answer as one text, and split it before the first token of the answer.

    A tokenizer with a token of its own for the space before a number leaves that token in the prompt: whether
    a model answers with a space, a colon or bold type is format, not retrieval.
    """
    before = tokenizer(prompt, add_special_tokens=special_tokens, verbose=False)["input_ids"]
    whole = tokenizer(f"{prompt} {answer}", add_special_tokens=special_tokens, verbose=False)["input_ids"]

    # The common beginning of both, then tokens that hold white space only.
    cut = 0
    while cut < len(before) and before[cut] == whole[cut]:
        cut += 1
    while cut < len(whole) - 1 and not tokenizer.decode(whole[cut : cut + 1]).strip():
        cut += 1
    return whole[:cut], whole[cut:]


def largest_fit(size_of: Callable[[int], int], limit: int, *, least: int = 0, what: str = "a prompt") -> int:
    """Return the largest n >= least with ``size_of(n) <= limit``, by doubling and then halving.

    Raises:
        ConfigError: ``size_of(least)`` is above the limit (EV02).
    """
    smallest = size_of(least)
    if smallest > limit:
        raise ConfigError(
            f"{what} needs {smallest} tokens at least, {limit} were allowed",
            code="EV02",
            expected=f"length >= {smallest}",
            found=str(limit),
            hint="raise the length",
        )

    # Double until it is too much.
    low = least
    high = max(1, 2 * least)
    for _ in range(MAX_DOUBLINGS):
        if size_of(high) > limit:
            break
        low = high
        high = 2 * high

    # Now low fits and high does not (or the tries are used up): halve the gap.
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size_of(middle) <= limit else (low, middle)
    return low
