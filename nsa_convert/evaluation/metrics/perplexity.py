"""Negative log-likelihood of a text, token by token, and its averages by position."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nsa_convert.errors import CheckFailedError
from nsa_convert.methods.parts.prefill import STEP_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 256
"""Positions whose logits are in memory at a time: [T, V] in float32 would be 3 GB at T = 16k, V = 50k."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Readout:
    """A model's predictions for one sequence, as its last hidden states and its output head.

    Both together stand for ``[T, V]`` logits, which would need too much memory.

    Attributes:
        states: ``[T, C]`` hidden states after the final norm.
        head: Maps ``[N, C]`` to logits ``[N, V]``.
    """

    states: Tensor
    head: Callable[[Tensor], Tensor]

    def log_probs(self, begin: int, end: int) -> Tensor:
        """Return log-probabilities of the token after each position begin .. end - 1, ``[N, V]`` float32.

        Raises:
            CheckFailedError: A logit is not finite (EV04).
        """
        logits = self.head(self.states[begin:end]).float()
        if not torch.isfinite(logits).all():
            raise CheckFailedError(
                f"the model's logits are not finite between positions {begin} and {end - 1}",
                code="EV04",
                hint="try dtype=float32; if that fails too, the weights are damaged (nsa-convert verify)",
            )
        return logits.log_softmax(-1)


@torch.inference_mode()
def read_out(
    model: PreTrainedModel,
    input_ids: list[int],
    prompt: int = 0,
    watch: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    whole: bool = False,
) -> Readout:
    """Read a sequence with a causal language model of transformers.

    Args:
        model: Dense or sparse.
        input_ids: Tokens of the sequence.
        prompt: 0 reads the sequence in one pass without a cache. Otherwise so many tokens are read as a
            prompt, and the others in decoding steps on its cache.
        watch: Context manager around the pass, or around the reading of the prompt.
        whole: Also keep the states of the prompt.

    Returns:
        The states of all positions, or of those from the prompt's last token on.
    """
    ids = torch.tensor([input_ids], device=next(model.parameters()).device)
    head = model.get_output_embeddings()

    # One pass.
    if not prompt:
        with watch():
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        return Readout(states=states, head=head)

    # The prompt, then decoding steps.
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with watch():
        out = model.base_model(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True)
    states = [out.last_hidden_state[0] if whole else out.last_hidden_state[0, -1:]]

    for step in ids[:, prompt:].split(STEP_TOKENS, 1):
        out = model.base_model(input_ids=step, past_key_values=cache, use_cache=True)
        states.append(out.last_hidden_state[0])

    return Readout(states=torch.cat(states), head=head)


def scored_ids(input_ids: list[int], prompt: int) -> list[int]:
    """Return the tokens that belong to the states that :func:`read_out` returns without ``whole``."""
    return input_ids[max(0, prompt - 1) :]


@torch.inference_mode()
def token_nll(readout: Readout, input_ids: list[int]) -> Tensor:
    """Return ``-log p(token t + 1 | tokens 0 .. t)`` for t = 0 .. T - 2, ``[T - 1]`` float32 on the CPU."""
    targets = torch.tensor(input_ids[1:], device=readout.states.device)
    parts = []
    for begin in range(0, len(targets), CHUNK):
        chunk = targets[begin : begin + CHUNK]
        parts.append(-readout.log_probs(begin, begin + len(chunk)).gather(1, chunk[:, None])[:, 0])
    return torch.cat(parts).cpu()


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Predictions with more than ``begin`` and at most ``end`` tokens of context.

    The prediction after token t has t + 1 tokens of context. If ``end`` is at most the visible budget, no key
    was hidden from any prediction in the bucket.

    Attributes:
        begin: Tokens of context, exclusive.
        end: Tokens of context, inclusive.
        first: Tokens of context of the first prediction in the values, minus one.
    """

    begin: int
    end: int
    first: int = 0

    def of(self, values: Tensor) -> Tensor:
        """Return the part of ``values`` (one per prediction) that belongs to this bucket."""
        return values[self.begin - self.first : self.end - self.first]

    @property
    def label(self) -> str:
        """Return the range of context lengths as text."""
        return f"{self.begin + 1}-{self.end}"


def position_buckets(length: int, budget: int | None = None, prompt: int = 0) -> list[Bucket]:
    """Divide context lengths 1 .. length into buckets.

    The edges are B/2, B, 2B, 4B ... for a visible budget B, else 512, 1024, 2048 ... After a prompt there is
    one bucket, with the context lengths from the prompt on.
    """
    if prompt:
        return [Bucket(prompt - 1, length, prompt - 1)]

    edge = max(1, budget // 2) if budget else 512
    edges = [0]
    while edge < length:
        edges.append(edge)
        edge *= 2
    edges.append(length)
    return [Bucket(begin, end) for begin, end in zip(edges, edges[1:], strict=False)]


def perplexity(nll: Tensor) -> float:
    """Return exp of the mean negative log-likelihood; nan for an empty tensor."""
    mean = nll.double().mean().item()
    return math.exp(min(mean, 700.0))  # a float64 overflows at 709; no real text gets near
