"""Keys and values that are broken, or changed, reach only those who see them: on every backend (KN19)."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from nsa_convert.kernels import use_backend
from nsa_convert.kernels.compressed import compressed_attention
from nsa_convert.patterns import (
    DENSE_LAYOUT,
    BlockSelection,
    BlockTopK,
    SequenceLayout,
    SinkWindow,
    TokenSelection,
)
from tests.faults.test_kernels import BACKENDS, attend, blocks
from tests.kernels.utils import make_qkv
from tests.marks import slow, these_quick

PRESENT = 24
"""Queries and keys from this one on are the future of the others."""

POISONS = [(torch.nan, torch.nan), (torch.nan, torch.inf), (1.0, -torch.inf), (1e4, 1e4)]


def poisonable(kind: str, length: int = 30):
    """Return an op of q, k, v, and the layout and pattern that say what a query sees."""
    order = torch.rand(1, 1, length, length, generator=torch.Generator().manual_seed(1)).argsort(-1)
    lists = torch.tensor([[[0, 1], [1, 6]], [[0, 3], [2, 7]]])[None]  # one for each head and 16 queries
    layout = SequenceLayout(start=torch.tensor([1])) if kind == "dense" else DENSE_LAYOUT
    pattern = {
        "window": SinkWindow(num_sinks=2, window_size=7),
        "blocks": blocks(length, length, 1),
        "small blocks": blocks(length, length, 1, block_size=2),
        "tiles": BlockSelection(block_indices=lists, block_size=4, query_block=16),
        "tokens": TokenSelection(token_indices=order[..., :9]),
        "dense": SinkWindow(window_size=length),
    }[kind]
    return pattern, layout


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        # The interpreter takes long where keys are fetched one by one.
        slow(name, kind) if name == "triton" and kind in ("small blocks", "tiles", "tokens") else (name, kind)
        for name in BACKENDS
        for kind in ("window", "blocks", "small blocks", "tiles", "tokens", "dense")
    ],
)
def test_kn19_poisoned_future_keys(name, kind):
    """Changing the future changes no bit of what earlier queries get, nor of their gradients."""
    q, k, v = make_qkv(1, 30, 30, (2, 1), 16, torch.float32)
    pattern, layout = poisonable(kind)
    sees = pattern.to_dense_mask(30, 30, 2, layout, device="cpu").any(1)[0]  # by any head, [TQ, TK]
    clean = earlier(name, pattern, layout, (q, k, v))
    for key, value in POISONS:
        late_k, late_v = k.clone(), v.clone()
        late_k[:, PRESENT:], late_v[:, PRESENT:] = key, value
        o, lse, dq, dk, dv = earlier(name, pattern, layout, (q, late_k, late_v))
        for got, want in zip((o, lse, dq), clean[:3], strict=True):
            assert torch.equal(got[:, :PRESENT], want[:, :PRESENT]), (key, value)
        broken = ~o.isfinite().flatten(2).all(-1)[0]
        assert torch.equal(broken, sees[:, PRESENT:].any(1) & (not math.isfinite(key + value)))
        if name == "torch" and broken.any():
            continue  # a broken query breaks the gradients of the keys of its whole tile
        # A key that a broken query sees has no gradient any more; all others keep theirs.
        kept = ~sees[broken].any(0) & (torch.arange(30) < PRESENT)
        assert kept.any()
        for got, want in zip((dk, dv), clean[3:], strict=True):
            assert torch.equal(got[:, kept], want[:, kept]), (key, value)


def earlier(name, pattern, layout, tensors):
    """Return o, lse and the gradients of a sum over what the queries before PRESENT get."""
    q, k, v = (x.detach().clone().requires_grad_() for x in tensors)
    o, lse = attend(name, pattern, layout)(q, k, v)
    weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(2))[:, :PRESENT]
    seen = lse[:, :PRESENT] > -torch.inf
    total = (o[:, :PRESENT] * weights).sum() + lse[:, :PRESENT][seen].sum()
    return (o.detach(), lse.detach(), *torch.autograd.grad(total, (q, k, v)))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", ["window", "blocks", "tokens", "dense"])
def test_kn19_poison_in_a_cache_that_steps_do_not_reach(name, kind):
    """Two queries on a cache whose later slots hold rubbish."""
    q, k, v = make_qkv(1, 2, 30, (2, 1), 16, torch.float32)
    layout = SequenceLayout(offset=torch.tensor(PRESENT - 2))
    pattern = {
        "window": SinkWindow(num_sinks=2, window_size=7),
        "blocks": blocks(2, 30, 1),
        "tokens": TokenSelection(token_indices=torch.arange(29, -1, -3).expand(1, 1, 2, -1)),
        "dense": SinkWindow(window_size=30),
    }[kind]
    want = attend(name, pattern, layout)(q, k, v)
    for key, value in POISONS:
        k[:, PRESENT:], v[:, PRESENT:] = key, value
        for x, y in zip(attend(name, pattern, layout)(q, k, v), want, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("name", these_quick(BACKENDS, ["torch"]))
def test_kn19_poisoned_future_cells(name):
    """Cells of 8 tokens every 4: values, the lse, the choice of blocks and the gradient of the queries."""
    q, k, v = make_qkv(1, 60, 14, (4, 2), 16, torch.float32)
    rule = BlockTopK(block_size=8, num_blocks=3)
    first = 6  # the cell that ends with token 31

    def run(ck, cv):
        leaf = q.clone().requires_grad_()
        with use_backend(name):
            out = compressed_attention(leaf, ck, cv, width=8, stride=4, rule=rule)
        (dq,) = torch.autograd.grad(out.o[:, :31].sum() + out.lse[:, 7:31].sum(), leaf)
        return out.o[:, :31], out.lse[:, :31], out.selection.block_indices[:, :, :31], dq[:, :31]

    want = run(k, v)
    for key, value in POISONS:
        late_k, late_v = k.clone(), v.clone()
        late_k[:, first:], late_v[:, first:] = key, value
        for x, y in zip(run(late_k, late_v), want, strict=True):
            assert torch.equal(x, y), (key, value)


@pytest.mark.parametrize("name", BACKENDS)
def test_kn19_a_value_reaches_only_those_who_list_its_block(name):
    """The past, too: queries of one tile list different blocks."""
    q, k, v = make_qkv(1, 40, 40, (2, 1), 16, torch.float32)
    pattern = blocks(40, 40, 1)
    want = attend(name, pattern)(q, k, v)[0]
    v[0, 3, 0, 5] = torch.inf
    o, lse = attend(name, pattern)(q, k, v)
    sees = pattern.to_dense_mask(40, 40, 2)[0, 0, :, 3]
    assert 0 < int(sees.sum()) < 37
    assert torch.equal(o[0, ~sees], want[0, ~sees])
    assert bool((~o[0, sees].isfinite()).any(-1).all())
    assert bool((lse[0, sees] > -torch.inf).logical_or(lse[0, sees].isnan()).all())
