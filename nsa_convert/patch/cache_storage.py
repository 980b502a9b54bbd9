"""Tensors that a cache grows in place: what may be written, and how tokens are appended."""

from __future__ import annotations

import torch
from torch import Tensor

GROWTH = 256
"""A growing buffer gets room for at least this many tokens more, and for a 64th more than it holds."""


def may_be_written(x: Tensor) -> bool:
    """Return whether a tensor may be changed in place: no gradient needs it, no inference mode made it."""
    if torch.compiler.is_compiling():
        return True
    return not x.requires_grad and (not x.is_inference() or torch.is_inference_mode_enabled())


def may_write_in_place(held: Tensor, new: Tensor) -> bool:
    """Return whether no gradient and no compiler needs the cache as it was."""
    tracked = torch.is_grad_enabled() and (held.requires_grad or new.requires_grad)
    return not tracked and not torch.compiler.is_compiling()


def version(x: Tensor) -> int | None:
    """Return how often a tensor was changed in place; None for an inference tensor."""
    return None if x.is_inference() else x._version


def append_tokens(buffer: Tensor | None, held: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Append ``new`` to ``held`` along dim 2, in place when ``held`` is the front of a buffer with room.

    torch.cat copies the whole cache for every token; a buffer with slack copies it rarely. Beam reordering
    and batch selection leave ``held`` outside the buffer, then a new buffer is made.

    Returns:
        The buffer and the part of it that is in use, in the dtype of ``held``.
    """
    length = held.shape[2] if held.dim() == 4 else 0  # an empty DynamicLayer holds a 1-D tensor
    total = length + new.shape[2]

    # Make a new buffer unless the tokens held are the front of one with room.
    if not (
        buffer is not None
        and buffer.shape[2] >= total
        and buffer.data_ptr() == held.data_ptr()
        and buffer.stride() == held.stride()
        and buffer.shape[:2] == held.shape[:2]
        and may_be_written(buffer)
    ):
        buffer = held.new_empty(*new.shape[:2], total + max(GROWTH, total // 64), new.shape[3])
        if length:
            buffer[:, :, :length] = held

    buffer[:, :, length:total] = new
    return buffer, buffer[:, :, :total]
