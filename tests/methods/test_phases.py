"""One method for the prompt, another one for decoding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from nsa_convert.config import AttentionGeometry, SparseAttentionConfig
from nsa_convert.errors import ConfigError
from nsa_convert.loading import load_causal_model
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

FULL = {"method": "full"}
GREEDY = {"max_new_tokens": 12, "do_sample": False}
DENSE_PROMPT = {**QUEST, "prefill": "dense"}


def phases(prefill: dict, decode: dict, **scope: object) -> dict:
    """Return a rule for each phase, as a default and further rules have them; or both with a scope."""
    first = {**prefill, **({**scope, "phase": "prefill"} if scope else {})}
    return {**first, "rules": [{**decode, **scope, "phase": "decode"}]}


def pair_of(prefill: object, decode: object) -> dict:
    """Return the rule by which older plans name both."""
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
    pair = patch_model(dense_model("llama"), plan(phases(FULL, QUEST)))
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
        patch_model(dense_model("qwen2"), plan(phases(FULL, {**STREAMING, "cache": cache})))
        for cache in ("keep", "evict")
    )
    cache = DynamicCache(config=forgotten.config)
    out = forgotten.generate(prompt, past_key_values=cache, **GREEDY)
    assert torch.equal(out, kept.generate(prompt, **GREEDY))
    assert cache.layers[0].held[0].keys.shape[2] < 20


def test_in_a_hybrid() -> None:
    both = phases(XATTENTION, QUEST, layers=[0, 2], heads=[1])
    model = patch_model(dense_model("llama"), plan(STREAMING, *both.pop("rules"), both))
    ids = tokens(1, 120)
    dense = dense_model("llama")
    cache = DynamicCache(config=model.config)
    logits(model, ids[:, :100], past_key_values=cache)
    assert torch.isfinite(logits(model, ids[:, 100:110], past_key_values=cache)).all()
    assert (logits(model, ids[:, :15]) - logits(dense, ids[:, :15])).abs().max() < 1e-10


def test_plans_are_stored_as_they_are_given() -> None:
    given = plan(phases({"method": "xattention"}, {"method": "quest", "num_blocks": 8}))
    assert SparseAttentionConfig.from_dict(given.to_dict()) == given


# Heads of both kinds, a method that learns in either phase, a dense layer.
LEARNED = {**NSA, "key_compressor": "mlp"}
OLD_RULES = [{**pair_of(LEARNED, "full"), "layers": [0], "heads": [1]}, {"method": "full", "layers": [2]}]
OLD = {"default": pair_of(DSA, LEARNED), "rules": OLD_RULES}
NEW = {
    "default": DSA,
    "rules": [
        {**LEARNED, "layers": [0], "heads": [1], "phase": "prefill"},
        {"method": "full", "layers": [2]},
        {**LEARNED, "phase": "decode"},
        {"method": "full", "layers": [0], "heads": [1], "phase": "decode"},
    ],
}


def test_a_saved_model_of_the_older_form_is_the_same_model(tmp_path: Path) -> None:
    """``phases`` was a method; folders of older versions have its plans, and its names of weights."""
    model = patch_model(dense_model("llama"), SparseAttentionConfig.from_dict(NEW))
    for name, parameter in model.named_parameters():
        if ".sparse." in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    names = {name.partition(".sparse.")[2].partition(".compress")[0] for name in model.state_dict()}
    assert {"decode", "parts.0.decode", "parts.1.prefill"} <= names
    model.save_pretrained(tmp_path)

    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert config["sparse_attention"] == NEW
    file.write_text(json.dumps({**config, "sparse_attention": OLD}))
    loaded = load_causal_model(tmp_path, torch.float64)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    ids = tokens(1, 90)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert torch.equal(loaded.generate(ids, **GREEDY), model.generate(ids, **GREEDY))


@pytest.mark.parametrize(
    "given", [OLD, pair_of(DSA, LEARNED), pair_of("xattention", "quest")], ids=["plan", "method", "names"]
)
def test_older_plans_are_read_as_the_new_form(given: dict) -> None:
    patched = patch_model(dense_model("llama", num_hidden_layers=3), given)
    default = patched.config.sparse_attention["default"]
    assert default["method"] in ("dsa", "xattention")
    assert {layer.spec.name for layer in sparse_methods(patched)} <= {"phases", "hybrid", "full"}


@pytest.mark.parametrize(
    ("prefill", "decode", "message"),
    [
        ("xatention", "full", "did you mean 'xattention'"),
        ("full", {"method": "quest", "num_block": 3}, r"\(quest\): unknown key 'num_block'.*num_blocks"),
        ("full", {"num_blocks": 3}, "decode must be a name, or a mapping with 'method'"),
        ("full", {"method": "quest", "layers": [1]}, "decode must be a name, or a mapping with 'method'"),
        ("phases", "full", "prefill cannot be phases again"),
        ("full", 3, "decode must be a text or a mapping, got 3"),
        ("full", "h2o", "decode: h2o has to read the prompt itself"),
        ("streaming", "full", "prefill: streaming forgets tokens"),
        ({"method": "moba", "key_conv": 3}, "full", "prefill: moba changes the keys"),
        ("full", {**QUEST, "reuse_from": 0}, "reuse_from is not possible"),
    ],
)
def test_pairs_that_cannot_be(prefill: object, decode: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        patch_model(dense_model("llama"), plan(pair_of(prefill, decode)))


GEOMETRY = AttentionGeometry(hidden_size=48, num_query_heads=6, num_kv_heads=3, head_dim=8)


def test_heads_that_choose_together_stay_together_in_a_hybrid() -> None:
    """DSA has one list for all its heads, whichever phase it serves."""
    for decode, parts in ((DSA, [(0, 2)]), (QUEST, [(0,), (2,)])):
        both = phases(FULL, decode, layers=[0], heads=[0, 2])
        layer = build_layer(plan(FULL, *both.pop("rules"), both), GEOMETRY, 0)
        assert [part.heads for part in layer.settings if part.method.spec.name == "phases"] == parts


def test_heads_may_differ_in_one_phase_alone() -> None:
    """A mix of mixes; not where a method would have to choose for some of its heads apart from the others."""
    rule = {**QUEST, "layers": [0], "heads": [1], "phase": "decode"}
    layer = build_layer(plan(XATTENTION, rule), GEOMETRY, 0)
    assert [(part.method.spec.name, part.heads) for part in layer.settings] == [
        ("xattention", (0,)),
        ("phases", (1,)),
        ("xattention", (2,)),
    ]
    with pytest.raises(ConfigError, match="dsa chooses for all its heads together"):
        build_layer(plan(DSA, rule), GEOMETRY, 0)
