"""Differentiable collectives over a process group: all-reduce (sum) and all-gather."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _SumForward(torch.autograd.Function):
    """All-reduce (sum); backward passes the gradient on, which is the same in every process."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Total(torch.autograd.Function):
    """All-reduce (sum); backward multiplies the gradient, the same in every process, by the group size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.size = dist.get_world_size(group)
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.size, None


class _SumBackward(torch.autograd.Function):
    """Identity; backward all-reduces (sums) the gradient, of which each process has a part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _GatherTokens(torch.autograd.Function):
    """All-gather ``[B, T, H, D]`` along T; backward reduce-scatters: the summed gradient of the own piece."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        ctx.length = x.shape[1]
        parts = [
            torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(dist.get_world_size(group))
        ]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # gloo has no reduce-scatter; the sum of all and a slice is the same.
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        begin = dist.get_rank(ctx.group) * ctx.length
        return grad[:, begin : begin + ctx.length], None


@dataclasses.dataclass(frozen=True)
class Processes:
    """Processes that share the work of a layer, handed to it by whoever splits a model.

    Attributes:
        group: The process group of torch.
    """

    group: Any

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over the processes; for losses that are means over equally many heads or tokens."""
        return _SumForward.apply(values, self.group) / dist.get_world_size(self.group)

    def total(self, x: Tensor) -> Tensor:
        """Return the sum, for a loss whose gradients are averaged over the processes afterwards."""
        return _Total.apply(x, self.group)

    def sum_gradient(self, x: Tensor) -> Tensor:
        """Return ``x``; its gradient is summed over the processes."""
        return _SumBackward.apply(x, self.group)

    def gather_tokens(self, x: Tensor) -> Tensor:
        """Return the ``[B, T, H, D]`` pieces of all processes, joined along T in their order."""
        return _GatherTokens.apply(x, self.group)

    def tokens_before(self, length: int) -> int:
        """Return the tokens of a row that the processes before this one hold, ``length`` each."""
        return dist.get_rank(self.group) * length
