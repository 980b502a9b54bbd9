"""Gates: one number per query head and branch, from the layer's input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nsa_convert.methods.parts.base import InitialisedModule

SATURATION_BIAS = 4.0
"""|bias| of the paper's sigmoid gate at conversion: sigma(4) = 0.982, slope 0.018, still trainable."""


class BranchGate(InitialisedModule):
    """Gates over the branches of one layer.

    ``"signed"`` starts exactly at the dense model and has slope 1/2 there: a branch that starts open is
    ``2 sigma(W x)`` = 1, one that starts shut is ``2 sigma(W x) - 1`` = 0. ``"sigmoid"`` is the NSA paper's
    ``sigma(W x + b)`` (eq. 5) with biases that start near open or shut.

    | parameter | initial value | why |
    |---|---|---|
    | weight ``[HQ * branches, hidden]`` | 0 | the gate starts at a constant, the same for every token |
    | bias ``[HQ * branches]`` (sigmoid only) | +4 open, -4 shut | sigma(0) = 1/2 would mix three averages |

    Args:
        hidden_size: Width of the input.
        num_heads: HQ.
        open_branches: For each branch, whether it starts open.
        kind: ``"signed"`` or ``"sigmoid"``.
    """

    def __init__(self, hidden_size: int, num_heads: int, open_branches: tuple[bool, ...], kind: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.open_branches = open_branches
        self.kind = kind
        self.pass_through = False
        """While True the gates are exactly 1 for open branches and 0 for shut ones (see ``verify``)."""

        self.weight = nn.Parameter(torch.empty(num_heads * len(open_branches), hidden_size))
        self.bias = nn.Parameter(torch.empty(num_heads * len(open_branches))) if kind == "sigmoid" else None
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        """Return the table in the class docstring as tensors."""
        values = {"weight": torch.zeros(self.weight.shape)}
        if self.bias is not None:
            start = [SATURATION_BIAS if is_open else -SATURATION_BIAS for is_open in self.open_branches]
            values["bias"] = torch.tensor(start).repeat(self.num_heads)
        return values

    def forward(self, hidden: Tensor) -> Tensor:
        """Return gates ``[B, T, HQ, branches]`` for hidden ``[B, T, hidden]``, in the weights' dtype."""
        hidden = hidden.to(self.weight.dtype)

        # Filled on the device: a copy from the host would break CUDA graph capture.
        is_open = torch.cat([hidden.new_full((1,), float(is_open)) for is_open in self.open_branches])
        if self.pass_through:
            return is_open.expand(*hidden.shape[:-1], self.num_heads, -1)

        gates = torch.sigmoid(nn.functional.linear(hidden, self.weight, self.bias))
        # Of a tensor-parallel layer only the local heads have rows here.
        gates = gates.unflatten(-1, (-1, len(self.open_branches)))
        return gates if self.kind == "sigmoid" else 2 * gates - (1 - is_open)
