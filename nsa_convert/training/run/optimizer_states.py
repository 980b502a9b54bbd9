"""The optimizer's state of a checkpoint: written in parts by all processes, read by any number of them.

The format is that of torch.distributed.checkpoint in safetensors files: tensors alone, no code, mapped when
they are read. Each tensor is named after its weight, so that neither the number of processes nor the way they
share the weights is part of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nsa_convert.errors import CheckpointError

OPTIMIZER = "optimizer"
"""Folder of the state inside a checkpoint."""
EARLIER_OPTIMIZER = "optimizer.pt"
"""File of the state in checkpoints of earlier versions, which this one does not read."""
FILE_BYTES = 2 * 10**9
"""Bytes of whole tensors that go into one file of each process: so much is copied at once to write it."""


def save_optimizer(model: nn.Module, optimizer: Any, folder: Path) -> None:
    """Write the state of an optimizer; every process has to call this and writes its own part.

    Args:
        model: The model, its weights as the optimizer has them.
        optimizer: The optimizer; accelerate may have wrapped it.
        folder: Is created.
    """
    states = _unwrapped(optimizer).state
    values = {
        f"{name}.{key}": value.reshape(1) if value.dim() == 0 else value
        for name, p in _held(model, optimizer).items()
        for key, value in states.get(p, {}).items()
    }

    # Which file a tensor goes to is the same in every process.
    files, size = {}, 0
    for name, value in values.items():
        files[name] = 1 + size // FILE_BYTES
        size += value.numel() * value.element_size()

    writer = HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
    with _calm():
        dcp.save(values, storage_writer=writer, no_dist=not dist.is_initialized())


def load_optimizer(model: nn.Module, optimizer: Any, folder: Path) -> None:
    """Load a state of :func:`save_optimizer`; every process has to call this and reads its own part.

    A weight without state, which never had a gradient, stays without.

    Raises:
        CheckpointError: The state belongs to weights that the model does not train (TR12).
    """
    reader = HuggingFaceStorageReader(str(folder))
    held = _held(model, optimizer)

    # Room for every tensor of the files: cut as its weight is, whichever way it was cut before.
    values: dict[str, Tensor] = {}
    for name, facts in reader.read_metadata().state_dict_metadata.items():
        weight, _, key = name.rpartition(".")
        assert isinstance(facts, TensorStorageMetadata)
        if weight not in held:
            raise CheckpointError(
                f"{folder} holds a state of {weight}, which this stage does not train",
                code="TR12",
                where=str(folder),
                hint="resume with the recipe and settings of the run, or choose another out",
            )
        dtype = facts.properties.dtype
        like = torch.zeros(()) if key == "step" else held[weight].detach()
        empty = torch.empty_like(like, dtype=dtype)
        values[name] = empty.reshape(1) if empty.dim() == 0 else empty

    with _calm():
        dcp.load(values, storage_reader=reader, no_dist=not dist.is_initialized())

    states = _unwrapped(optimizer).state
    for name, value in values.items():
        weight, _, key = name.rpartition(".")
        p = held[weight]
        states[p][key] = value.reshape(()) if key == "step" or p.dim() == 0 else value


def load_weights(model: Any, folder: Path) -> None:
    """Load the weights of a folder into a sharded model; every process calls this and reads its own part."""
    state = model.state_dict()
    tied = model.all_tied_weights_keys
    values = {name: value for name, value in state.items() if name not in tied}
    with _calm():
        dcp.load(values, storage_reader=HuggingFaceStorageReader(str(folder)))

    # A tied weight is not in the files; cut, it may have memory of its own.
    with torch.no_grad():
        for name, source in tied.items():
            state[name].copy_(state[source])


def bad_states(folder: Path) -> Iterator[tuple[str, str, bool]]:
    """Read all files of a state once; yield file, what is wrong and whether a number is the reason.

    Yields:
        Name of the file in the checkpoint; the name of a tensor that holds NaN or infinity and True, or a
        sentence about a file that cannot be read and False.
    """
    for path in sorted((folder / OPTIMIZER).glob("*.safetensors")):
        name = f"{OPTIMIZER}/{path.name}"
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    if not bool(torch.isfinite(file.get_tensor(key)).all()):
                        yield name, key, True
        except (SafetensorError, OSError, ValueError) as error:
            yield name, f"{name} cannot be read ({type(error).__name__})", False


def is_optimizer(name: str) -> bool:
    """Return whether a name of a checkpoint is the folder of the optimizer's state or a file in it."""
    return name.split("/")[0] == OPTIMIZER


def _unwrapped(optimizer: Any) -> Any:
    """Return the optimizer of torch inside the one of accelerate."""
    return getattr(optimizer, "optimizer", optimizer)


def _held(model: nn.Module, optimizer: Any) -> dict[str, nn.Parameter]:
    """Return name -> weight of all that an optimizer trains."""
    held = {id(p) for group in _unwrapped(optimizer).param_groups for p in group["params"]}
    return {name: p for name, p in model.named_parameters() if id(p) in held}


@contextmanager
def _calm() -> Iterator[None]:
    """Raise the error of a process that failed as it is; hide the notice that one saves without others."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    except CheckpointException as error:
        # The first one: of a full disk every process has the same.
        raise next(iter(error.failures.values()))[0] from error
