"""The tensors a conversion adds: their description before, and their file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nsa_convert.checkpoint.headers import WEIGHT_DTYPES
from nsa_convert.checkpoint.source import Checkpoint
from nsa_convert.checkpoint.staging import use_umask
from nsa_convert.config import AttentionGeometry, SparseAttentionConfig
from nsa_convert.methods.parts.base import SparseMethod
from nsa_convert.plan import new_tensors, sparse_prefix


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewTensor:
    """One tensor that conversion adds.

    Attributes:
        name: Parameter name.
        shape: Sizes.
        dtype: torch's name of the dtype.
        init: Its value at the start, in words.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    init: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.size * getattr(torch, self.dtype).itemsize


def planned_tensors(
    methods: Sequence[SparseMethod], geometry: AttentionGeometry, dtype: str
) -> list[NewTensor]:
    """Describe the tensors that a plan adds.

    Args:
        methods: One method per layer, on the meta device.
        geometry: Sizes of an attention layer.
        dtype: torch's name of the model's dtype.
    """
    # Layers of one method with the same settings start alike, so each such pair is built once.
    rules: dict[tuple[type, str], dict[str, str]] = {}
    tensors = []

    for layer, method in enumerate(methods):
        key = (type(method), repr(method.settings))
        if key not in rules:
            rules[key] = _initial_values(type(method)(method.settings, geometry, layer))

        tensors += [
            NewTensor(
                name=sparse_prefix(layer) + name,
                shape=tuple(parameter.shape),
                dtype=dtype,
                init=rules[key][name],
            )
            for name, parameter in method.named_parameters()
        ]

    return tensors


def write_new_shard(path: Path, checkpoint: Checkpoint, sparse: SparseAttentionConfig) -> None:
    """Write the new tensors at their initial values; the file gets the mode that the umask gives."""
    dtype = getattr(torch, WEIGHT_DTYPES[checkpoint.weights.dtype()])
    tensors = new_tensors(checkpoint.config, sparse, dtype, tensor_reader(checkpoint))
    # why: the new shard, inside the staging folder of the caller
    save_file(tensors, path, metadata={"format": "pt"})
    use_umask(path)


def tensor_reader(checkpoint: Checkpoint) -> Callable[[str], Tensor]:
    """Return a function that reads one tensor of a checkpoint by name."""
    place = {
        entry.name: shard.header.path for shard in checkpoint.weights.shards for entry in shard.header.tensors
    }

    def read(name: str) -> Tensor:
        with safe_open(place[name], "pt") as file:
            return file.get_tensor(name)

    return read


def _initial_values(method: SparseMethod) -> dict[str, str]:
    """Say in words where each parameter of a method starts."""
    copies = method.dense_copies()
    return {
        name: f"copy of {copies[name].dense}" if name in copies else _describe(parameter.detach())
        for name, parameter in method.named_parameters()
    }


def _describe(value: Tensor) -> str:
    low = value.min().item()
    high = value.max().item()
    return f"constant {low:g}" if low == high else f"{low:g} to {high:g}"
