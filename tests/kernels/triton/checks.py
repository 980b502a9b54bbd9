"""What every kernel test does: poison fresh memory, compare values and gradients with dense attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from nsa_convert.kernels.attention.reference import masked_softmax_attention
from nsa_convert.kernels.common.toolchain import Kernel
from tests.kernels.utils import assert_close


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new memory with NaN or a large number: a kernel must write all of its output.

    A launch must also name each argument once: the interpreter drops those it does not know, a GPU does not.
    """
    with torch.device("cpu"):
        torch.empty(0)  # torch lists its constructors once, for device contexts: not these ones
    empty, empty_strided = torch.empty, torch.empty_strided

    def fill(x: Tensor) -> Tensor:
        return x.fill_(torch.nan if x.is_floating_point() else 1 << 29)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_strided", lambda *a, **k: fill(empty_strided(*a, **k)))
    launch = Kernel.launch

    def strict(self: Kernel, grid: Any, like: Tensor, row: int, **arguments: Any) -> None:
        names = [*arguments, *self.fitting(row, arguments)[0].sizes]
        assert sorted(names) == sorted(inspect.signature(self.fn.fn).parameters), self.name
        launch(self, grid, like, row, **arguments)

    monkeypatch.setattr(Kernel, "launch", strict)


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round float32 to the nearest bfloat16, as a GPU does; the interpreter cuts bits off."""
    convert = interpreter._convert_float

    def nearest(x: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(x, source, target, mode)
        wide = torch.from_numpy(np.array(x, dtype=np.float32))
        return wide.bfloat16().view(torch.int16).numpy().view(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", nearest)


class RoundedAttention(torch.autograd.Function):
    """Dense attention whose matrix products take operands in the dtype of q, as matrix units do.

    Scores and softmax are float32. The output keeps even the probabilities in float32, as the reference does;
    the gradients round them and their own, as every fused backward does. In float32 nothing is rounded.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        o, lse, p = masked_softmax_attention(q, k, v, mask, scale)
        ctx.save_for_backward(q, k, v, o, p)
        ctx.scale = scale
        return o, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, p = ctx.saved_tensors
        group, dtype = q.shape[2] // k.shape[2], q.dtype
        wide = p.dtype
        keys, values = (x.to(wide).repeat_interleave(group, 2) for x in (k, v))
        dv = torch.einsum("bhqk,bqhd->bkhd", p.to(dtype).to(wide), do.to(wide))
        delta = (o.to(wide) * do.to(wide)).sum(-1) - dlse
        dp = torch.einsum("bqhd,bkhd->bhqk", do.to(wide), values)
        ds = (p * (dp - delta.transpose(1, 2)[..., None])).to(dtype).to(wide)
        dq = torch.einsum("bhqk,bkhd->bqhd", ds, keys) * ctx.scale
        dk = torch.einsum("bhqk,bqhd->bkhd", ds, q.to(wide)) * ctx.scale
        dk, dv = (x.unflatten(2, (-1, group)).sum(3).to(dtype) for x in (dk, dv))
        return dq.to(dtype), dk, dv, None, None


def run(op: Callable, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return o, lse and the gradients of a weighted sum of both."""
    inputs = [x.detach().clone().requires_grad_() for x in tensors]
    o, lse = op(*inputs)
    g = torch.Generator().manual_seed(5)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.device) for x in (o, lse)]
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    total = (o.double() * weights[0]).sum() + (finite.double() * weights[1]).sum()
    return (o.detach(), lse.detach(), *torch.autograd.grad(total, inputs))


def check(
    op: Callable, tensors: Sequence[Tensor], mask: Tensor, scale: float | None = None
) -> tuple[Tensor, ...]:
    """Compare o, lse and all gradients of an op with dense attention under a mask; return them.

    The error against float64 is at most twice that of dense attention in the dtype of the inputs, plus 1e-5.
    A backward that keeps lse and not the probabilities is off by the rounding of this float32, which counts
    where scores are large: gradients may be off by two of its rounding steps more.
    """
    scale = tensors[0].shape[-1] ** -0.5 if scale is None else scale
    got = run(op, tensors)
    low = run(lambda *x: RoundedAttention.apply(*x, mask, scale), tensors)
    truth = run(lambda *x: RoundedAttention.apply(*x, mask, scale), [x.double() for x in tensors])
    lse = truth[1].masked_fill(truth[1] == -torch.inf, 0.0)
    step = torch.finfo(torch.float32).eps * max(float(lse.abs().max()) - 16, 0) if lse.numel() else 0.0
    for i, (x, y, z) in enumerate(zip(got, low, truth, strict=True)):
        assert_close(x, y, z, extra=2 * step * float(z.abs().max()) if i > 1 and z.numel() else 0.0)
    return got
