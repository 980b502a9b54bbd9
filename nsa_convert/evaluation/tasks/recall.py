"""Associative recall: a list of pairs, then many of their keys again, each to be followed by its value.

All queries of a prompt are scored in one pass, so one prompt gives many cases.
"""

from __future__ import annotations

from typing import Any

from nsa_convert.evaluation.tasks.cases import Case, rng_of
from nsa_convert.evaluation.tasks.fitting import largest_fit
from nsa_convert.evaluation.tasks.ruler import ADJECTIVES, NOUNS

QUERIES = 16
"""Number of pairs that a prompt asks for."""
TASK = "A list of names and their numbers follows. Then some of the names are repeated with their numbers.\n"


def build_recall(tokenizer: Any, length: int, index: int, seed: int = 0, queries: int = QUERIES) -> Case:
    """Return one prompt: a list of ``name: number`` lines, then ``queries`` of them again in another order.

    The queried pairs are spread evenly over the list, so some are near and some are far. Only the numbers
    after the repeated names are scored.

    Args:
        tokenizer: Tokenizer of transformers.
        length: Largest number of tokens of prompt and answer.
        index: Number of the sample.
        seed: Seed of names, numbers and order.
        queries: Number of pairs that are asked for.

    Raises:
        ConfigError: One and a half lines per query do not fit (EV02).
    """
    rng = rng_of(seed, "recall", length, index)
    names = [f"{a}-{b}" for a in ADJECTIVES for b in NOUNS]
    rng.shuffle(names)
    numbers = [str(rng.randint(1000, 9999)) for _ in names]
    order = rng.sample(range(queries), queries)

    def ids(text: str, special: bool = False) -> list[int]:
        """Return the token ids of a part of the prompt."""
        return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    def encode(count: int) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
        """Return the list of ``count`` lines as tokens, and ``(name, number)`` tokens of each query."""
        count = min(count, len(names))
        lines = "\n".join(f"{names[i]}: {numbers[i]}" for i in range(count))

        # Each query asks for the middle of its part of the list.
        asked = [int((place + 0.5) * count / queries) for place in order]
        pairs = [(ids(f"\n{names[i]}:"), ids(f" {numbers[i]}")) for i in asked]
        return ids(f"{TASK}{lines}\n", True), pairs

    def size(count: int) -> int:
        """Return the tokens of a prompt with ``count`` lines."""
        prompt, pairs = encode(count)

        # There are no more lines than names: asking for more counts as too long, which ends the search.
        return len(prompt) + sum(len(a) + len(b) for a, b in pairs) + (length if count > len(names) else 0)

    what = "a prompt of recall"
    prompt, pairs = encode(largest_fit(size, length, least=3 * queries // 2, what=what))

    # Names are fed but not scored, numbers are the scored spans.
    answer: list[int] = []
    spans = []
    for name, number in pairs:
        answer += name
        spans.append((len(answer), len(answer) + len(number)))
        answer += number

    return Case(
        task="recall",
        length=length,
        index=index,
        prompt_ids=tuple(prompt),
        answer_ids=tuple(answer),
        spans=tuple(spans),
        gold=(),
        max_new=0,
    )
