"""Generate text from a dense or converted checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import TextStreamer

from nsa_convert.chat import render_chat
from nsa_convert.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """One continuation.

    Attributes:
        prompt: What the model was given, chat template included.
        text: The continuation, special tokens left out.
        prompt_tokens: Tokens of the prompt.
        new_tokens: Tokens generated, a final end token included.
        stopped: ``"end"`` (the model ended the text) or ``"length"``.
    """

    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    stopped: str


class _PieceStreamer(TextStreamer):
    """Hands finished pieces of text to a callback instead of printing them."""

    def __init__(self, tokenizer: Any, callback: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.callback = callback

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Receive the next piece; whole words, so that multi-token characters arrive in one piece."""
        if text:
            self.callback(text)


@torch.inference_mode()
def generate_text(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    chat: bool = False,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stream: Callable[[str], None] | None = None,
) -> Generation:
    """Continue a prompt; greedy unless a temperature is given.

    Args:
        model: A causal language model of transformers, converted or dense.
        tokenizer: Its tokenizer.
        prompt: The text to continue, or the user's message with ``chat``.
        max_new_tokens: Upper bound of the continuation.
        chat: Put the prompt into the tokenizer's chat template as a user turn.
        temperature: 0 takes the likeliest token; above 0 tokens are drawn.
        top_p: Draw from the likeliest tokens that hold this much probability.
        seed: Of the draws; torch's global state is left as it was.
        stream: Called with each piece of text as soon as it is complete.

    Returns:
        The continuation.

    Raises:
        UsageError: An empty prompt or a bad number.
        ConfigError: A prompt that leaves no room below the model's positions, or ``chat`` without a template.
    """
    _check_options(max_new_tokens, temperature, top_p)

    # The prompt, and room for the answer.
    text = render_chat(tokenizer, [{"role": "user", "content": prompt}]) if chat else prompt
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not chat, verbose=False).to(model.device)
    count = inputs["input_ids"].shape[1]
    _check_room(count, max_new_tokens, getattr(model.config, "max_position_embeddings", None))

    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p}
        if temperature
        else {
            # Sampling settings of the checkpoint would only cause warnings in greedy search.
            "do_sample": False,
            "temperature": None,
            "top_p": None,
            "top_k": None,
        }
    )

    # The config gives one end token, a list, or none.
    end = model.generation_config.eos_token_id
    ends = set(end) if isinstance(end, (list, tuple)) else {end}

    # Seeded draws that leave torch's global state alone.
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            pad_token_id=_pad_token(tokenizer, ends),
            streamer=None if stream is None else _PieceStreamer(tokenizer, stream),
            **sampling,
        )

    new = out[0, count:]
    stopped = "end" if len(new) and int(new[-1]) in ends else "length"

    return Generation(
        prompt=text,
        text=tokenizer.decode(new, skip_special_tokens=True),
        prompt_tokens=count,
        new_tokens=len(new),
        stopped=stopped,
    )


def _check_options(max_new_tokens: int, temperature: float, top_p: float) -> None:
    problems = []
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if temperature < 0:
        problems.append(f"temperature must be 0 (greedy) or more, got {temperature}")
    if not 0 < top_p <= 1:
        problems.append(f"top_p must be above 0 and at most 1, got {top_p}")

    if problems:
        raise UsageError("; ".join(problems), code="CL02")


def _check_room(prompt_tokens: int, max_new_tokens: int, positions: int | None) -> None:
    if prompt_tokens == 0:
        raise UsageError("the prompt is empty", code="CL02", hint="give at least one token of text")

    if positions and prompt_tokens + max_new_tokens > positions:
        raise ConfigError(
            f"the prompt has {prompt_tokens} tokens; with {max_new_tokens} new ones that is beyond the "
            f"{positions} positions of the model",
            code="EV01",
            expected=f"at most {positions} tokens in all",
            found=str(prompt_tokens + max_new_tokens),
            hint="shorten the prompt or lower --max-new-tokens",
        )


def _pad_token(tokenizer: Any, ends: set[int | None]) -> int | None:
    """Return the pad token or an end token: generate() warns without one, though nothing is padded."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id

    return next((end for end in sorted(filter(None, ends))), None)
