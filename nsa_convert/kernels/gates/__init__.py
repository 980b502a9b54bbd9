"""The gated sum of branches (NSA eq. 5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nsa_convert.kernels.common.backend import choose_backend, kernel_function


def gated_sum(outputs: Sequence[Tensor], gates: Tensor) -> Tensor:
    """Return ``sum_i g_i o_i`` (NSA eq. 5).

    Args:
        outputs: n branches, each ``[B, TQ, HQ, D]``, of one dtype.
        gates: ``[B, TQ, HQ, n]``, cast to the dtype of the outputs.

    Returns:
        ``[B, TQ, HQ, D]``. The triton backend sums three branches in float32 and rounds once.

    Raises:
        ValueError: There are not as many gates as branches.
    """
    if gates.shape[-1] != len(outputs):
        raise ValueError(f"need one gate for each branch, got {gates.shape[-1]} and {len(outputs)}")

    gates = gates.to(outputs[0].dtype)
    if len(outputs) == 3 and choose_backend(outputs[0]) == "triton":
        return kernel_function("gates.triton_backend", "gated_sum")(tuple(outputs), gates)

    first, *others = gates.unsqueeze(-2).unbind(-1)  # each [B, TQ, HQ, 1]
    o = outputs[0] * first
    for part, gate in zip(outputs[1:], others, strict=True):
        o = torch.addcmul(o, part, gate)
    return o
