"""Masks, positions and engines that sparse layers cannot honour are refused, never ignored."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from nsa_convert.patch.patching import set_mode
from tests.models import VARIANTS, dense_model, tokens, trained_model


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return trained_model("llama", VARIANTS["nsa"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1]])}, "hole"),
        ({"attention_mask": torch.ones(1, 4)}, "covers 4 tokens"),
        ({"attention_mask": torch.ones(1, 1, 6, 6, dtype=torch.bool)}, "2-D padding mask"),
        ({"position_ids": torch.arange(3, 9)[None]}, "context parallelism"),
        ({"position_ids": torch.tensor([[0, 1, 2, 7, 8, 9]])}, "context parallelism"),
        ({"cu_seq_lens_q": torch.tensor([0, 4])}, "rise from 0 to the 6 tokens"),
    ],
)
def test_refused_arguments(model: PreTrainedModel, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(tokens(1, 6), **arguments)


def test_packed_documents_cannot_continue_a_cache(model: PreTrainedModel) -> None:
    cache = DynamicCache()
    model(tokens(1, 6), past_key_values=cache)
    with pytest.raises(ValueError, match="cannot continue a cache"):
        model(tokens(1, 6), past_key_values=cache, cu_seq_lens_q=torch.tensor([0, 2, 6]))


def test_continuous_batching_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(NotImplementedError, match="continuous batching"):
        model(tokens(1, 6), cache=object())
    with pytest.raises(ValueError, match="continuous batching"):
        model.generate(tokens(1, 6), cache_implementation="paged", max_new_tokens=2)


def test_flash_attention_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="[Ff]lash"):
        model.set_attn_implementation("flash_attention_2")


def test_the_attention_name_is_refused_on_a_dense_model() -> None:
    dense = dense_model("llama")
    dense.config._attn_implementation = "nsa_convert"
    with pytest.raises(Exception, match="belongs to converted models"):
        dense(tokens(1, 6))


def test_a_layer_outside_its_model_is_refused(model: PreTrainedModel) -> None:
    hidden = torch.zeros(1, 4, 64, dtype=torch.float64)
    with pytest.raises(ValueError, match="its own model's forward"):
        model.model.layers[0].self_attn(hidden, (hidden[..., :16], hidden[..., :16]))


def test_attention_dropout_is_refused_in_training() -> None:
    model = trained_model("llama", VARIANTS["ssa"], attention_dropout=0.1)
    model(tokens(1, 6))
    model.train()
    with pytest.raises(NotImplementedError, match="attention dropout"):
        model(tokens(1, 6))


def test_ssa_switches_to_full_attention_and_back() -> None:
    ids = tokens(1, 90)
    with torch.no_grad():
        dense = dense_model("llama")(ids).logits
        model = trained_model("llama", VARIANTS["ssa"])
        sparse = model(ids).logits
        set_mode(model, "full")
        assert (model(ids).logits - dense).abs().max() < 1e-10
        set_mode(model, "sparse")
        assert torch.equal(model(ids).logits, sparse)
    with pytest.raises(ValueError, match="sparse.*full"):
        set_mode(model, "dense")


def test_only_ssa_has_modes(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="no layer"):
        set_mode(model, "full")
