"""RULER's eleven tasks that need no download (Hsieh et al. 2024, arXiv 2404.06654), from their definitions.

| task | haystack | hidden | asked |
|---|---|---|---|
| ``niah_single_1`` | noise | one number | it |
| ``niah_single_2`` | prose | one number | it |
| ``niah_single_3`` | prose | one UUID | it |
| ``niah_multikey_1`` | prose | four numbers with their keys | one |
| ``niah_multikey_2`` | nothing but needles | numbers | one |
| ``niah_multikey_3`` | nothing but needles | UUIDs, keys UUIDs too | one |
| ``niah_multivalue`` | prose | four numbers of one key | all |
| ``niah_multiquery`` | prose | four numbers with their keys | all |
| ``vt`` | noise | a chain of five variables with one value | all their names |
| ``cwe`` | a list of words, ten of them often | | the ten |
| ``fwe`` | made-up words with Zipfian frequencies | | the three most frequent |

The prose is the language reference of the running Python, not essays. Prompts have wordings of their own, and
answers are scored by the share of right strings: compare scores between models here, not with published ones.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from nsa_convert.evaluation.tasks.cases import Case, Draft, fit_case, rng_of
from nsa_convert.evaluation.tasks.needle import NOISE
from nsa_convert.evaluation.tasks.text import prose_text

# fmt: off
ADJECTIVES = (
    "amber", "brisk", "calm", "daring", "eager", "faint", "gentle", "hollow", "icy", "jolly", "keen",
    "lively", "mellow", "narrow", "olive", "proud", "quiet", "rapid", "silent", "tender", "urban",
    "vivid", "warm", "young", "zesty", "bold", "crisp", "dusty", "early", "frosty", "grand", "humble",
    "ivory", "lunar", "mossy", "noble", "plain", "rustic", "solar", "tidy",
)
# fmt: on
# fmt: off
NOUNS = (
    "anchor", "basket", "candle", "dragon", "engine", "forest", "garden", "harbor", "island", "jacket",
    "kettle", "lantern", "meadow", "needle", "orchard", "pencil", "quarry", "ribbon", "saddle", "tunnel",
    "umbrella", "violin", "window", "yacht", "zipper", "bridge", "cannon", "desert", "falcon", "glacier",
    "hammer", "insect", "jungle", "ladder", "mirror", "nugget", "oyster", "planet", "rocket", "statue",
)
# fmt: on
NIAH = (
    "Some special magic {kind}s are hidden within the following text. Make sure to memorize them. I will "
    "quiz you about them afterwards.\n{context}\n{question}"
)
DISTRACTORS = 3
VALUES = 4
HOPS = 4
COMMON = 10
COMMON_TIMES = 30
RARE_TIMES = 3
ZIPF = 2.0
FREQUENT = 3


def build_ruler(tokenizer: Any, task: str, length: int, index: int, seed: int = 0) -> Case:
    """Return one sample of a task.

    Args:
        tokenizer: Tokenizer of transformers.
        task: A name in ``RULER_TASKS``.
        length: Largest number of tokens of prompt and answer together.
        index: Number of the sample.
        seed: Seed of all draws.

    Raises:
        ConfigError: The task does not fit into the length (EV02).
    """
    make, max_new, least = RULER_TASKS[task]
    seeds = (seed, task, length, index)
    return fit_case(tokenizer, task, length, index, make(rng_of(*seeds)), max_new, least)


def sentences_of(text: str) -> list[str]:
    """Return the sentences of a text, each with its full stop."""
    return [f"{part.strip().rstrip('.')}." for part in text.replace("\n", " ").split(". ") if part.strip()]


def _filler(rng: random.Random, kind: str) -> Callable[[int], list[str]]:
    """Return a function that returns the first n units of one haystack."""
    if kind == "noise":
        return lambda count: [NOISE] * count

    sentences = sentences_of(prose_text().text)
    start = rng.randrange(len(sentences))
    return lambda count: [sentences[(start + i) % len(sentences)] for i in range(count)]


def _keys(rng: random.Random, count: int) -> list[str]:
    """Return different keys of two words."""
    pairs = [f"{a}-{b}" for a in ADJECTIVES for b in NOUNS]
    return rng.sample(pairs, count)


def _number(rng: random.Random) -> str:
    """Return a number of seven digits."""
    return str(rng.randint(1_000_000, 9_999_999))


def _uuid(rng: random.Random) -> str:
    """Return 128 random bits written as a UUID."""
    digits = f"{rng.getrandbits(128):032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _needle(key: str, value: str, kind: str) -> str:
    """Return the sentence that hides a value."""
    return f"One of the special magic {kind}s for {key} is: {value}."


def _spread(units: Sequence[str], inserted: Sequence[str], places: Sequence[float]) -> str:
    """Return the units as one text, with other sentences inserted at the given depths from 0 to 1."""
    rows = [(place * len(units), 0, text) for place, text in zip(places, inserted, strict=True)]
    rows += [(number + 0.5, 1, text) for number, text in enumerate(units)]
    return " ".join(text for *_, text in sorted(rows, key=lambda row: row[:2]))


def _niah(
    haystack: str,
    kind: str = "number",
    *,
    keys: int = 1,
    values: int = 1,
    asked: int = 1,
) -> Callable[[random.Random], Callable[[int], Draft]]:
    """Return a maker of needle tasks in filler.

    Args:
        haystack: ``"noise"`` or ``"prose"``.
        kind: ``"number"`` or ``"uuid"``.
        keys: Number of keys.
        values: Number of values of each key.
        asked: Number of keys that are asked for.
    """

    def make(rng: random.Random) -> Callable[[int], Draft]:
        # Needles in random order at random depths.
        value = _uuid if kind == "uuid" else _number
        table = {key: [value(rng) for _ in range(values)] for key in _keys(rng, keys)}
        pairs = [(key, one) for key, many in table.items() for one in many]
        rng.shuffle(pairs)
        places = [rng.random() for _ in pairs]

        # All values of the first keys are asked for.
        names = list(table)[:asked]
        units = _filler(rng, haystack)
        needles = [_needle(key, one, kind) for key, one in pairs]
        gold = tuple(one for name in names for one in table[name])
        return lambda count: _question(_spread(units(count), needles, places), names, gold, kind)

    return make


def _needles_only(kind: str) -> Callable[[random.Random], Callable[[int], Draft]]:
    """Return a maker of tasks whose text has needles only; one of them is asked for."""

    def make(rng: random.Random) -> Callable[[int], Draft]:
        keys = [] if kind == "uuid" else _keys(rng, len(ADJECTIVES) * len(NOUNS))
        asked = rng.random()
        place = random.Random(rng.random())
        rows: list[tuple[str, str]] = []

        def draft(count: int) -> Draft:
            # Rows are drawn once and in order: a longer draft begins like a shorter one.
            while len(rows) < count:
                number = len(rows)
                if kind == "uuid":
                    rows.append((_uuid(place), _uuid(place)))
                else:
                    # When all keys are used they begin again with a number.
                    again = number // len(keys)
                    key = keys[number % len(keys)] + (f"-{again}" if again else "")
                    rows.append((key, _number(place)))

            key, value = rows[int(asked * count)]
            context = " ".join(_needle(*row, kind) for row in rows[:count])
            return _question(context, [key], (value,), kind)

        return draft

    return make


def _question(context: str, names: Sequence[str], gold: tuple[str, ...], kind: str) -> Draft:
    """Return the prompt that asks for the values of some keys, with the beginning of the answer."""
    which = ", ".join(names[:-1]) + f", and {names[-1]}" if len(names) > 1 else names[0]

    many = len(gold) > 1
    question = (
        f"What are all the special magic {kind}s for {which} mentioned in the provided text?"
        if many
        else f"What is the special magic {kind} for {which} mentioned in the provided text?"
    )

    plural, verb = ("s", "are") if many else ("", "is")
    begin = f"The special magic {kind}{plural} for {which} mentioned in the provided text {verb}"
    text = NIAH.format(kind=kind, context=context, question=question)
    return Draft(prompt=f"{text} {begin}", gold=gold)


def _variable_tracking(rng: random.Random) -> Callable[[int], Draft]:
    """Five variables: the first is assigned a number, each other one the one before it; all are asked for."""
    names = rng.sample([f"{a}{b}{c}{d}{e}" for a, b, c, d, e in _letters(rng, 40)], HOPS + 1)
    # The assignments keep their order in the noise.
    value = str(rng.randint(10_000, 99_999))
    lines = [f"VAR {names[0]} = {value}."]
    lines += [f"VAR {name} = VAR {before}." for before, name in zip(names, names[1:], strict=False)]
    places = sorted(rng.random() for _ in lines)

    question = f"Question: Find all variables that are assigned the value {value} in the text above."
    answer = (
        f"Answer: According to the chain(s) of variable assignment in the text above, {len(names)} variables "
        f"are assigned the value {value}, they are:"
    )
    task = "Memorize and track the chain(s) of variable assignment hidden in the following text."

    def draft(count: int) -> Draft:
        context = _spread([NOISE] * count, lines, places)
        return Draft(
            prompt=f"{task}\n\n{context}\n{question} {answer}", gold=tuple(names), answer=" ".join(names)
        )

    return draft


def _letters(rng: random.Random, count: int) -> list[list[str]]:
    """Return at most ``count`` different sequences of five letters."""
    found = {tuple(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)) for _ in range(count)}
    return [list(letters) for letters in sorted(found)]


def _common_words(rng: random.Random) -> Callable[[int], Draft]:
    """A numbered list in which ten words appear thirty times each and every other word three times."""
    words = sorted(set(re.findall(r"\b[a-z]{4,10}\b", prose_text().text)))
    rng.shuffle(words)
    common = words[:COMMON]
    rare = words[COMMON:]
    order = rng.random()

    def draft(count: int) -> Draft:
        # Short lists have fewer repetitions: n rare words take common ones max(4, min(30, n)) times.
        times = min(COMMON_TIMES, max(RARE_TIMES + 1, count))
        listed = common * times + rare[:count] * RARE_TIMES

        random.Random(f"{order}/{count}").shuffle(listed)
        text = " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
        prompt = (
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize "
            f"the ones that appear most often.\n{text}\nQuestion: What are the {COMMON} most common words in "
            f"the above list? Answer: The top {COMMON} words that appear most often in the list are:"
        )

        numbered = " ".join(f"{number}. {word}" for number, word in enumerate(common, 1))
        return Draft(prompt=prompt, gold=tuple(common), answer=numbered)

    return draft


def _frequent_words(rng: random.Random) -> Callable[[int], Draft]:
    """Made-up words; the word of rank k appears in proportion to 1 / k**2, and rank 1 is ``...``."""
    names = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(60)]
    names = list(dict.fromkeys(names))[:40]

    def draft(count: int) -> Draft:
        # Shares of `count` words by rank, at least one each.
        weights = [1 / rank**ZIPF for rank in range(1, len(names) + 2)]
        total = sum(weights)
        shares = [max(1, round(count * weight / total)) for weight in weights]

        listed = ["..."] * shares[0]
        for name, times in zip(names, shares[1:], strict=True):
            listed += [name] * times
        random.Random(count).shuffle(listed)

        prompt = (
            "Read the following coded text and track the frequency of each coded word. Find the three "
            f"most frequently appeared coded words.\n{' '.join(listed)}\nQuestion: Do not provide any "
            "explanation. Please ignore the dots '....'. What are the three most frequently appeared words "
            "in the above coded text? Answer: "
            "According to the coded text above, the three most frequently appeared words are:"
        )
        return Draft(prompt=prompt, gold=tuple(names[:FREQUENT]))

    return draft


RULER_TASKS: dict[str, tuple[Callable[[random.Random], Callable[[int], Draft]], int, int]] = {
    "niah_single_1": (_niah("noise"), 24, 0),
    "niah_single_2": (_niah("prose"), 24, 0),
    "niah_single_3": (_niah("prose", "uuid"), 48, 0),
    "niah_multikey_1": (_niah("prose", keys=1 + DISTRACTORS), 24, 0),
    "niah_multikey_2": (_needles_only("number"), 24, 2),
    "niah_multikey_3": (_needles_only("uuid"), 48, 2),
    "niah_multivalue": (_niah("prose", values=VALUES), 64, 0),
    "niah_multiquery": (_niah("prose", keys=VALUES, asked=VALUES), 64, 0),
    "vt": (_variable_tracking, 40, 1),
    "cwe": (_common_words, 64, 1),
    "fwe": (_frequent_words, 40, 60),
}
"""Task -> (maker, tokens to generate, least number of filler units)."""
