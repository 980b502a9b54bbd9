"""Checks of tensor arguments that every op shares, and the accumulation dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_qkv(q: Tensor, k: Tensor, v: Tensor | None) -> None:
    """Raise ValueError unless q ``[B, TQ, HQ, D]`` fits k and v ``[B, TK, H, D]``.

    Raises:
        ValueError: Ranks, batch sizes, head dims, head counts, dtypes or devices do not agree.
    """
    problems = []
    tensors = {"q": q, "k": k} if v is None else {"q": q, "k": k, "v": v}

    # Without four dimensions the other checks would read the wrong sizes.
    wrong = {name: tuple(x.shape) for name, x in tensors.items() if x.dim() != 4}
    if wrong:
        raise ValueError(f"expected tensors of shape [B, T, H, D], got {wrong}")

    # Sizes
    if q.shape[0] != k.shape[0]:
        problems.append(f"batch sizes differ: q {q.shape[0]}, k {k.shape[0]}")
    if q.shape[3] != k.shape[3]:
        problems.append(f"head dims differ: q {q.shape[3]}, k {k.shape[3]}")
    if q.shape[2] % k.shape[2]:
        problems.append(f"query heads {q.shape[2]} are not a multiple of key heads {k.shape[2]}")
    if v is not None and v.shape[:3] != k.shape[:3]:
        problems.append(f"k {tuple(k.shape)} and v {tuple(v.shape)} differ before the head dim")

    # Dtypes and devices
    if len({x.dtype for x in tensors.values()}) > 1:
        found = ", ".join(f"{name} {x.dtype}" for name, x in tensors.items())
        problems.append(f"dtypes differ: {found}; cast them to one dtype first")
    if len({x.device for x in tensors.values()}) > 1:
        problems.append("tensors are on different devices")

    if problems:
        raise ValueError("; ".join(problems))


def check_parts(q: Tensor, parts: Sequence[Tensor]) -> None:
    """Raise ValueError unless the parts, side by side along their last dimension, are keys for q.

    Raises:
        ValueError: There is no part, or :func:`check_qkv` finds a problem.
    """
    if not parts:
        raise ValueError("expected at least one part of the cell keys, got none")

    sizes = [x.shape[-1] for x in parts]
    if len(parts) > 1 and sum(sizes) != q.shape[-1]:
        raise ValueError(f"head dims differ: q {q.shape[-1]}, k {' + '.join(map(str, sizes))}")

    rows = [q] if len(parts) == 1 else q.split(sizes, -1)
    for x, part in zip(rows, parts, strict=True):
        check_qkv(x, part, None)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of scores, softmax and lse: float64 for float64 input, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def default_scale(q: Tensor, scale: float | None) -> float:
    """Return ``scale``, or D ** -0.5 when it is None."""
    return q.shape[-1] ** -0.5 if scale is None else scale
