"""Gradients through a cache: those of the uncached pass."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from nsa_convert.errors import CacheError, ConfigError
from nsa_convert.methods.parts.base import CacheNeeds
from nsa_convert.methods.parts.inputs import CachedPart
from nsa_convert.patch.attention import SparseAttention, _source
from nsa_convert.patch.pooling import pool_sequence
from tests.models import tokens, trained_model
from tests.patch.test_cache import ALL, MORE, NAMES, PROMPT, leaves, needs_its_own
from tests.patch.test_eviction import LOSSY

pytest.importorskip("peft")
from peft import PrefixTuningConfig, get_peft_model


def uncached_after(monkeypatch: pytest.MonkeyPatch, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Let sparse layers see keys and values in front of their own, without anything of a cache."""

    def remember(
        self: SparseAttention,
        k: Tensor,
        v: Tensor,
        own: dict,
        needs: CacheNeeds,
        cache: object,
        context: object,
    ) -> tuple:
        k, v = (
            torch.cat([x.transpose(1, 2), new], 1)
            for x, new in zip(pairs[self.layer_idx], (k, v), strict=True)
        )
        cells = {p.name: pool_sequence(self.sparse, p, _source(p, k, v), context) for p in needs.pools}
        return (CachedPart(k=k, v=v, layout=context.layout),), cells, own

    monkeypatch.setattr(SparseAttention, "_remember", remember)
    monkeypatch.setattr("nsa_convert.patch.attention.evict", lambda *_: None)


@pytest.mark.parametrize("name", NAMES)
def test_prefix_tuning(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A learned prefix is a cache of keys and values with gradients: all are right, or it is refused."""
    model, ids = trained_model("llama", ALL[name]), tokens(1, 45)
    length = 10 if name in LOSSY else 20  # so many that the layer forgets none a dense one would read
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length)
    torch.manual_seed(3)
    tuned = get_peft_model(model, config).double()
    run = partial(tuned, input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    if needs_its_own(model):
        with pytest.raises(CacheError, match="read the prompt again"):
            run()
        return
    sparse = [leaf for leaf in leaves(model) if leaf.reach().visible_budget < 65]
    if any(getattr(leaf, "needs_prompt_end", False) for leaf in sparse):
        with pytest.raises(ConfigError, match="cannot read a prompt in chunks"):
            run()
        return
    loss = run().loss
    loss.backward()
    (weight,) = (p for n, p in tuned.named_parameters() if "prompt_encoder" in n and p.requires_grad)
    found, weight.grad = weight.grad, None
    assert found.abs().max() > 1e-6 or name == "streaming-no-sinks"  # which sees one token
    pairs = [(layer.keys, layer.values) for layer in tuned.get_prompt(1).layers]
    uncached_after(monkeypatch, pairs)
    expected = run().loss
    expected.backward()
    assert abs(loss - expected) < 1e-9
    assert (found - weight.grad).abs().max() < 1e-9


@pytest.mark.parametrize(
    "name", ["nsa-learned-before-rope", "ssa-learned", "moba-conv", "dsa-shared", "hybrid"]
)
def test_gradients_through_two_calls(name: str) -> None:
    """A text read in two calls on one cache has the gradients of one call."""
    model, ids = trained_model("llama", ALL[name]).train(), tokens(2, PROMPT + MORE)
    parts = (ids[:, :PROMPT], ids[:, PROMPT:])

    def gradients(calls: tuple[Tensor, ...]) -> dict[str, Tensor]:
        model.zero_grad()
        cache = DynamicCache()
        out = torch.cat([model(part, past_key_values=cache).logits for part in calls], 1)
        out.logsumexp(-1).square().mean().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    whole, halves = gradients((ids,)), gradients(parts)
    assert whole.keys() == halves.keys()
    assert max((whole[n] - halves[n]).abs().max() for n in whole) < 1e-9
