"""Rotary position embedding in the ``[B, T, H, D]`` layout, and its inverse."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x [B, T, H, D]`` by ``cos, sin [B or 1, T, D]`` (half-split pairing, as Llama and Qwen)."""
    return x * cos.unsqueeze(2) + _swap_halves(x) * sin.unsqueeze(2)


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Undo :func:`rotate`, the attention scaling of YaRN included (``cos**2 + sin**2`` is its square)."""
    norm = (cos * cos + sin * sin).unsqueeze(2)
    return (x * cos.unsqueeze(2) - _swap_halves(x) * sin.unsqueeze(2)) / norm


def mover(rotary: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return ``move(x, old, new)``: rotated ``x [B, T, h, D]`` turned between positions ``[B or 1, T]``.

    It computes in float32 or wider: two rotations in half precision would lose what one keeps.
    """

    def move(x: Tensor, old: Tensor, new: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        plain = unrotate(wide, *rotary(wide, position_ids=old))
        return rotate(plain, *rotary(wide, position_ids=new)).to(x.dtype)

    return move


def _swap_halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
