"""Pickled weights as a source, where asked for: read by torch's restricted unpickler, written as safetensors.

A pickle is a program. ``weights_only`` lets it build tensors and plain containers and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsa_convert.checkpoint.headers import WEIGHT_DTYPES, ShardHeader, TensorEntry
from nsa_convert.checkpoint.manifest import write_json
from nsa_convert.checkpoint.shards import (
    INDEX_FILE,
    INDEX_LIMIT,
    SINGLE_FILE,
    Shard,
    WeightFiles,
    resolve_inside,
)
from nsa_convert.checkpoint.source import SOURCE_README, Checkpoint, open_checkpoint
from nsa_convert.checkpoint.staging import copy_file, use_umask
from nsa_convert.errors import CheckpointError
from nsa_convert.strict_files import read_json_mapping

PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"

_CODES = {getattr(torch, name): code for code, name in WEIGHT_DTYPES.items()}
_PART = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin")


def is_pickled(folder: Path) -> bool:
    """Return whether a folder holds pickled weights and no others."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    return not names & {SINGLE_FILE, INDEX_FILE} and bool(names & {PICKLE_FILE, PICKLE_INDEX})


def open_pickled(folder: Path, *, allow_extra_tensors: bool = False) -> Checkpoint:
    """Describe the dense checkpoint that a folder of pickled weights will become.

    Raises:
        UnsupportedModelError: The architecture is not supported.
        CheckpointError: The folder is damaged, or a pickle holds more than tensors.
    """
    shards = []

    # Each file becomes one shard; its tensors lie one after the other.
    for name, tensors in _parts(folder):
        entries = []
        at = 0
        for key, tensor in tensors.items():
            if tensor.dtype not in _CODES:
                raise CheckpointError(
                    f"tensor {key} of {name} has dtype {tensor.dtype}",
                    code="CK26",
                    where=key,
                    expected=", ".join(WEIGHT_DTYPES.values()),
                    found=str(tensor.dtype),
                )

            end = at + tensor.nbytes
            shape = tuple(tensor.shape)
            code = _CODES[tensor.dtype]
            entries.append(TensorEntry(name=key, dtype=code, shape=shape, start=at, end=end))
            at = end

        header = ShardHeader(
            path=folder / name, file_bytes=at, data_start=0, digest="", tensors=tuple(entries), metadata={}
        )
        shards.append(Shard(name=_new_name(name), header=header))

    weights = WeightFiles(shards=tuple(shards), index=None, warnings=("the weights were pickled (CK31)",))
    return open_checkpoint(folder, allow_extra_tensors=allow_extra_tensors, weights=weights)


def write_unpickled(folder: Path, target: Path, side_files: tuple[str, ...]) -> None:
    """Write a folder of pickled weights as an ordinary dense folder, file by file.

    Args:
        folder: The source.
        target: The folder to make.
        side_files: Names of further files to copy.
    """
    from safetensors.torch import save_file

    target.mkdir()  # why: the unpickled model, inside the staging folder of the caller
    weight_map: dict[str, str] = {}

    for name, tensors in _parts(folder):
        new = _new_name(name)
        # why: the unpickled model, inside the staging folder of the caller
        save_file(tensors, target / new, metadata={"format": "pt"})
        use_umask(target / new)
        weight_map |= dict.fromkeys(tensors, new)

    if set(weight_map.values()) != {SINGLE_FILE}:
        write_json(target / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})

    for name in ("config.json", SOURCE_README, *side_files):
        if (folder / name).exists():
            copy_file(resolve_inside(folder, name), target / name)


def _new_name(name: str) -> str:
    return name.replace("pytorch_model", "model").replace(".bin", ".safetensors")


def _parts(folder: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield file name and tensors of each pickled file; tied weights once, each with memory of its own."""
    names = [PICKLE_FILE]

    # Several files are named by an index; no name may lead out of the folder.
    if (folder / PICKLE_INDEX).exists():
        index = read_json_mapping(resolve_inside(folder, PICKLE_INDEX), limit=INDEX_LIMIT, code="CK20")
        places = index.get("weight_map")
        places = list(places.values()) if isinstance(places, dict) else [None]
        if not places or not all(isinstance(name, str) and _PART.fullmatch(name) for name in places):
            raise CheckpointError(
                f"{PICKLE_INDEX} has no 'weight_map' from tensor names to {PICKLE_FILE} files",
                code="CK20",
                where=PICKLE_INDEX,
            )
        names = sorted(set(places))

    for name in names:
        yield name, _own_memory(_load(resolve_inside(folder, name), name))


def _load(path: Path, name: str) -> Any:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # why: torch raises many kinds for bytes that are no pickle, or a forbidden one
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(
            f"{name} is damaged or holds more than tensors: {reason}",
            code="CK32",
            where=name,
            expected="a pickle of tensors",
            hint="do not load it in another way unless you know where it comes from",
        ) from error

    # Tensors alone: no subclass, no sparse layout, no nested container.
    if not isinstance(loaded, dict) or not all(
        isinstance(key, str) and type(value) is Tensor and value.layout is torch.strided
        for key, value in loaded.items()
    ):
        raise CheckpointError(f"{name} is no mapping from names to tensors", code="CK32", where=name)

    return loaded


def _own_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give every tensor memory of its own: a pickle may hold views of one block, safetensors does not."""
    plain = torch.contiguous_format
    return {name: tensor.detach().clone(memory_format=plain) for name, tensor in tensors.items()}
