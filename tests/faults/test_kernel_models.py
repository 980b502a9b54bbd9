"""Padding, packing, caches and masks of whole models: equal to the plain case, or refused (KN)."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.models import NSA, VARIANTS, tokens, trained_model


@pytest.mark.parametrize("bounds", [[0, 4], [0, 6, 4, 6], [1, 6], [0, 4, 9], []])
def test_kn09_bounds_that_cannot_be(bounds):
    model = trained_model("llama", NSA, num_hidden_layers=1)
    with pytest.raises(ValueError, match="rise from 0 to the 6 tokens"):
        model(tokens(1, 6), cu_seq_lens_q=torch.tensor(bounds, dtype=torch.int64))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("block_size", [4, 16, 32])
def test_kn10_padding(block_size, side):
    sizes = {"compression_block": block_size, "compression_stride": block_size // 2, "block_size": block_size}
    model = trained_model("llama", {**NSA, **sizes, "num_blocks": 3}, num_hidden_layers=2)
    row = tokens(1, 3 * block_size + 21)
    with torch.no_grad():
        want = model(row).logits
        for pads in (1, 3, 7, 31, 32):
            shape = (pads, 0) if side == "left" else (0, pads)
            ids, mask = (torch.nn.functional.pad(x, shape) for x in (row, torch.ones_like(row)))
            got = model(ids, attention_mask=mask, use_cache=False).logits[:, mask[0].bool()]
            assert (got - want).abs().max() < 1e-10, pads


@pytest.mark.parametrize("settings", ["nsa", "ssa", "moba", "infllm_v2", "dsa"])
def test_kn15_decode_and_caches_equal_one_pass(settings):
    model, ids = trained_model("llama", VARIANTS[settings], num_hidden_layers=2), tokens(2, 70)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        caches = [DynamicCache(), StaticCache(config=model.config, max_cache_len=80)]
        for cache in caches:
            parts = [model(ids[:, :30], past_key_values=cache).logits]
            parts += [model(ids[:, 30:47], past_key_values=cache).logits]  # a chunk across block borders
            parts += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(47, 70)]
            assert (torch.cat(parts, 1) - want).abs().max() < 1e-8
        cache = DynamicCache()
        model(ids, past_key_values=cache)
        cache.crop(-9)
        cache.reorder_cache(torch.tensor([1, 0]))
        got = model(ids[[1, 0], 61:], past_key_values=cache).logits
        assert (got - want[[1, 0], 61:]).abs().max() < 1e-8


@pytest.mark.parametrize(
    "arguments",
    [
        {"attention_mask": torch.ones(1, 1, 6, 6, dtype=torch.bool)},
        {"attention_mask": torch.zeros(1, 1, 6, 6)},
        {"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1]])},
        {"attention_mask": torch.ones(1, 4)},
    ],
    ids=["bool", "additive", "hole", "short"],
)
@pytest.mark.parametrize("settings", ["nsa", "ssa"])
def test_kn17_masks_are_honoured_or_refused(settings, arguments):
    model = trained_model("llama", VARIANTS[settings], num_hidden_layers=1)
    with pytest.raises(ValueError, match="mask"):
        model(tokens(1, 6), **arguments)


@pytest.mark.parametrize("settings", ["nsa", "ssa", "dsa"])
def test_kn20_gradient_checkpointing_changes_nothing(settings):
    ids, found = tokens(1, 60), []
    for enabled in (False, True):
        model = trained_model("llama", VARIANTS[settings], num_hidden_layers=2).train()
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, labels=ids, use_cache=False).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, again = found
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
