"""Masks, positions and engines that sparse layers cannot honour are refused, never ignored."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from nsa_convert.errors import BackendError
from nsa_convert.methods.parts.registry import METHODS
from nsa_convert.patch.patching import set_mode
from tests.models import VARIANTS, dense_model, tokens, trained_model


def numbered(*numbers: int) -> dict[str, torch.Tensor]:
    """Return the arguments of a call with this mask."""
    return {"attention_mask": torch.tensor([numbers])}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return trained_model("llama", VARIANTS["nsa"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (numbered(1, 1, 0, 1, 1, 1), "hole"),
        ({"attention_mask": torch.ones(1, 4)}, "covers 4 tokens"),
        ({"attention_mask": torch.ones(1, 1, 6, 6, dtype=torch.bool)}, "2-D padding mask"),
        (
            numbered(1, 1, 2, 2, 1, 1),
            "rising along the row.*got 1, 1, 2, 2, 1, 1",
        ),
        (numbered(1, 2, 2, 0, 2, 2), "rising along the row"),
        (numbered(0, 0, -1, -1, -1, -1), "rising along the row"),
        (
            {**numbered(1, 1, 2, 2, 0, 0), "past_key_values": DynamicCache()},
            "numbers",
        ),
        ({"position_ids": torch.arange(3, 9)[None]}, "PoSE, a shard of context parallelism"),
        ({"position_ids": torch.tensor([[0, 1, 2, 7, 8, 9]])}, "PoSE.*got 0, 1, 2, 7, 8, 9"),
        ({"position_ids": torch.tensor([[0, 1, 2, 2, 3, 4]])}, "PoSE"),
        (
            {"position_ids": torch.arange(6)[None], **numbered(0, 0, 1, 1, 1, 1)},
            "PoSE",
        ),
        (
            {"position_ids": torch.arange(6)[None], **numbered(1, 1, 1, 2, 2, 2)},
            "PoSE",
        ),
        ({"position_ids": torch.arange(5)[None]}, r"must be \[1 or 1, 6\]"),
        ({"position_ids": torch.arange(3, 9)[None], "past_key_values": DynamicCache()}, "PoSE"),
        (
            {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), "past_key_values": DynamicCache()},
            "neither fill nor continue a cache",
        ),
        ({"cu_seq_lens_q": torch.tensor([0, 4])}, "rise from 0 to the 6 tokens"),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 6]), "max_length_q": 3}, "smaller than the longest"),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 6]), "position_ids": torch.arange(6)[None]}, "where cu_seq"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 6]), **numbered(1, 1, 1, 2, 2, 2)},
            "not by both",
        ),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 6]), "past_key_values": DynamicCache()}, "cannot fill"),
    ],
)
def test_refused_arguments(model: PreTrainedModel, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(tokens(1, 6), **arguments)


def test_an_input_without_tokens_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="holds no tokens"):
        model(tokens(1, 0))
    with pytest.raises(ValueError, match="holds no tokens"):
        model(inputs_embeds=torch.zeros(2, 0, 64, dtype=torch.float64))


@pytest.mark.parametrize(
    "arguments", [{}, {"input_ids": tokens(1, 3), "inputs_embeds": torch.zeros(1, 3, 64)}]
)
def test_what_to_read_is_given_once(model: PreTrainedModel, arguments: dict) -> None:
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(**arguments)


def test_positions_must_continue_the_cache(model: PreTrainedModel) -> None:
    cache, mask = DynamicCache(), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    model(tokens(2, 6), attention_mask=mask, past_key_values=cache)
    more = torch.nn.functional.pad(mask, (0, 1), value=1)
    with pytest.raises(ValueError, match="PoSE"):
        model(tokens(2, 1), attention_mask=more, past_key_values=cache, position_ids=torch.tensor([[6], [6]]))
    model(tokens(2, 1), attention_mask=more, past_key_values=cache, position_ids=torch.tensor([[4], [6]]))


LAYOUTS = {
    "two documents": torch.tensor([[1] * 40 + [2] * 50]),
    "padding on both sides and between": torch.tensor([[0] * 9 + [1] * 37 + [0] * 5 + [2] * 45 + [0] * 13]),
    "rows of different documents": torch.tensor([[3] * 35 + [7] * 55, [0] * 20 + [1] * 70]),
    "no number is 1": torch.tensor([[4] * 60]),
}


@pytest.mark.parametrize("numbers", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("variant", [*(name for name in VARIANTS if name in METHODS), "hybrid"])
def test_a_mask_of_document_numbers_keeps_documents_apart(variant: str, numbers: torch.Tensor) -> None:
    layers = 2 if "rules" not in VARIANTS[variant] else 3
    model = trained_model("llama", VARIANTS[variant], num_hidden_layers=layers)
    ids = tokens(*numbers.shape)
    with torch.no_grad():
        together = model(ids, attention_mask=numbers, use_cache=False).logits
        for row, of_row in enumerate(numbers):
            for number in of_row.unique()[of_row.unique() > 0]:
                here = of_row == number
                alone = model(ids[row, here][None], use_cache=False).logits[0]
                assert (together[row, here] - alone).abs().max() < 1e-12


def test_documents_of_a_padded_row_by_positions(model: PreTrainedModel) -> None:
    ids, mask = tokens(1, 110), torch.tensor([[1] * 93 + [0] * 17])
    positions = torch.tensor([[*range(40), *range(53), *range(17)]])
    with torch.no_grad():
        together = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        alone = model(ids[:, 40:93], use_cache=False).logits
    assert (together[:, 40:93] - alone).abs().max() < 1e-12


def test_packed_documents_cannot_continue_a_cache(model: PreTrainedModel) -> None:
    cache = DynamicCache()
    model(tokens(1, 6), past_key_values=cache)
    with pytest.raises(ValueError, match="cannot fill and cannot continue a cache"):
        model(tokens(1, 6), past_key_values=cache, cu_seq_lens_q=torch.tensor([0, 2, 6]))


def test_continuous_batching_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(NotImplementedError, match="continuous batching"):
        model(tokens(1, 6), cache=object())
    with pytest.raises(NotImplementedError, match="continuous batching"):
        model.generate(tokens(1, 6), cache_implementation="paged", max_new_tokens=2)


def test_flash_attention_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="[Ff]lash"):
        model.set_attn_implementation("flash_attention_2")


def test_the_attention_name_is_refused_on_a_dense_model() -> None:
    dense = dense_model("llama")
    dense.config._attn_implementation = "nsa_convert"
    with pytest.raises(BackendError, match="is the name converted models have; a dense model takes 'sdpa'"):
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
