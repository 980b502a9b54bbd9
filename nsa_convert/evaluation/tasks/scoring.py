"""Run one case: read the prompt once, score the answer by teacher forcing, then generate; both are timed."""

from __future__ import annotations

import copy
import dataclasses
import time
from typing import Any

import torch
from torch import Tensor, nn

from nsa_convert.errors import CheckFailedError
from nsa_convert.evaluation.tasks.cases import Case
from nsa_convert.methods.parts.prefill import STEP_TOKENS
from nsa_convert.patch.eviction import cache_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of a model on a case.

    Attributes:
        tokens: Number of prompt tokens.
        forced: Share of the scored spans in which every token was the model's first choice.
        forced_tokens: Share of the scored tokens that were the model's first choice.
        nll: Mean negative log-likelihood of the scored tokens.
        spans: Number of scored spans.
        score: Share of the gold strings in the generated text; None if nothing was generated.
        text: The generated text.
        prefill_s: Seconds to read the prompt.
        decode_ms: Median milliseconds of a decoding step; None for fewer than four steps.
        cache_bytes: Size of the cache after the prompt.
    """

    tokens: int
    forced: float
    forced_tokens: float
    nll: float
    spans: int
    score: float | None
    text: str | None
    prefill_s: float
    decode_ms: float | None
    cache_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return dataclasses.asdict(self)


@torch.inference_mode()
def run_case(model: nn.Module, tokenizer: Any, case: Case) -> Outcome:
    """Run a case; its prompt is read only once.

    Generation is greedy and ends at the tokenizer's end token, or when the text has every gold string.

    Raises:
        CheckFailedError: A logit is not finite (EV04).
    """
    from transformers import DynamicCache

    # Read the prompt, timed.
    device = next(model.parameters()).device
    prompt = torch.tensor([case.prompt_ids], device=device)
    cache = DynamicCache(config=model.config)
    began = _now(device)
    logits = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    _check(logits, case)
    prefill = _now(device) - began

    size = cache_bytes(cache)
    # The answer is fed to the cache and removed again; a cache that cannot remove tokens is copied.
    croppable = all(layer.is_croppable for layer in cache.layers)
    scores = _force(model, cache if croppable else copy.deepcopy(cache), case, logits[0, -1:].float())

    # Free generation continues from the same prompt.
    score = None
    text = None
    decode = None
    if case.max_new and case.gold:
        first = int(logits[0, -1].argmax())
        text, decode = _generate(model, tokenizer, cache, case, first)
        score = case.score(text)

    return Outcome(
        tokens=len(case.prompt_ids),
        **scores,
        spans=len(case.spans),
        score=score,
        text=text,
        prefill_s=prefill,
        decode_ms=decode,
        cache_bytes=size,
    )


def _force(model: nn.Module, cache: Any, case: Case, last: Tensor) -> dict[str, float]:
    """Score the answer by teacher forcing, and remove it from the cache again where that is possible.

    Args:
        model: The model.
        cache: Cache with the prompt.
        case: The case.
        last: ``[1, V]`` logits of the prompt's last token.

    Returns:
        ``forced``, ``forced_tokens`` and ``nll`` of :class:`Outcome`.
    """
    answer = torch.tensor([case.answer_ids], device=last.device)
    steps = [
        model(input_ids=step, past_key_values=cache, use_cache=True).logits[0].float()
        for step in answer.split(STEP_TOKENS, 1)  # a longer call would be read like a prompt
    ]

    logits = torch.cat(steps)
    _check(logits, case)
    if all(layer.is_croppable for layer in cache.layers):
        cache.crop(-answer.shape[1])

    # [A, V] logits of the position before each answer token.
    logits = torch.cat([last, logits[:-1]])
    right = (logits.argmax(-1) == answer[0]).cpu()
    nll = -logits.log_softmax(-1).gather(1, answer[0][:, None])[:, 0].cpu()

    # Only the spans count; answers may have tokens in between that are not scored.
    whole = [float(right[a:b].all()) for a, b in case.spans]
    inside = torch.cat([torch.arange(a, b) for a, b in case.spans])

    return {
        "forced": sum(whole) / len(whole),
        "forced_tokens": right[inside].float().mean().item(),
        "nll": nll[inside].double().mean().item(),
    }


def _generate(
    model: nn.Module, tokenizer: Any, cache: Any, case: Case, first: int
) -> tuple[str, float | None]:
    """Return the greedy continuation, and the median milliseconds of a decoding step.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        cache: Cache with the prompt.
        case: The case.
        first: The first generated token.
    """
    stop = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    end = {tokenizer.eos_token_id, *(stop if isinstance(stop, list) else [stop])}

    out = [first]
    times = []
    while len(out) < case.max_new and out[-1] not in end:
        # Every few tokens: stop when the answer is complete.
        text = tokenizer.decode(out, skip_special_tokens=True)
        if len(out) % 8 == 0 and case.score(text) == 1:
            break

        began = _now(cache.layers[0].keys.device)
        step = torch.tensor([[out[-1]]], device=cache.layers[0].keys.device)
        logits = model(input_ids=step, past_key_values=cache, use_cache=True).logits[0, -1]
        _check(logits, case)
        out.append(int(logits.argmax()))
        times.append(_now(logits.device) - began)

    # The median is robust to single slow steps; few steps give no figure.
    times.sort()
    middle = 1000 * times[len(times) // 2] if len(times) >= 4 else None
    return tokenizer.decode(out, skip_special_tokens=True), middle


def _check(logits: Tensor, case: Case) -> None:
    """Raise CheckFailedError (EV04) if a logit is not finite."""
    if not torch.isfinite(logits).all():
        raise CheckFailedError(
            f"the model's logits are not finite on {case.task} at {case.length} tokens", code="EV04"
        )


def _now(device: torch.device) -> float:
    """Return the time after all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
