"""Negative log-likelihood of a text, token by token, and its averages by position."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nsa_convert.errors import CheckFailedError

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
                f"the model's logits are not finite between positions {begin} and {end - 1}", code="EV04",
                hint="try dtype=float32; if that fails too, the weights are damaged (nsa-convert verify)",
            )
        return logits.log_softmax(-1)


@torch.inference_mode()
def read_out(model: nn.Module, input_ids: list[int]) -> Readout:
    """Run a causal language model of transformers once over a sequence, without a cache."""
    ids = torch.tensor([input_ids], device=next(model.parameters()).device)
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    return Readout(states=states, head=model.get_output_embeddings())


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
    """

    begin: int
    end: int

    def of(self, values: Tensor) -> Tensor:
        """Return the entries of ``values`` (one per prediction, the first has context 1) in this bucket."""
        return values[self.begin : self.end]

    @property
    def label(self) -> str:
        """Return the context lengths as text."""
        return f"{self.begin + 1}-{self.end}"


def position_buckets(length: int, budget: int | None = None) -> list[Bucket]:
    """Cut context lengths 1 .. length at the budget times powers of two.

    The edges are B/2, B, 2B, 4B ...; without a budget 512, 1024, 2048 ...
    """
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
