"""Caches that forget: what is left, in how many bytes, and that generation goes on as it should."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from nsa_convert.errors import CacheError
from nsa_convert.estimate import context_costs
from nsa_convert.patch.eviction import cache_bytes
from nsa_convert.patch.patching import patch_model, sparse_methods, unpatch_model, with_full_budget
from nsa_convert.plan import resolve_plan
from tests.marks import slow, these_quick
from tests.models import EVICTING as PLANS
from tests.models import FAMILIES, NSA, dense_model, plan, tokens, trained_model

EVICTING, INFLLM, H2O, RAZOR = (PLANS[name] for name in ("streaming-evict", "infllm", "h2o", "razor"))
MIXED = {**EVICTING, "rules": [{"method": "full", "layers": [0, 2], "heads": [1]}]}
NEXT_TO_CELLS = {**EVICTING, "rules": [{**NSA, "layers": [0, 1], "heads": [1]}]}
EXACT = {
    "absolute": EVICTING,
    "cache": {**EVICTING, "positions": "cache"},
    "no-sinks": {**EVICTING, "num_sinks": 0, "window_size": 1},
    "mixed": MIXED,
    "beside-cells": NEXT_TO_CELLS,
}
"""Plans that forget nothing a later query can see: the cache changes nothing."""
GREEDY = {"max_new_tokens": 14, "do_sample": False}


@pytest.fixture(params=these_quick(EXACT, ["absolute", "cache", "beside-cells"]), scope="module")
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return trained_model("qwen3", EXACT[request.param])


@pytest.fixture(scope="module")
def prompt() -> torch.Tensor:
    return tokens(1, 53)


@pytest.fixture(scope="module")
def expected(model: PreTrainedModel, prompt: torch.Tensor) -> torch.Tensor:
    return model.generate(prompt, use_cache=False, **GREEDY)


def padded_batch(*lengths: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    prompts = [tokens(1, n, seed=n) for n in lengths]
    width = max(lengths)
    ids = torch.cat([torch.nn.functional.pad(p, (width - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (width - p.shape[1], 0)) for p in prompts])
    return ids, mask, prompts


class TestGenerate:
    @pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 7}], ids=["dynamic", "chunked"])
    def test_greedy(self, model, prompt, expected, options) -> None:
        assert torch.equal(model.generate(prompt, **options, **GREEDY), expected)

    def test_beam_search(self, model, prompt) -> None:
        beams = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
        assert torch.equal(model.generate(prompt, **beams), model.generate(prompt, use_cache=False, **beams))

    @pytest.mark.parametrize(
        "options",
        [{}, {"prefill_chunk_size": 9}, slow({"num_beams": 3})],
        ids=["dynamic", "chunked", "beam"],
    )
    def test_left_padded_batch(self, model, options) -> None:
        ids, mask, prompts = padded_batch(53, 20, 37, 5)
        beams = {"num_beams": 3} if "num_beams" in options else {}
        out = model.generate(ids, attention_mask=mask, **options, **GREEDY)[:, 53:]
        for row, alone in zip(out, prompts, strict=True):
            single = model.generate(alone, use_cache=False, **beams, **GREEDY)[0, alone.shape[1] :]
            assert torch.equal(row, single)

    def test_several_turns_on_one_cache(self, model, prompt) -> None:
        cache, text = DynamicCache(config=model.config), prompt
        for turn in range(3):
            expected = model.generate(text, use_cache=False, **GREEDY)
            out = model.generate(text, past_key_values=cache, **GREEDY)
            assert torch.equal(out, expected), turn
            text = torch.cat([out, tokens(1, 11 + turn, seed=turn)], 1)

    @pytest.mark.parametrize("lengths", [37, 11], ids=["full", "part"])
    def test_rows_are_dropped_and_repeated(self, model, lengths) -> None:
        ids, mask, _ = padded_batch(53, 9, lengths)
        cache = DynamicCache()
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
            cache.batch_select_indices(torch.tensor([2, 1]))
            cache.batch_repeat_interleave(2)
            rows = [2, 2, 1, 1]
            new = tokens(4, 3, seed=7)
            longer = torch.cat([mask[rows], torch.ones_like(new)], 1)
            out = model(new, attention_mask=longer, past_key_values=cache).logits
            whole = torch.cat([ids[rows], new], 1)
            expected = model(whole, attention_mask=longer, use_cache=False).logits[:, -3:]
        assert (out - expected).abs().max() < 1e-10

    def test_token_by_token_equals_one_pass(self, model, prompt) -> None:
        cache = DynamicCache()
        with torch.no_grad():
            steps = [model(prompt[:, i : i + 1], past_key_values=cache).logits for i in range(53)]
            assert (torch.cat(steps, 1) - model(prompt, use_cache=False).logits).abs().max() < 1e-10
        assert cache.get_seq_length() == 53

    def test_a_copied_cache_goes_its_own_way(self, model, prompt) -> None:
        cache = DynamicCache()
        with torch.no_grad():
            model(prompt, past_key_values=cache)
            other = copy.deepcopy(cache)
            expected = model(tokens(1, 4, seed=5), past_key_values=copy.deepcopy(cache)).logits
            model(tokens(1, 4, seed=6), past_key_values=other)
            assert torch.equal(model(tokens(1, 4, seed=5), past_key_values=cache).logits, expected)

    def test_a_reset_cache_starts_again(self, model, prompt, expected) -> None:
        cache = DynamicCache()
        with torch.no_grad():
            model(tokens(1, 40, seed=3), past_key_values=cache)
        cache.reset()
        assert torch.equal(model.generate(prompt, past_key_values=cache, **GREEDY), expected)


class TestRefusals:
    def test_static_cache(self, model, prompt) -> None:
        with pytest.raises(CacheError, match="default dynamic cache"):
            model.generate(prompt, cache_implementation="static", **GREEDY)

    def test_crop(self, model, prompt) -> None:
        cache = DynamicCache()
        with torch.no_grad():
            model(prompt, past_key_values=cache)
        cache.crop(0)
        with pytest.raises(CacheError, match="cannot be cropped"):
            cache.crop(-3)

    def test_offloaded_cache(self, model, prompt) -> None:
        cache = DynamicCache()
        cache.offloading = True
        with pytest.raises(CacheError, match="default dynamic cache"):
            model(prompt, past_key_values=cache)

    def test_prompt_lookup(self, model, prompt) -> None:
        repeated = torch.cat([prompt[:, :20]] * 3, 1)
        with pytest.raises(CacheError, match="prompt lookup"):
            model.generate(repeated, prompt_lookup_num_tokens=5, **GREEDY)


LOSSY = {
    "h2o": H2O,
    "razor": RAZOR,
    "razor-heads": {"method": "full", "rules": [{**RAZOR, "layers": [0, 1, 2], "heads": [1]}]},
}
"""Plans that forget what a later query could have used."""


@pytest.fixture(params=list(LOSSY), scope="module")
def lossy(request: pytest.FixtureRequest) -> PreTrainedModel:
    return trained_model("qwen3", LOSSY[request.param])


class TestLossyCaches:
    def test_prompt_is_dense_and_decoding_is_not(self, lossy, prompt) -> None:
        dense, cache = dense_model("qwen3"), DynamicCache()
        with torch.no_grad():
            whole = dense(prompt).logits
            first = lossy(prompt[:, :40], past_key_values=cache).logits
            steps = [lossy(prompt[:, i : i + 1], past_key_values=cache).logits for i in range(40, 53)]
        assert (first - whole[:, :40]).abs().max() < 1e-10
        assert (torch.cat(steps, 1) - whole[:, 40:]).abs().max() > 0.1

    @pytest.mark.parametrize("options", [{}, slow({"num_beams": 3})], ids=["greedy", "beam"])
    def test_left_padded_batch_equals_single_rows(self, lossy, options) -> None:
        ids, mask, prompts = padded_batch(53, 20, 37, 5)
        out = lossy.generate(ids, attention_mask=mask, **options, **GREEDY)[:, 53:]
        for row, alone in zip(out, prompts, strict=True):
            assert torch.equal(row, lossy.generate(alone, **options, **GREEDY)[0, alone.shape[1] :])

    def test_second_turn_continues_the_first(self, lossy, prompt) -> None:
        """Generation on a kept cache is what calling the model step by step gives."""
        cache, by_hand = DynamicCache(config=lossy.config), DynamicCache()
        text = lossy.generate(prompt, past_key_values=cache, **GREEDY)
        text = torch.cat([text, tokens(1, 6, seed=2)], 1)
        out = lossy.generate(text, past_key_values=cache, **GREEDY)
        with torch.no_grad():
            lossy(prompt, past_key_values=by_hand)
            for i in range(53, 66):
                lossy(text[:, i : i + 1], past_key_values=by_hand)
            logits = lossy(text[:, 66:], past_key_values=by_hand).logits
            for token in out[0, 73:]:
                assert logits[0, -1].argmax() == token
                logits = lossy(token[None, None], past_key_values=by_hand).logits

    def test_rows_are_dropped(self, lossy) -> None:
        ids, mask, prompts = padded_batch(53, 9)
        cache, alone, new = DynamicCache(), DynamicCache(), tokens(1, 12, seed=7)
        with torch.no_grad():
            lossy(ids, attention_mask=mask, past_key_values=cache)
            cache.batch_select_indices(torch.tensor([1]))
            lossy(prompts[1], past_key_values=alone)
            for i in range(12):
                longer = torch.nn.functional.pad(mask[1:], (0, i + 1), value=1)
                out = lossy(new[:, i : i + 1], attention_mask=longer, past_key_values=cache).logits
                expected = lossy(new[:, i : i + 1], past_key_values=alone).logits
                assert (out - expected).abs().max() < 1e-10

    def test_full_budget_is_dense(self, lossy) -> None:
        ids, cache = tokens(2, 60), DynamicCache()
        with torch.no_grad(), with_full_budget(lossy, 60):
            steps = [lossy(ids[:, i : i + 12], past_key_values=cache).logits for i in range(0, 60, 12)]
            assert (torch.cat(steps, 1) - dense_model("qwen3")(ids).logits).abs().max() < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [EXACT["cache"], H2O, RAZOR, INFLLM], ids=lambda x: x["method"])
def test_every_family_starts_dense_and_ends_dense(family: str, settings: dict) -> None:
    """Decoding with a budget that covers the text is dense; unpatched, the model is what it was."""
    model, ids, cache = dense_model(family, num_hidden_layers=2), tokens(2, 30), DynamicCache()
    with torch.no_grad():
        dense = model(ids).logits
        patch_model(model, plan(settings))
        with with_full_budget(model, 30):
            parts = [model(x, past_key_values=cache).logits for x in ids.split([20, 4, 1, 5], 1)]
        assert (torch.cat(parts, 1) - dense).abs().max() < 1e-10
        unpatch_model(model)
        assert torch.equal(model(ids).logits, dense)


@pytest.mark.parametrize("settings", [EXACT["cache"], H2O, RAZOR, INFLLM], ids=lambda x: x["method"])
def test_no_token_of_a_call_sees_a_later_one(settings: dict) -> None:
    model, logits = trained_model("llama", settings), []
    with torch.no_grad():
        for seed in (5, 6):
            cache = DynamicCache()
            model(tokens(1, 40), past_key_values=cache)
            last = torch.cat([tokens(1, 7, seed=4), tokens(1, 9, seed=seed)], 1)
            logits.append(model(last, past_key_values=cache).logits)
    assert (logits[0] - logits[1])[:, :7].abs().max() < 1e-12
    assert (logits[0] - logits[1])[:, 7:].abs().max() > 0.1


def test_a_saved_model_forgets_alike(tmp_path) -> None:
    mixed = {**H2O, "rules": [{**RAZOR, "layers": [1], "heads": [0]}, {"method": "full", "layers": [2]}]}
    model = trained_model("qwen3", mixed)
    expected = model.generate(tokens(1, 53), **GREEDY)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert again.config.sparse_attention == model.config.sparse_attention
    assert torch.equal(again.generate(tokens(1, 53), **GREEDY), expected)


class TestInfLLM:
    @pytest.fixture(scope="class")
    @classmethod
    def model(cls) -> PreTrainedModel:
        return trained_model("qwen3", INFLLM, num_hidden_layers=1)

    def test_generate(self, model) -> None:
        few = {"max_new_tokens": 6, "do_sample": False}
        ids, mask, prompts = padded_batch(33, 20, 5)
        out = model.generate(ids, attention_mask=mask, prefill_chunk_size=12, num_beams=2, **few)[:, 33:]
        for row, alone in zip(out, prompts, strict=True):
            single = model.generate(alone, use_cache=False, num_beams=2, **few)[0, alone.shape[1] :]
            assert torch.equal(row, single)

    def test_rows_are_dropped(self, model) -> None:
        ids, mask, prompts = padded_batch(40, 33)
        cache, new = DynamicCache(), tokens(1, 5, seed=7)
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
            cache.batch_select_indices(torch.tensor([1]))
            longer = torch.cat([mask[1:], torch.ones_like(new)], 1)
            out = model(new, attention_mask=longer, past_key_values=cache).logits
            expected = model(torch.cat([prompts[1], new], 1), use_cache=False).logits[:, -5:]
        assert (out - expected).abs().max() < 1e-10

    def test_decoding_grows_in_place(self, model) -> None:
        cache = DynamicCache()
        with torch.no_grad():
            model(tokens(1, 30), past_key_values=cache)
            model(tokens(1, 1), past_key_values=cache)
            place = cache.layers[0].held[0].keys.data_ptr()
            model(tokens(1, 1), past_key_values=cache)
        assert cache.layers[0].held[0].keys.data_ptr() == place
        assert cache.layers[0].held[0].keys.shape[2] == 32


SIZES = {
    "h2o": {"method": "h2o", "num_heavy": 480, "num_recent": 544},
    "infllm": {"method": "infllm", "num_sinks": 64, "window_size": 1024, "block_size": 64, "num_blocks": 4},
    "razor": {"method": "razor", "num_sinks": 4, "window_size": 400, "window_share": 16},
    "streaming": {"method": "streaming", "num_sinks": 64, "window_size": 960},
    "half-streaming": {
        "method": "streaming",
        "num_sinks": 64,
        "window_size": 960,
        "rules": [{"method": "full", "layers": [0], "heads": [1]}],
    },
}


@pytest.mark.parametrize("name", these_quick(SIZES, ["h2o", "razor", "streaming"]))
def test_bytes_at_16k_tokens_follow_the_formula(name: str) -> None:
    sizes = {"num_hidden_layers": 1, "max_position_embeddings": 20000, "initializer_range": 0.02}
    model = patch_model(dense_model("llama", **sizes).float(), plan(SIZES[name]))
    cache, length, batch = DynamicCache(), 16384, 2
    with torch.inference_mode():
        for begin in range(0, length, 1024):
            model.model(tokens(batch, 1024, seed=begin), past_key_values=cache)
        first = cache_bytes(cache)
        model.model(tokens(batch, 3), past_key_values=cache)  # decoding leaves room behind what still grows
    methods = sparse_methods(model)
    (cost,) = context_costs(methods, methods[0].geometry, 4, [length])
    for measured in (first, cache_bytes(cache)):
        assert measured == pytest.approx(batch * cost.sparse_kv_bytes, rel=0.02)
    assert (
        cost.sparse_kv_bytes < {"half-streaming": 0.54, "infllm": 1.3}.get(name, 0.07) * cost.dense_kv_bytes
    )


def test_full_budget_forgets_nothing() -> None:
    model, ids = dense_model("llama"), tokens(2, 60)
    with torch.no_grad():
        dense = model(ids).logits
        patch_model(model, plan(EVICTING))
        with with_full_budget(model, 60):
            cache = DynamicCache()
            steps = [model(ids[:, i : i + 20], past_key_values=cache).logits for i in range(0, 60, 20)]
    assert (torch.cat(steps, 1) - dense).abs().max() < 1e-10
    assert cache.layers[0].held[0].keys.shape[2] == 60


def test_heads_of_one_layer_have_caches_of_two_sizes() -> None:
    model, cache = trained_model("llama", MIXED), DynamicCache()
    with torch.no_grad():
        model(tokens(1, 50), past_key_values=cache)
    mixed, streaming, _ = cache.layers
    assert mixed.keys.shape[1:3] == (1, 50)
    assert [held.keys.shape[1:3] for held in mixed.held.values()] == [(1, 14)]
    assert [held.keys.shape[1:3] for held in streaming.held.values()] == [(2, 14)]
    assert streaming.held[0].keys.untyped_storage().nbytes() == 2 * 14 * 16 * 8  # nothing behind the view


def test_plan_is_read_strictly() -> None:
    from nsa_convert.errors import ConfigError
    from tests.patch.test_conformance import GEOMETRY

    with pytest.raises(ConfigError, match="unknown key 'positons'; did you mean 'positions'"):
        resolve_plan(plan({**EVICTING, "positons": "cache"}), 3, GEOMETRY)
    with pytest.raises(ConfigError, match="one of absolute, cache"):
        resolve_plan(plan({**EVICTING, "positions": "relative"}), 3, GEOMETRY)
