"""One method for the prompt, another one for decoding."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from nsa_convert.config import AttentionGeometry, SparseAttentionConfig
from nsa_convert.errors import ConfigError
from nsa_convert.methods.parts.registry import build_layer
from nsa_convert.patch.patching import patch_model, sparse_methods
from tests.models import (
    DSA,
    INFLLM_V2,
    NSA,
    QUEST,
    STREAMING,
    XATTENTION,
    dense_model,
    plan,
    tokens,
    trained_model,
)

GREEDY = {"max_new_tokens": 12, "do_sample": False}
DENSE_PROMPT = {**QUEST, "prefill": "dense"}


def phases(prefill: dict | str, decode: dict | str) -> dict:
    return {"method": "phases", "prefill": prefill, "decode": decode}


def logits(model: PreTrainedModel, ids: torch.Tensor, **options: object) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


@pytest.mark.parametrize(
    "settings",
    [DSA, {**NSA, "branch_kv": "independent", "key_compressor": "weighted"}, INFLLM_V2],
    ids=["streams", "further keys and values", "cells"],
)
def test_the_same_method_twice_is_that_method(settings: dict) -> None:
    """Weights, cells, streams and further heads of both parts come from and go to their own places."""
    model = trained_model("qwen3", settings)
    pair = patch_model(dense_model("qwen3"), plan(phases(settings, settings)))
    for one, both in zip(sparse_methods(model), sparse_methods(pair), strict=True):
        both.prefill.load_state_dict(one.state_dict())
        both.decode.load_state_dict(one.state_dict())
    prompt = tokens(2, 61)
    expected = model.generate(prompt, use_cache=False, **GREEDY)
    assert torch.equal(pair.generate(prompt, **GREEDY), expected)
    assert torch.equal(pair.generate(prompt, cache_implementation="static", **GREEDY), expected)


def test_a_dense_prompt_and_quest_is_quest() -> None:
    prompt = tokens(2, 90)
    expected = patch_model(dense_model("llama"), plan(DENSE_PROMPT)).generate(prompt, **GREEDY)
    pair = patch_model(dense_model("llama"), plan(phases("full", QUEST)))
    assert torch.equal(pair.generate(prompt, **GREEDY), expected)


def test_each_call_runs_the_method_of_its_phase() -> None:
    ids = tokens(1, 130)
    prompt, steps = ids[:, :120], ids[:, 120:]
    alone = patch_model(dense_model("llama"), plan(XATTENTION))
    pair = patch_model(dense_model("llama"), plan(phases(XATTENTION, QUEST)))
    caches = [DynamicCache(config=model.config) for model in (alone, pair)]
    first = [logits(m, prompt, past_key_values=c) for m, c in zip((alone, pair), caches, strict=True)]
    assert torch.equal(*first)
    dense, paged = (logits(m, steps, past_key_values=c) for m, c in zip((alone, pair), caches, strict=True))
    assert (dense - paged).abs().max() > 1e-3
    assert not sparse_methods(pair)[0].reach().is_causal


def test_what_decoding_forgets_is_not_kept() -> None:
    prompt = tokens(2, 60)
    kept, forgotten = (
        patch_model(dense_model("qwen2"), plan(phases("full", {**STREAMING, "cache": cache})))
        for cache in ("keep", "evict")
    )
    cache = DynamicCache(config=forgotten.config)
    out = forgotten.generate(prompt, past_key_values=cache, **GREEDY)
    assert torch.equal(out, kept.generate(prompt, **GREEDY))
    assert cache.layers[0].held[0].keys.shape[2] < 20


def test_in_a_hybrid() -> None:
    rules = [{**phases(XATTENTION, QUEST), "layers": [0, 2], "heads": [1]}]
    model = patch_model(dense_model("llama"), plan({**STREAMING, "rules": rules}))
    ids = tokens(1, 120)
    dense = dense_model("llama")
    cache = DynamicCache(config=model.config)
    logits(model, ids[:, :100], past_key_values=cache)
    assert torch.isfinite(logits(model, ids[:, 100:110], past_key_values=cache)).all()
    assert (logits(model, ids[:, :15]) - logits(dense, ids[:, :15])).abs().max() < 1e-10


def test_plans_are_stored_as_they_are_given() -> None:
    given = plan(phases("xattention", {"method": "quest", "num_blocks": 8}))
    assert SparseAttentionConfig.from_dict(given.to_dict()) == given


@pytest.mark.parametrize(
    ("prefill", "decode", "message"),
    [
        ("xatention", "full", "did you mean 'xattention'"),
        (
            "full",
            {"method": "quest", "num_block": 3},
            r"decode \(quest\): unknown key 'num_block'.*num_blocks",
        ),
        ("full", {"num_blocks": 3}, "decode must be a mapping with 'method'"),
        ("full", {"method": "quest", "layers": [1]}, "decode must be a mapping with 'method'"),
        ("phases", "full", "prefill cannot be phases again"),
        ("full", 3, "decode must be"),
        ("full", "h2o", "decode: h2o has to read the prompt itself"),
        ("streaming", "full", "prefill: streaming forgets tokens"),
        ({"method": "moba", "key_conv": 3}, "full", "prefill: moba changes the keys"),
        ("full", {**QUEST, "reuse_from": 0}, "reuse_from is not possible"),
    ],
)
def test_pairs_that_cannot_be(prefill: object, decode: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        patch_model(dense_model("llama"), plan(phases(prefill, decode)))


def test_heads_that_choose_together_stay_together_in_a_hybrid() -> None:
    """DSA has one list for all its heads, whichever phase it serves."""
    geometry = AttentionGeometry(hidden_size=48, num_query_heads=6, num_kv_heads=3, head_dim=8)
    for method, parts in ((phases("full", DSA), [(0, 2)]), (phases("full", QUEST), [(0,), (2,)])):
        rule = {**method, "layers": [0], "heads": [0, 2]}
        sparse = plan({"method": "full"}, rule)
        layer = build_layer(sparse, geometry, 0)
        assert [part.heads for part in layer.settings if part.method.spec.name == "phases"] == parts
