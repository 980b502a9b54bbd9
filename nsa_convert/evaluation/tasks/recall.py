"""Associative recall: many pairs, then many of their keys, each of which should bring its value back.

All queries of a prompt are scored in one forward pass, so a single prompt gives many cases.
"""

from __future__ import annotations

from typing import Any

from nsa_convert.evaluation.tasks.cases import Case, largest_fit, rng_of
from nsa_convert.evaluation.tasks.ruler import ADJECTIVES, NOUNS

QUERIES = 16
TASK = "A list of names and their numbers follows. Then some of the names are repeated with their numbers.\n"


def build_recall(tokenizer: Any, length: int, index: int, seed: int = 0, queries: int = QUERIES) -> Case:
    """Return one prompt: a list of ``name: number`` lines, then ``queries`` of them again in another order.

    The queried pairs are spread evenly over the list, so some are near and some are far. Only the numbers
    behind the repeated names are scored.

    Args:
        tokenizer: Of transformers.
        length: Tokens in all.
        index: Number of the sample.
        seed: Other pairs for another seed.
        queries: Pairs that are asked for.

    Raises:
        ConfigError: Half as many lines again as queries do not fit (EV02).
    """
    rng = rng_of(seed, "recall", length, index)
    names = [f"{a}-{b}" for a in ADJECTIVES for b in NOUNS]
    rng.shuffle(names)
    numbers = [str(rng.randint(1000, 9999)) for _ in names]
    order = rng.sample(range(queries), queries)

    def ids(text: str, special: bool = False) -> list[int]:
        return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    def encode(count: int) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
        count = min(count, len(names))
        lines = "\n".join(f"{names[i]}: {numbers[i]}" for i in range(count))
        asked = [int((place + 0.5) * count / queries) for place in order]
        pairs = [(ids(f"\n{names[i]}:"), ids(f" {numbers[i]}")) for i in asked]
        return ids(f"{TASK}{lines}\n", True), pairs

    def size(count: int) -> int:
        prompt, pairs = encode(count)
        # More lines than names cannot be made; then the prompt stays as long as it is.
        return len(prompt) + sum(len(a) + len(b) for a, b in pairs) + (length if count > len(names) else 0)

    what = "a prompt of recall"
    prompt, pairs = encode(largest_fit(size, length, least=3 * queries // 2, what=what))
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
