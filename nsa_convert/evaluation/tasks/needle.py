"""A number hidden in a long prompt, scored by teacher forcing.

The prompts follow RULER's ``niah_single`` tasks (arXiv 2404.06654): one sentence with a seven-digit number
is placed at a given depth of a haystack, and the prompt ends with the beginning of the answer. Small models
often miss the format when they generate freely, so the answer is scored instead: a case is a hit if every
answer token is the model's first choice given the prompt and the answer tokens before it.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from nsa_convert.chat import render_chat
from nsa_convert.errors import CheckFailedError, ConfigError
from nsa_convert.evaluation.tasks.fitting import encode_answer, largest_fit
from nsa_convert.methods.parts.prefill import STEP_TOKENS

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""The haystack sentence of RULER's niah_single_1."""
TASK = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you "
    "about the number afterwards.\n{context}\nWhat is the special magic number for {key} mentioned in the "
    "provided text?"
)
ANSWER_PREFIX = "The special magic number for {key} mentioned in the provided text is"
NEEDLE = "One of the special magic numbers for {key} is: {value}."
ADJECTIVES = ("amber", "brisk", "calm", "eager", "faint", "gentle", "hollow", "keen", "lively", "quiet")
NOUNS = ("anchor", "basket", "candle", "engine", "forest", "harbor", "island", "lantern", "meadow", "violin")
DEPTHS = (0.1, 0.35, 0.6, 0.85)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleCase:
    """One prompt with its answer.

    Attributes:
        length: Largest number of tokens of prompt and answer together.
        depth: Position of the needle in the haystack, 0 (start) to 1 (end).
        prompt_ids: Tokens up to the answer.
        answer_ids: Tokens of the answer.
        key: Name that the number belongs to.
        value: The number, as text.
    """

    length: int
    depth: float
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    key: str
    value: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleScore:
    """Teacher-forced result of one case.

    Attributes:
        length: Length of the case.
        depth: Depth of the case.
        tokens: Number of prompt and answer tokens that the model read.
        hit: Whether every answer token was the model's first choice.
        correct_tokens: How many answer tokens were.
        answer_tokens: Number of answer tokens.
        nll: Mean negative log-likelihood of the answer tokens.
    """

    length: int
    depth: float
    tokens: int
    hit: bool
    correct_tokens: int
    answer_tokens: int
    nll: float


def haystack_sentences(text: str | None, rng: random.Random) -> Iterator[str]:
    """Yield haystack sentences without end: RULER's noise, or a text's sentences from a random one on."""
    if text is None:
        while True:
            yield NOISE

    sentences = [s.strip() for s in text.replace("\n", " ").split(". ") if s.strip()]
    if not sentences:
        raise ConfigError("the haystack text has no sentence", code="EV02")

    position = rng.randrange(len(sentences))
    while True:
        yield sentences[position % len(sentences)].rstrip(".") + "."
        position += 1


def build_case(
    tokenizer: Any,
    length: int,
    depth: float,
    *,
    haystack: str | None = None,
    chat: bool = False,
    seed: int = 0,
) -> NeedleCase:
    """Build one prompt of at most ``length`` tokens, answer included.

    The random draws depend on (seed, length, depth) alone: another length in the grid changes no other case.

    Args:
        tokenizer: Tokenizer of transformers.
        length: Largest number of tokens.
        depth: Position of the needle, 0 to 1.
        haystack: Text whose sentences surround the needle, or None for RULER's noise sentences.
        chat: Put the question into the tokenizer's chat template as a user turn.
        seed: Seed of key, number and start in the haystack.

    Raises:
        ConfigError: The prompt without any haystack does not fit into ``length`` tokens (EV02).
    """
    rng = random.Random(f"needle/{seed}/{length}/{depth}")
    key = f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    value = str(rng.randint(1_000_000, 9_999_999))
    stream = haystack_sentences(haystack, rng)
    sentences: list[str] = []

    def encode(count: int) -> tuple[list[int], list[int]]:
        while len(sentences) < count:
            sentences.append(next(stream))
        return _encode(tokenizer, _context(sentences[:count], depth, key, value), key, value, chat)

    # As many sentences as fit.
    count = largest_fit(lambda n: sum(map(len, encode(n))), length, what="a needle prompt")
    prompt, answer = encode(count)
    return NeedleCase(
        length=length, depth=depth, prompt_ids=tuple(prompt), answer_ids=tuple(answer), key=key, value=value
    )


def _context(sentences: Sequence[str], depth: float, key: str, value: str) -> str:
    """Return the haystack with the needle at its depth."""
    place = round(depth * len(sentences))
    needle = NEEDLE.format(key=key, value=value)
    return " ".join([*sentences[:place], needle, *sentences[place:]])


def _encode(tokenizer: Any, context: str, key: str, value: str, chat: bool) -> tuple[list[int], list[int]]:
    """Return the tokens of the prompt, up to the number, and those of the number."""
    question = TASK.format(context=context, key=key)
    prefix = ANSWER_PREFIX.format(key=key)
    if chat:
        prompt = render_chat(tokenizer, [{"role": "user", "content": question}]) + prefix
    else:
        prompt = f"{question} {prefix}"

    # A chat template writes its own special tokens; a plain prompt gets those of the tokenizer (BOS).
    return encode_answer(tokenizer, prompt, value, special_tokens=not chat)


@torch.inference_mode()
def score_case(model: nn.Module, case: NeedleCase) -> NeedleScore:
    """Score one case: read the prompt, then the answer in decoding steps.

    Raises:
        CheckFailedError: A logit is not finite (EV04).
    """
    from transformers import DynamicCache

    ids = torch.tensor([case.prompt_ids + case.answer_ids], device=next(model.parameters()).device)
    prompt, answer = ids[:, : len(case.prompt_ids)], ids[0, len(case.prompt_ids) :]

    # The logits before each answer token: the prompt's last one, then those of the answer but the last.
    cache = DynamicCache(config=model.config)
    out = [model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0]]
    for step in answer[None, :-1].split(STEP_TOKENS, 1):
        if step.numel():
            out.append(model(input_ids=step, past_key_values=cache, use_cache=True).logits[0])
    logits = torch.cat(out).float()  # [A, V]

    if not torch.isfinite(logits).all():
        raise CheckFailedError(
            f"the model's logits are not finite on a needle prompt of {ids.shape[1]} tokens", code="EV04"
        )

    correct = int((logits.argmax(-1) == answer).sum())
    nll = -logits.log_softmax(-1).gather(1, answer[:, None]).mean().item()
    return NeedleScore(
        length=case.length,
        depth=case.depth,
        tokens=ids.shape[1],
        hit=correct == len(answer),
        correct_tokens=correct,
        answer_tokens=len(answer),
        nll=nll,
    )


def build_needles(
    tokenizer: Any,
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    *,
    haystack: str | None = None,
    chat: bool = False,
    seed: int = 0,
) -> list[NeedleCase]:
    """Return one case for each length and depth; see :func:`build_case`."""
    return [
        build_case(tokenizer, length, depth, haystack=haystack, chat=chat, seed=seed)
        for length in lengths
        for depth in depths
    ]


def hits_by_length(scores: Sequence[NeedleScore]) -> dict[int, tuple[int, int]]:
    """Return length -> ``(hits, cases)``."""
    out: dict[int, tuple[int, int]] = {}
    for score in scores:
        hits, cases = out.get(score.length, (0, 0))
        out[score.length] = (hits + score.hit, cases + 1)
    return out
