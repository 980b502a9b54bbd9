"""The losses of logits that are computed in chunks are those of all logits at once, and hold none of them."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from nsa_convert.families import FAMILIES
from nsa_convert.methods.parts.training_mode import TrainingMode
from nsa_convert.patch import chunked_loss
from nsa_convert.patch.chunked_loss import chunked_losses, compute_in_chunks, next_labels
from tests.models import NSA, tokens, trained_model

SCALED = {"granite": {"logits_scaling": 3.0}, "gemma2": {"final_logit_softcapping": 5.0}}
"""Families whose logits are not what the head returns."""
VOCAB = 61


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Seven rows at a time: the last chunk is smaller than the others."""
    monkeypatch.setattr(chunked_loss, "CHUNK", 7 * VOCAB)


def dense(family: str, dtype: torch.dtype = torch.float64, **more):
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "pad_token_id": 0,
        "attn_implementation": "eager",
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes, **more)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    nn.init.normal_(model.get_output_embeddings().weight)  # losses far from that of a guess
    return model.train()


def batch(rows: int = 2, length: int = 20):
    ids = torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, 3:9] = -100
    return ids, labels


def gradients(loss, model) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def plain_loss(logits, labels, items=None):
    """Return the definition, in the dtype of the logits."""
    following = functional.pad(labels[:, 1:], (0, 1), value=-100)
    total = functional.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="sum")
    return total / ((following != -100).sum() if items is None else items)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", [*FAMILIES, *SCALED])
def test_loss_and_gradients_of_every_family(family, tied):
    model = dense(family, tie_word_embeddings=tied, **SCALED.get(family, {}))
    ids, labels = batch()
    want = plain_loss(model(ids).logits, labels)
    expected = gradients(want, model)
    compute_in_chunks(model)
    out = model(ids, labels=labels)
    assert out.logits is None
    torch.testing.assert_close(out.loss, want, rtol=1e-12, atol=1e-12)
    for got, grad in zip(gradients(out.loss, model), expected, strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("items", [None, 100, torch.tensor(100)])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 2.0), (0.5, 2.0)])
def test_both_losses_and_their_weights(weights, items):
    model, teacher = dense("llama"), dense("llama")
    ids, labels = batch()
    hidden = model.model(ids).last_hidden_state
    other = hidden.detach() + 0.3 * torch.randn(hidden.shape, dtype=hidden.dtype)
    logits, target = model.lm_head(hidden), teacher.lm_head(other).detach()
    following = next_labels(labels, None)
    counted = following != -100
    kl = (target.softmax(-1) * (target.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)
    kl = (kl * counted).sum() / (counted.sum() if items is None else items)
    entropy = plain_loss(logits, labels, items)
    want = weights[0] * entropy + weights[1] * kl
    expected = gradients(want * 3, model)
    found = chunked_losses(
        model,
        model.model(ids).last_hidden_state,
        following,
        num_items_in_batch=items,
        cross_entropy=weights[0],
        teacher_hidden=other,
        teacher_kl=weights[1],
    )
    for got, value in ((found.loss, want), (found.cross_entropy, entropy), (found.teacher_kl, kl)):
        torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-12)
    for got, grad in zip(gradients(found.loss * 3, model), expected, strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-10, atol=1e-12)


def test_float32_is_as_near_as_the_ordinary_way():
    model = dense("llama", torch.float32)
    ids, labels = batch(4, 60)
    want = model(ids, labels=labels).loss
    expected = gradients(want, model)
    compute_in_chunks(model)
    loss = model(ids, labels=labels).loss
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    size = max(grad.abs().max() for grad in expected)
    for got, grad in zip(gradients(loss, model), expected, strict=True):
        assert (got - grad).abs().max() <= 1e-6 * size


def test_under_autocast_the_loss_is_float32_and_no_worse_than_the_ordinary_way():
    exact = dense("llama", torch.float32)
    ids, labels = batch(4, 60)
    model = copy.deepcopy(exact)
    truth = gradients(exact(ids, labels=labels).loss, exact)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        ordinary = gradients(model(ids, labels=labels).loss, model)
    compute_in_chunks(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=labels).loss
    assert loss.dtype == torch.float32
    for got, plain, grad in zip(gradients(loss, model), ordinary, truth, strict=True):
        assert (got - grad).norm() <= 1.05 * (plain - grad).norm() + 1e-7


def test_only_what_is_trained_gets_a_gradient():
    model = dense("llama", tie_word_embeddings=False)
    ids, labels = batch()
    model.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    want = gradients(plain_loss(model(ids).logits, labels), model)
    compute_in_chunks(model)
    loss = model(ids, labels=labels).loss
    loss.backward()
    torch.testing.assert_close(model.model.layers[0].self_attn.q_proj.weight.grad, want[0])
    assert model.lm_head.weight.grad is None
    model.requires_grad_(False)
    assert not model(ids, labels=labels).loss.requires_grad


def test_an_adapted_head():
    from peft import LoraConfig, get_peft_model

    model = dense("llama", tie_word_embeddings=False)
    ids, labels = batch()
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head", "q_proj"], lora_dropout=0.0))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    want = plain_loss(lora(ids).logits, labels)
    expected = gradients(want, lora)
    compute_in_chunks(lora.get_base_model())
    loss = lora(ids, labels=labels).loss
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-12)
    for got, grad in zip(gradients(loss, lora), expected, strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("teacher_kl", [0.0, 0.7])
def test_a_converted_model_with_losses_of_its_layers(teacher_kl):
    ids = tokens(2, 60)
    labels = ids.clone()
    labels[0, :20] = -100
    model = trained_model("llama", NSA).train()
    found = []
    for keep in (True, False):
        mode = TrainingMode(
            losses=("output_error", "score_kl"), weights=(0.5, 0.25), teacher_kl=teacher_kl, keep_logits=keep
        )
        out = model(ids, labels=labels, training_mode=mode, num_items_in_batch=200)
        found.append((out, torch.autograd.grad(out.loss, list(model.parameters()), allow_unused=True)))
    (plain, expected), (out, got) = found
    assert out.logits is None
    for name in ("loss", "aux_loss", "auxiliary", "cross_entropy"):
        torch.testing.assert_close(out[name].float(), plain[name].float(), rtol=1e-6, atol=1e-6)
    assert (out.teacher_kl is None) == (teacher_kl == 0)
    for a, b in itertools.zip_longest(got, expected):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_second_backward_is_refused():
    model = dense("llama")
    compute_in_chunks(model)
    ids, labels = batch()
    loss = model(ids, labels=labels).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run the forward pass again"):
        loss.backward()
