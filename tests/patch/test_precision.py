"""Every method in every precision, with every cache: what a dense model does there, within its own rounding.

Each call is compared with the same call in float32; the yardstick is how far the dense model of the same
weights is off. A choice of keys that flips by rounding moves single tokens, so the middle of the differences
is compared, not the largest.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from nsa_convert.methods.parts.mix import leaves_of
from nsa_convert.methods.parts.registry import METHODS
from nsa_convert.patch.patching import sparse_methods
from tests.models import EVERY, dense_model, tokens, trained_model

FORMS = {
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "bf16": (torch.bfloat16, None),
    "bf16-autocast": (torch.bfloat16, torch.bfloat16),
    "fp16-mixed": (torch.float32, torch.float16),
    "fp16": (torch.float16, None),
}
"""Name -> dtype of the weights, dtype of autocast. The trainer's ``precision: bf16`` has both in bfloat16."""
LENGTH, PROMPT, CHUNK = 56, 40, 12
FIRST = {settings["method"]: name for name, settings in reversed(EVERY.items())}
"""One variant of each method."""
LONG = {"infllm"}  # it reads a prompt query by query here


def table(variants: list[str]) -> list:
    """Return all pairs of variant and precision, slow but for the recipes' own and for one method in each."""
    quick = {(name, "bf16-mixed") for name in FIRST.values() if name not in LONG}
    quick |= {("nsa", form) for form in FORMS}
    pairs = [(name, form) for name in variants for form in FORMS]
    return [pair if pair in quick else pytest.param(*pair, marks=pytest.mark.slow) for pair in pairs]


TRAINED = [name for name in EVERY if METHODS[EVERY[name]["method"]].spec.trainable]


def autocast(dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    return torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext()


def text(model: PreTrainedModel) -> torch.Tensor:
    return model(tokens(2, LENGTH), use_cache=False).logits


def steps(model: PreTrainedModel, make: Callable) -> torch.Tensor:
    """Read a prompt, a chunk, then single tokens."""
    cache, ids = make(model), tokens(2, LENGTH)
    bounds = [0, PROMPT, *range(PROMPT + CHUNK, LENGTH + 1)]
    pairs = zip(bounds, bounds[1:], strict=False)
    return torch.cat([model(ids[:, a:b], past_key_values=cache).logits for a, b in pairs], 1)


CALLS = {
    "no cache": text,
    "dynamic cache": functools.partial(steps, make=lambda _: DynamicCache()),
    "static cache": functools.partial(
        steps, make=lambda model: StaticCache(model.config, max_cache_len=LENGTH + 8)
    ),
}


def calls(model: PreTrainedModel) -> dict[str, Callable]:
    leaves = leaves_of(sparse_methods(model))
    evicts = any(leaf.cache_needs().policy is not None for leaf in leaves)
    return {name: call for name, call in CALLS.items() if not (evicts and name == "static cache")}


@functools.cache
def rounding(form: str) -> float:
    """Return how far the dense model is off, in the middle."""
    weights, cast = FORMS[form]
    with torch.no_grad():
        want = text(dense_model("llama", initializer_range=0.1).float())
        with autocast(cast):
            got = text(dense_model("llama", initializer_range=0.1).to(weights))
    return (got.float() - want).abs().median().item()


@pytest.mark.parametrize(("variant", "form"), table(list(EVERY)))
def test_every_call_is_right_within_rounding(variant: str, form: str) -> None:
    weights, cast = FORMS[form]
    exact = trained_model("llama", EVERY[variant], initializer_range=0.1).float()
    model = trained_model("llama", EVERY[variant], initializer_range=0.1).to(weights)
    with torch.no_grad():
        for name, call in calls(model).items():
            want = call(exact)
            with autocast(cast):
                got = call(model)
            assert got.dtype == (cast or weights), name
            assert (got.float() - want).abs().median().item() < 3 * rounding(form), name


@pytest.mark.parametrize(("variant", "form"), table(list(EVERY)))
def test_generate_runs(variant: str, form: str) -> None:
    weights, cast = FORMS[form]
    model = trained_model("llama", EVERY[variant], initializer_range=0.1).to(weights)
    with autocast(cast):
        out = model.generate(tokens(2, 37), max_new_tokens=3, do_sample=False)
    assert out.shape == (2, 40)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["eager", "checkpointing"])
@pytest.mark.parametrize(("variant", "form"), table(TRAINED))
def test_gradients_are_right_within_rounding(variant: str, form: str, checkpointing: bool) -> None:
    """With the losses that teach what chooses; the direction of the whole gradient is that of float32.

    In one model a choice may flip: weights that are only rounded to bfloat16, and computed with in float32,
    turn a gradient as far as 0.966 then. So it is the middle of three models that must agree.
    """
    weights, cast = FORMS[form]
    cosines = []
    for seed in range(3):
        want_out, want = gradients(variant, seed, torch.float32, None, checkpointing=False)
        got_out, got = gradients(variant, seed, weights, cast, checkpointing=checkpointing)
        assert got.keys() == want.keys()
        assert abs(got_out.loss - want_out.loss) < 0.02 * want_out.loss

        aux = getattr(got_out, "aux_loss", None)
        if aux is not None:
            assert aux.dtype == torch.float32
            assert aux > 0
        a, b = (torch.cat([grads[name].float().flatten() for name in want]) for grads in (got, want))
        cosines.append(torch.nn.functional.cosine_similarity(a, b, 0).item())
    assert statistics.median(cosines) > 0.99


def gradients(
    variant: str, seed: int, dtype: torch.dtype, kind: torch.dtype | None, *, checkpointing: bool
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return the output of a forward pass with labels, and the gradient of each weight that has one."""
    ids = tokens(2, LENGTH)
    model = trained_model("llama", EVERY[variant], seed, initializer_range=0.1).to(dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    with autocast(kind):
        out = model(ids, labels=ids, use_cache=False)
    out.loss.backward()

    assert torch.isfinite(out.loss)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(grad.dtype == dtype for grad in grads.values())
    return out, grads
