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
"""Positions whose logits exist at one time: a [T, V] tensor of float32 would be 3 GB at T = 16k."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Readout:
    """What a model says about one sequence, as its last hidden states and its output head.

    The pair stands for ``[T, V]`` logits without holding them.

    Attributes:
        states: ``[T, C]`` hidden states after the final norm.
        head: Maps ``[N, C]`` to logits ``[N, V]``.
    """

    states: Tensor
    head: Callable[[Tensor], Tensor]

    def log_probs(self, begin: int, end: int) -> Tensor:
        """Return log-probabilities of the token after each position begin .. end - 1, ``[N, V]`` float32.

        Raises:
            CheckFailedError: A logit is not finite.
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
        input_ids: The sequence.
        prompt: 0 reads it in one pass without a cache. Else so many tokens are read as a prompt, and the
            others in decoding steps on its cache.
        watch: Entered around the pass, or around the reading of the prompt.
        whole: Keep the states of the prompt too.

    Returns:
        The states of all positions, or of those from the prompt's last token on.
    """
    ids = torch.tensor([input_ids], device=next(model.parameters()).device)
    head = model.get_output_embeddings()
    if not prompt:
        with watch():
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        return Readout(states=states, head=head)
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
    """Return the tokens that belong to the states of :func:`read_out`."""
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
    """Predictions made from more than ``begin`` and at most ``end`` tokens of context.

    The prediction after token t has t + 1 tokens of context. With ``end`` at most the visible budget, no key
    was hidden from any prediction in the bucket.

    Attributes:
        begin: Tokens of context.
        end: Tokens of context.
        first: Tokens of context that the first prediction of the values has, less one.
    """

    begin: int
    end: int
    first: int = 0

    def of(self, values: Tensor) -> Tensor:
        """Return the entries of ``values`` (one per prediction) in this bucket."""
        return values[self.begin - self.first : self.end - self.first]

    @property
    def label(self) -> str:
        """Return the context lengths as text."""
        return f"{self.begin + 1}-{self.end}"


def position_buckets(length: int, budget: int | None = None, prompt: int = 0) -> list[Bucket]:
    """Cut context lengths 1 .. length at the budget times powers of two.

    The edges are B/2, B, 2B, 4B ...; without a budget 512, 1024, 2048 ... After a prompt there is one bucket,
    of the context lengths from the prompt on.
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
