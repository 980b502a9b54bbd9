"""Compressors: l tokens of a key or value head become one vector (NSA eq. 7).

Every compressor starts as mean pooling, so that a converted model scores blocks by their mean key.
All of them map windows ``[B, N, l, H, D]`` to cells ``[B, N, H, D]``, each head with its own weights.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from nsa_convert.methods.parts.base import InitialisedModule

Compressor = Literal["mean", "weighted", "linear", "mlp", "token_mlp"]
TOKEN_FEATURES = 4
"""Hidden units of the perceptron of a single token, per coordinate of the head."""


class MeanCompressor(nn.Module):
    """The mean over the window; no parameters."""

    def forward(self, windows: Tensor) -> Tensor:
        """Return the mean over dim 2."""
        return windows.mean(2)


class _LearnedCompressor(InitialisedModule):
    """A compressor with weights, computed in the wider dtype of weights and windows."""

    position: nn.Parameter

    def forward(self, windows: Tensor) -> Tensor:
        """Return the cells in the dtype of the windows."""
        wide = torch.promote_types(windows.dtype, self.position.dtype)
        return self.pool(windows.to(wide)).to(windows.dtype)

    def pool(self, windows: Tensor) -> Tensor:
        """Return the cells of ``[B, N, l, H, D]`` windows."""
        raise NotImplementedError


class WeightedCompressor(_LearnedCompressor):
    """A weighted sum over the window, after adding an intra-block position vector.

    | parameter | initial value | why |
    |---|---|---|
    | weight ``[H, l]`` | 1 / l | mean pooling |
    | position ``[H, l, D]`` | 0 | no shift of keys that the dense model already rotated |

    Args:
        num_heads: H.
        width: l.
        head_dim: D.
    """

    def __init__(self, num_heads: int, width: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, width))
        self.position = nn.Parameter(torch.empty(num_heads, width, head_dim))
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        """Return the table in the class docstring as tensors."""
        return {
            "weight": torch.full(self.weight.shape, 1 / self.weight.shape[1]),
            "position": torch.zeros(self.position.shape),
        }

    def pool(self, windows: Tensor) -> Tensor:
        """Return ``sum_l weight (window + position)``."""
        return torch.einsum("bnlhd,hl->bnhd", windows + self.position.transpose(0, 1), self.weight)


class LinearCompressor(_LearnedCompressor):
    """A linear map of the flattened window, after adding an intra-block position vector.

    | parameter | initial value | why |
    |---|---|---|
    | weight ``[H, l, D, D]`` (in, out) | identity / l for each token | mean pooling |
    | position ``[H, l, D]`` | 0 | as above |

    Args:
        num_heads: H.
        width: l.
        head_dim: D.
    """

    def __init__(self, num_heads: int, width: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, width, head_dim, head_dim))
        self.position = nn.Parameter(torch.empty(num_heads, width, head_dim))
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        """Return the table in the class docstring as tensors."""
        _, width, head_dim, _ = self.weight.shape
        return {
            "weight": (torch.eye(head_dim) / width).expand(self.weight.shape),
            "position": torch.zeros(self.position.shape),
        }

    def pool(self, windows: Tensor) -> Tensor:
        """Return the linear map of each window."""
        return torch.einsum("bnlhd,hlde->bnhe", windows + self.position.transpose(0, 1), self.weight)


class _MeanAndPerceptron(_LearnedCompressor):
    """The mean over the window plus a two-layer perceptron that starts at zero.

    Args:
        up: Shape of the first map, ``[H, *inputs, features]``.
        down: Shape of the second map.
        position: ``(H, l, D)``.
    """

    def __init__(self, up: tuple[int, ...], down: tuple[int, ...], position: tuple[int, ...]) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(up))
        self.down = nn.Parameter(torch.empty(down))
        self.position = nn.Parameter(torch.empty(position))
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        """Return the table in the class docstring as tensors."""
        generator = torch.Generator().manual_seed(0)
        inputs = math.prod(self.up.shape[1:-1])

        with torch.device("cpu"):
            up = torch.randn(self.up.shape, generator=generator) * inputs**-0.5

        return {"up": up, "down": torch.zeros(self.down.shape), "position": torch.zeros(self.position.shape)}


class MLPCompressor(_MeanAndPerceptron):
    """Mean pooling plus a two-layer perceptron of the flattened window that starts at zero.

    | parameter | initial value | why |
    |---|---|---|
    | up ``[H, l, D, D]`` (in, out) | normal, std (l D) ** -1/2, fixed seed | unit-scale features |
    | down ``[H, D, D]`` (in, out) | 0 | the residual starts at zero, the cell at the mean |
    | position ``[H, l, D]`` | 0 | as above |

    Args:
        num_heads: H.
        width: l.
        head_dim: D.
    """

    def __init__(self, num_heads: int, width: int, head_dim: int) -> None:
        h, l, d = num_heads, width, head_dim
        super().__init__(up=(h, l, d, d), down=(h, d, d), position=(h, l, d))

    def pool(self, windows: Tensor) -> Tensor:
        """Return the mean plus the perceptron's residual."""
        placed = windows + self.position.transpose(0, 1)
        inner = nn.functional.silu(torch.einsum("bnlhd,hlde->bnhe", placed, self.up))
        return windows.mean(2) + torch.einsum("bnhd,hde->bnhe", inner, self.down)


class TokenMLPCompressor(_MeanAndPerceptron):
    """The mean of the tokens and of a two-layer perceptron of each token that starts at zero.

    A query gives a block the mass ``sum_i exp(q k_i)``, a sum over tokens of what is not linear in the key,
    and so not in the mean key. The perceptron does not grow with l.

    | parameter | initial value | why |
    |---|---|---|
    | up ``[H, D, 4 D]`` (in, out) | normal, std D ** -1/2, fixed seed | unit-scale features |
    | down ``[H, 4 D, D]`` (in, out) | 0 | the residual starts at zero, the cell at the mean |
    | position ``[H, l, D]`` | 0 | as above |

    Args:
        num_heads: H.
        width: l.
        head_dim: D.
    """

    def __init__(self, num_heads: int, width: int, head_dim: int) -> None:
        h, d, features = num_heads, head_dim, TOKEN_FEATURES * head_dim
        super().__init__(up=(h, d, features), down=(h, features, d), position=(h, width, d))

    def pool(self, windows: Tensor) -> Tensor:
        """Return the mean plus the residual."""
        placed = windows + self.position.transpose(0, 1)
        inner = nn.functional.silu(torch.einsum("bnlhd,hde->bnlhe", placed, self.up)).mean(2)
        return windows.mean(2) + torch.einsum("bnhe,hed->bnhd", inner, self.down)


def has_weights(compressor: nn.Module) -> bool:
    """Return whether a compressor has something to learn."""
    return any(True for _ in compressor.parameters())


_CLASSES = {
    "weighted": WeightedCompressor,
    "linear": LinearCompressor,
    "mlp": MLPCompressor,
    "token_mlp": TokenMLPCompressor,
}


def build_compressor(kind: Compressor, num_heads: int, width: int, head_dim: int) -> nn.Module:
    """Return a compressor by its setting."""
    return MeanCompressor() if kind == "mean" else _CLASSES[kind](num_heads, width, head_dim)
