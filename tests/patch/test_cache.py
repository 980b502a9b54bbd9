"""A cache is right or refused: whatever happened to it, logits are right or an error says what to do."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from nsa_convert.errors import CacheError
from nsa_convert.methods.parts.mix import cached_heads, leaves_of
from nsa_convert.methods.parts.registry import METHODS
from nsa_convert.patch.attention import SparseAttention
from nsa_convert.patch.patching import sparse_methods
from tests.models import DSA, NSA, PREFILL, SSA, VARIANTS, dense_model, tokens, trained_model
from tests.patch.test_eviction import EXACT, INFLLM, LOSSY

EVICTING = {**{f"streaming-{name}": settings for name, settings in EXACT.items()}, **LOSSY, "infllm": INFLLM}
ALL = {**VARIANTS, **PREFILL, **EVICTING}
OTHERS = {
    "nsa": {**NSA, "compression_block": 16},
    "ssa": {**SSA, "block_size": 16},
    "dsa-shared": {**DSA, "index_key": "shared", "index_heads": 1},
    "streaming": {**EXACT["mixed"], "window_size": 11},
}
"""Models that fill a cache for others: none has the settings of one of the above."""
PROMPT, MORE = 61, 9
SPLITS = (4, 1, 3, 1)

Pairs = list[tuple[Tensor, Tensor]]


QUICK = ("nsa-learned-before-rope", "ssa-gated", "moba-conv", "dsa-shared", "quest", "hybrid", "tri_shape")
QUICK += ("streaming-beside-cells", "razor", "h2o")
"""One of each kind of what a cache holds; the others differ in what they pool, and are slow together."""


NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ALL]


@pytest.fixture(params=NAMES, scope="module")
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str) -> PreTrainedModel:
    return trained_model("qwen3", ALL[name])


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return tokens(2, PROMPT + MORE)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def leaves(model: PreTrainedModel) -> list:
    return leaves_of(sparse_methods(model))


def forgets(model: PreTrainedModel) -> bool:
    return any(leaf.cache_needs().policy is not None for leaf in leaves(model))


def streams(model: PreTrainedModel) -> bool:
    """Return whether a layer keeps what keys and values do not tell."""
    policies = [leaf.cache_needs().policy for leaf in leaves(model)]
    return any(policy is not None and policy.asks_attention for policy in policies) or any(
        (needs := method.cache_needs()).token_states or needs.key_taps > 1 for method in sparse_methods(model)
    )


def extra_heads(model: PreTrainedModel) -> bool:
    """Return whether a layer caches more heads than the dense model's."""
    return any(sum(map(len, cached_heads(method))) > 2 for method in sparse_methods(model))


def needs_its_own(model: PreTrainedModel) -> bool:
    """Return whether no other model can fill a cache for this one."""
    return streams(model) or extra_heads(model)


def proceed(model: PreTrainedModel, cache: DynamicCache, ids: Tensor, **inputs: Tensor) -> Tensor:
    """Return the logits of the last tokens, read in several calls on a cache that holds those before."""
    out, past = [], ids.shape[1] - MORE
    for part in ids[:, past:].split(SPLITS, 1):
        past += part.shape[1]
        mask = {key: mask[:, :past] for key, mask in inputs.items()}
        out.append(model(part, past_key_values=cache, **mask).logits)
    return torch.cat(out, 1)


def read(model: PreTrainedModel, prompt: Tensor, **inputs: Tensor) -> DynamicCache:
    cache = DynamicCache()
    model(prompt, past_key_values=cache, **inputs)
    return cache


def pairs_of(model: PreTrainedModel, prompt: Tensor) -> Pairs:
    """Return the keys and values ``[B, H, T, D]`` of every layer, whatever its cache would keep of them."""
    if not any(isinstance(layer.self_attn, SparseAttention) for layer in model.model.layers):
        return [(layer.keys, layer.values) for layer in read(model, prompt).layers]
    pairs, remember = [], SparseAttention._remember

    def recording(self: SparseAttention, k: Tensor, v: Tensor, *rest: object) -> object:
        pairs.append((k.transpose(1, 2), v.transpose(1, 2)))
        return remember(self, k, v, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SparseAttention, "_remember", recording)
        model(prompt, use_cache=False)
    return pairs


def same_or_refused(refused: bool, run: Callable[[], Tensor], expected: Tensor) -> None:
    """Check that a run gives the expected logits, or the one error where it must be refused."""
    if refused:
        with pytest.raises(CacheError, match="read the prompt again") as caught:
            run()
        assert caught.value.code == "CA01"
    else:
        assert (run() - expected).abs().max() < 1e-9


@pytest.fixture(scope="module")
def expected(name: str, model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return what the model makes of a cache it filled itself: what no cache at all gives, where it forgets
    nothing a later query sees and reads prompts as it decodes."""
    with torch.no_grad():
        kept = proceed(model, read(model, ids[:, :PROMPT]), ids)
        if name in VARIANTS or name.startswith("streaming-"):
            assert (kept - model(ids, use_cache=False).logits[:, PROMPT:]).abs().max() < 1e-9
    return kept


def test_every_method_is_here() -> None:
    used = {method for settings in ALL.values() for method in _methods(settings)}
    assert used >= METHODS.keys()


def _methods(settings: dict) -> Iterator[str]:
    yield settings["method"]
    for rule in settings.get("rules", ()):
        yield rule["method"]


class TestEveryMethod:
    def test_rebuilt_from_keys_and_values(self, model, ids, expected) -> None:
        cache = DynamicCache(pairs_of(model, ids[:, :PROMPT]))
        same_or_refused(streams(model), lambda: proceed(model, cache, ids), expected)

    def test_filled_by_the_dense_model(self, model, ids) -> None:
        dense = dense_model("qwen3")
        cache = read(dense, ids[:, :PROMPT])
        rebuilt = DynamicCache([(layer.keys, layer.values) for layer in copy.deepcopy(cache).layers])
        refused = needs_its_own(model)
        expected = None if refused else proceed(model, rebuilt, ids)
        same_or_refused(refused, lambda: proceed(model, cache, ids), expected)

    @pytest.mark.parametrize("other", list(OTHERS))
    def test_filled_by_another_model(self, model, ids, other) -> None:
        """Pools have names and sizes of their own, so other settings of one method are another method too."""
        writer = trained_model("qwen3", OTHERS[other])
        cache = read(writer, ids[:, :PROMPT])
        refused = needs_its_own(model) or forgets(writer)
        pairs = DynamicCache(pairs_of(writer, ids[:, :PROMPT]))
        expected = None if refused else proceed(model, pairs, ids)
        same_or_refused(refused, lambda: proceed(model, cache, ids), expected)

    def test_filled_by_the_same_model_loaded_twice(self, name, ids, model, expected) -> None:
        cache = read(trained_model("qwen3", ALL[name]), ids[:, :PROMPT])
        assert (proceed(model, cache, ids) - expected).abs().max() < 1e-9

    def test_continued_by_the_dense_model_between(self, model, ids) -> None:
        dense, cache = dense_model("qwen3"), read(model, ids[:, : PROMPT - 8])
        between = partial(dense, ids[:, PROMPT - 8 : PROMPT], past_key_values=cache)
        if forgets(model) or extra_heads(model):
            with pytest.raises(CacheError, match="read the prompt again"):
                between()
            return
        between()
        refused = streams(model)
        rebuilt = DynamicCache([(layer.keys.clone(), layer.values.clone()) for layer in cache.layers])
        expected = None if refused else proceed(model, rebuilt, ids)
        same_or_refused(refused, lambda: proceed(model, cache, ids), expected)

    def test_keys_pruned_after_the_prompt(self, name, model, ids) -> None:
        cache = read(model, ids[:, :PROMPT])
        kept = torch.tensor([i for i in range(PROMPT) if i % 5 != 3])
        if forgets(model) and all(layer.keys.dim() != 4 for layer in cache.layers):
            return  # the layer holds no keys that anybody could prune
        rebuilt = DynamicCache(
            [tuple(x[:, :, kept] for x in pair) for pair in pairs_of(model, ids[:, :PROMPT])]
        )
        for layer in cache.layers:
            if layer.keys.dim() == 4:
                layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
        refused = streams(model) or forgets(model) or "before" in str(ALL[name])
        expected = None if refused else proceed(model, rebuilt, ids)
        same_or_refused(refused, lambda: proceed(model, cache, ids), expected)

    def test_keys_edited_in_place(self, model, ids) -> None:
        cache, other = read(model, ids[:, :PROMPT]), None
        if forgets(model):
            return
        for layer in cache.layers:
            layer.keys[:, :, 20:30] *= 0.5
        other = DynamicCache([(layer.keys.clone(), layer.values.clone()) for layer in cache.layers])
        refused = streams(model)
        expected = None if refused else proceed(model, other, ids)
        same_or_refused(refused, lambda: proceed(model, cache, ids), expected)

    def test_a_call_that_broke_off(self, name, model, ids, expected, monkeypatch) -> None:
        """The first layers have appended their tokens; cropped, the cache is whole again, or says so."""
        cache = read(model, ids[:, :PROMPT])

        def fail(*_: object, **__: object) -> None:
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[1].self_attn.sparse, "forward", fail)
            with pytest.raises(MemoryError):
                model(ids[:, PROMPT:], past_key_values=cache)
        if forgets(model):
            with pytest.raises(CacheError, match="read the prompt again"):
                model(ids[:, PROMPT:], past_key_values=cache)
            return
        for layer in cache.layers:
            layer.crop(PROMPT - layer.get_seq_length())
        assert (proceed(model, cache, ids) - expected).abs().max() < 1e-9

    def test_read_in_inference_mode(self, model, ids, expected) -> None:
        with torch.inference_mode():
            cache = read(model, ids[:, :PROMPT])
        assert (proceed(model, cache, ids) - expected).abs().max() < 1e-9
        with torch.inference_mode():
            cache = read(model, ids[:, :PROMPT])
            model(ids[:, PROMPT:-2], past_key_values=cache)  # now in buffers with room
            other = copy.deepcopy(cache)
            steps = [model(token, past_key_values=other).logits for token in ids[:, -2:].split(1, 1)]
        text = torch.cat([ids, steps[-1].argmax(-1)], 1)
        model.generate(ids[:, :-1], past_key_values=cache, max_new_tokens=1, do_sample=False)
        made = model.generate(ids, past_key_values=cache, max_new_tokens=1, do_sample=False)
        assert torch.equal(made, text)

    def test_copies(self, name, model, ids, expected) -> None:
        cache = read(model, ids[:, :PROMPT])
        if name in VARIANTS:
            cache = read(model, ids[:, : PROMPT - 1])
            model(ids[:, PROMPT - 1 : PROMPT], past_key_values=cache)  # in place from now on
        file = io.BytesIO()
        torch.save(cache, file)
        copies = [
            copy.deepcopy(cache),
            pickle.loads(pickle.dumps(cache)),
            torch.load(io.BytesIO(file.getvalue()), weights_only=False),
        ]
        copies.append(copy.deepcopy(copies[1]))
        for other in (cache, *copies):
            assert [type(x) for x in other.layers] == [type(x) for x in cache.layers]
            assert (proceed(model, other, ids) - expected).abs().max() < 1e-9

    def test_rows_are_moved(self, model, ids, expected) -> None:
        cache = read(model, ids[:, :PROMPT])
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3, 2]))
        rows = [1, 0, 0]
        assert (proceed(model, cache, ids[rows]) - expected[rows]).abs().max() < 1e-9

    def test_cropped(self, name, model, ids, expected) -> None:
        cache = read(model, ids)
        if forgets(model):
            with pytest.raises(CacheError, match="cannot be cropped"):
                cache.crop(-MORE)
            return
        if name not in VARIANTS:  # what was removed has chosen for what is left
            pairs = [(layer.keys[:, :, :PROMPT], layer.values[:, :, :PROMPT]) for layer in cache.layers]
            expected = proceed(model, DynamicCache(copy.deepcopy(pairs)), ids)
        cache.crop(-MORE)
        assert (proceed(model, cache, ids) - expected).abs().max() < 1e-9
        if name in VARIANTS:
            cache.crop(-MORE - 20)
            model(ids[:, PROMPT - 20 : PROMPT - 6], past_key_values=cache)
            cache.crop(0)
            model(ids[:, PROMPT - 6 : PROMPT], past_key_values=cache)
            assert (proceed(model, cache, ids) - expected).abs().max() < 1e-9

    def test_a_reset_cache_serves_any_model(self, model, ids, expected) -> None:
        plain = DynamicCache([(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2))])
        plain.reset()
        if plain.get_seq_length():
            pytest.skip("this transformers zeroes what a dynamic cache holds, and keeps its length")
        cache, dense = read(model, ids[:, :30]), dense_model("qwen3")
        cache.reset()
        dense(ids[:, :20], past_key_values=cache)
        cache.reset()
        model(ids[:, :PROMPT], past_key_values=cache)
        assert (proceed(model, cache, ids) - expected).abs().max() < 1e-9
