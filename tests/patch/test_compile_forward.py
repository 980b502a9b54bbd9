"""torch.compile of whole forwards: as many graphs as the dense model's, no break, the numbers of eager."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import DynamicCache, PreTrainedModel, StaticCache

from nsa_convert.methods.registry import METHODS
from tests.models import VARIANTS, dense_model, tokens, trained_model

TRAINABLE = [name for name, method in METHODS.items() if method.spec.trainable]
KINDS = ("training", "scoring", "padded", "prefill-dynamic", "prefill-static")
IDS = tokens(2, 70)
# Every trainable method has a variant of its own name; other variants differ from it in an option.
ALL_METHODS = {"method": TRAINABLE[0], **VARIANTS[TRAINABLE[0]]}
ALL_METHODS["rules"] = [{**VARIANTS[name], "layers": [i]} for i, name in enumerate(TRAINABLE)]
PLANS = {"one layer of each trainable method": ALL_METHODS} | {
    name: settings for name, settings in VARIANTS.items() if settings["method"] in TRAINABLE
}
QUICK = ("training", "prefill-static")
CASES = [
    pytest.param(
        plan, kind, marks=() if PLANS[plan] is ALL_METHODS and kind in QUICK else pytest.mark.slow
    )
    for plan in PLANS
    for kind in KINDS
]


def call(model: PreTrainedModel, forward, kind: str) -> list[torch.Tensor]:
    """Return what one kind of call computes: logits, and gradients or what is cached."""
    if kind == "training":
        model.zero_grad()
        out = forward(input_ids=IDS, labels=IDS, use_cache=False)
        out.loss.backward()
        return [out.logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    with torch.no_grad():
        if kind == "scoring":
            return [forward(input_ids=IDS, use_cache=False).logits]
        mask = torch.ones_like(IDS)
        mask[0, :30] = 0
        if kind == "padded":
            return [forward(input_ids=IDS, attention_mask=mask, use_cache=False).logits]
        cache = DynamicCache() if kind == "prefill-dynamic" else StaticCache(model.config, max_cache_len=96)
        out = forward(input_ids=IDS, attention_mask=mask, past_key_values=cache)
        held = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        step = model(IDS[:, :1], attention_mask=_grown(mask), past_key_values=cache)  # the cache is of use
        return [out.logits, step.logits, *held]


def _grown(mask: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(mask, (0, 1), value=1)


def compiled(model: PreTrainedModel, kind: str) -> tuple[list[torch.Tensor], int, int]:
    """Return what a compiled call computes, its graphs and its breaks."""
    torch._dynamo.reset()
    counters.clear()
    counting = CompileCounterWithBackend("aot_eager")
    values = call(model, torch.compile(model.forward, backend=counting), kind)
    return values, counting.frame_count, sum(counters["graph_break"].values())


@functools.cache
def dense_graphs(kind: str) -> tuple[int, int]:
    """Return graphs and breaks of the dense model."""
    model = dense_model("llama", num_hidden_layers=1).train(kind == "training")
    return compiled(model, kind)[1:]


@pytest.mark.parametrize(("plan", "kind"), CASES)
def test_as_many_graphs_as_the_dense_model(plan: str, kind: str) -> None:
    layers = len(TRAINABLE) if PLANS[plan] is ALL_METHODS else 3
    model = trained_model("llama", PLANS[plan], num_hidden_layers=layers)
    model.train(kind == "training")
    expected = call(model, model.forward, kind)
    values, *graphs = compiled(model, kind)
    assert tuple(graphs) == dense_graphs(kind) == (1, 0)
    for value, right in zip(values, expected, strict=True):
        assert torch.allclose(value, right, atol=1e-10, rtol=1e-10)
