"""Gradients of the torch backend: gradcheck in float64, and the error rule in lower precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nsa_convert.kernels import compressed_attention, dense_attention, sparse_attention, use_backend
from nsa_convert.kernels.compressed.cells import CellGrid
from nsa_convert.patterns import DENSE_LAYOUT, BlockTopK, SinkWindow
from tests.kernels.utils import LAYOUTS, assert_close, make_blocks, make_cells, make_layout, make_qkv


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def finite(x: Tensor) -> Tensor:
    return x.masked_fill(x == -torch.inf, 0.0)


@pytest.mark.parametrize("pattern", ["window", "blocks", "dense", "compressed"])
@pytest.mark.parametrize("kind", ["plain", "padded"])
def test_gradcheck(kind: str, pattern: str) -> None:
    layout, batch, num_keys = make_layout(kind, 6)
    q, k, v = make_qkv(batch, 6, num_keys, (2, 1), dim=2)
    if pattern == "dense":
        assert torch.autograd.gradcheck(lambda *x: dense_attention(*x, layout=layout), leaves(q, k, v))
        return
    if pattern == "compressed":
        ck, cv = make_cells(batch, num_keys, 1, CellGrid(width=4, stride=2), layout, dim=2)
        run = lambda *x: compressed_attention(*x, width=4, stride=2, layout=layout)  # noqa: E731
        assert torch.autograd.gradcheck(lambda *x: run(*x).o, leaves(q, ck, cv))
        # lse is -inf before the first cell is complete; only finite values have a gradient.
        assert torch.autograd.gradcheck(lambda *x: finite(run(*x).lse), leaves(q, ck, cv))
        return
    chosen = SinkWindow(num_sinks=1, window_size=3)
    if pattern == "blocks":
        chosen = make_blocks(batch, 1, 6, num_keys, 2, 3, 1, layout)
    for i in (0, 1):
        assert torch.autograd.gradcheck(
            lambda *x, i=i: finite(sparse_attention(*x, chosen, layout=layout)[i]), leaves(q, k, v)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_error_rule(kind: str, dtype: torch.dtype) -> None:
    layout, batch, num_keys = make_layout(kind, 90)
    inputs = make_qkv(batch, 90, num_keys, (6, 2), dtype=dtype)
    ck, cv = make_cells(batch, num_keys, 2, CellGrid(width=8, stride=4), layout, dtype=dtype)
    blocks = make_blocks(batch, 2, 90, num_keys, 4, 8, 1, layout)
    shared = make_blocks(batch, 6, 90, num_keys, 5, 8, 32, layout)
    ops = {
        "blocks": (lambda *x: sparse_attention(*x, blocks, layout=layout), inputs),
        "shared lists": (lambda *x: sparse_attention(*x, shared, layout=layout), inputs),
        "window": (
            lambda *x: sparse_attention(*x, SinkWindow(num_sinks=2, window_size=17), layout=layout),
            inputs,
        ),
        "compressed": (
            lambda *x: ((c := compressed_attention(*x, width=8, stride=4, layout=layout)).o, c.lse),
            (inputs[0], ck, cv),
        ),
    }
    for op, tensors in ops.values():
        fast = gradients(op, tensors, "torch")
        low = gradients(op, tensors, "reference")
        truth = gradients(op, [x.double() for x in tensors], "reference")
        for x, y, z in zip(fast, low, truth, strict=True):
            assert_close(x, y, z)


def gradients(op, tensors: list[Tensor], backend: str) -> tuple[Tensor, ...]:
    """Return the gradients of a sum of o and lse with fixed weights."""
    inputs = leaves(*tensors)
    with use_backend(backend):
        o, lse = op(*inputs)
    g = torch.Generator().manual_seed(5)
    weights = [torch.randn(x.shape, generator=g) for x in (o, lse)]
    total = (o.double() * weights[0]).sum() + (finite(lse).double() * weights[1]).sum()
    return torch.autograd.grad(total, inputs)


def test_selection_has_no_gradient() -> None:
    q, ck, cv = leaves(*make_qkv(1, 40, 9, (4, 2)))
    rule = BlockTopK(block_size=8, num_blocks=3)
    out = compressed_attention(q, ck, cv, width=8, stride=4, rule=rule, layout=DENSE_LAYOUT)
    assert not out.selection.block_indices.requires_grad
    assert out.o.requires_grad


def test_autocast_does_not_change_the_precision() -> None:
    q, k, v = leaves(*make_qkv(1, 60, 60, (4, 2), dtype=torch.float32))
    pattern = make_blocks(1, 2, 60, 60, 4, 8, 1, DENSE_LAYOUT)
    expected = torch.autograd.grad(sparse_attention(q, k, v, pattern)[0].sum(), (q, k, v))
    with torch.autocast("cpu", torch.bfloat16):
        o = sparse_attention(q, k, v, pattern)[0]
    assert o.dtype == torch.float32
    for x, y in zip(torch.autograd.grad(o.sum(), (q, k, v)), expected, strict=True):
        assert torch.allclose(x, y, atol=1e-5)
