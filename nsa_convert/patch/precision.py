"""One dtype for one attention: which it is, and where automatic casts end."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def attention_dtype(projected: Tensor) -> torch.dtype:
    """Return the dtype of queries, keys, values and token states, as autocast chooses it for SDPA.

    Under autocast that is its dtype (float64 stays): RoPE and norms leave float32 beside values in half
    precision. Elsewhere it is that of the projections.

    Args:
        projected: The values as they leave their projection.
    """
    kind = projected.device.type
    if not _is_autocast(kind) or projected.dtype == torch.float64:
        return projected.dtype
    return torch.get_autocast_dtype(kind)


def without_autocast(device_type: str) -> AbstractContextManager:
    """Return a block in which products are computed in the dtype of their operands.

    Scores, attention mass and losses are promised in at least float32, and are cast to it by hand.
    """
    if not _is_autocast(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def _is_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
