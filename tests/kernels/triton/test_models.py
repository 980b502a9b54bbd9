"""Whole converted models: logits, gradients and decoded tokens on triton as on the torch backend."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from nsa_convert.kernels import use_backend
from tests.marks import first_quick
from tests.models import VARIANTS, tokens, trained_model

LENGTH = 45


def logits_and_gradients(model, ids: torch.Tensor, mask: torch.Tensor | None, backend: str):
    model.zero_grad()
    with use_backend(backend):
        out = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        kept = out if mask is None else out[mask.bool()]
        kept.square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return kept.detach(), grads


@pytest.mark.parametrize(("variant", "layers"), first_quick([("nsa", 1), ("moba", 1), ("hybrid", 3)]))
def test_training_step(variant: str, layers: int) -> None:
    model = trained_model("llama", VARIANTS[variant], num_hidden_layers=layers).float()
    ids = tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    expected, wanted = logits_and_gradients(model, ids, mask, "torch")
    got, grads = logits_and_gradients(model, ids, mask, "triton")
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
    assert grads.keys() == wanted.keys()
    for name, x in grads.items():
        assert (x - wanted[name]).abs().max() <= 1e-3 * wanted[name].abs().max() + 1e-6, name


def test_generation() -> None:
    model = trained_model("llama", VARIANTS["nsa"], num_hidden_layers=2).float()
    ids = tokens(1, LENGTH)
    made = {}
    for backend in ("torch", "triton"):
        with use_backend(backend), torch.no_grad():
            made[backend] = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(made["torch"], made["triton"])
