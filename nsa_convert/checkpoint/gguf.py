"""GGUF files as a source: read through transformers, written as an ordinary dense folder."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nsa_convert.checkpoint.gguf_header import read_gguf_config
from nsa_convert.checkpoint.headers import (
    DTYPE_BYTES,
    WEIGHT_DTYPES,
    ShardHeader,
    TensorEntry,
    require_regular_file,
)
from nsa_convert.checkpoint.problems import Problems
from nsa_convert.checkpoint.shards import SINGLE_FILE, Shard, WeightFiles
from nsa_convert.checkpoint.source import Checkpoint
from nsa_convert.checkpoint.source_config import check_source_config, dense_tensor_shapes
from nsa_convert.checkpoint.staging import use_umask
from nsa_convert.errors import CheckpointError, MachineError
from nsa_convert.families import family_of, geometry_of

SUFFIX = ".gguf"


def is_gguf(path: Path) -> bool:
    """Return whether a path names a GGUF file."""
    return path.suffix.lower() == SUFFIX


def open_gguf(path: Path, dtype: str) -> Checkpoint:
    """Describe the dense checkpoint that a GGUF file will become, from its header alone.

    Raises:
        CheckpointError: The file is missing, is no GGUF file, or does not fit a supported model.
        UnsupportedModelError: The architecture is not supported.
        MachineError: The ``gguf`` package is missing.
    """
    check_gguf(path)

    config = {**read_gguf_config(path), "dtype": dtype}
    family = family_of(config)
    problems = Problems(path.name)
    check_source_config(config, family, problems)
    problems.raise_found()

    # The tensors that the dequantised file will hold, one after the other.
    names = {name: code for code, name in WEIGHT_DTYPES.items()}
    entries = []
    at = 0
    for name, shape in dense_tensor_shapes(config, family).items():
        end = at + math.prod(shape) * DTYPE_BYTES[names[dtype]]
        entries.append(TensorEntry(name=name, dtype=names[dtype], shape=shape, start=at, end=end))
        at = end

    header = ShardHeader(
        path=path, file_bytes=at, data_start=0, digest="", tensors=tuple(entries), metadata={"format": "pt"}
    )

    weights = WeightFiles(shards=(Shard(name=SINGLE_FILE, header=header),), index=None, warnings=())
    note = f"{path.name} is quantised; its weights are written as {dtype}"

    return Checkpoint(
        folder=path.parent,
        config=config,
        family=family,
        geometry=geometry_of(config, family),
        weights=weights,
        side_files=(),
        left_out=(),
        warnings=(note,),
    )


def check_gguf(path: Path) -> None:
    """Refuse what is not a GGUF file, and say what is missing to read one.

    Raises:
        CheckpointError: The file is missing, empty or something else.
        MachineError: The ``gguf`` package is missing.
    """
    size = require_regular_file(path, path.name)

    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise CheckpointError(
            f"{path.name} is not a GGUF file",
            code="CK09",
            where=path.name,
            expected="the letters GGUF at its start",
            found=f"{size:,} bytes starting with {magic!r}",
        )

    if importlib.util.find_spec("gguf") is None:
        raise MachineError(
            "reading GGUF files needs the package gguf", code="CL11", where=path.name, hint="pip install gguf"
        )


def write_dense_folder(path: Path, folder: Path, dtype: str) -> None:
    """Write a GGUF file as a dense checkpoint folder with its tokenizer.

    Args:
        path: The file.
        folder: The folder to make.
        dtype: torch's name of the dtype to write.

    Raises:
        CheckpointError: transformers cannot read the file.
    """
    from safetensors.torch import save_file

    model = load_gguf_model(path, dtype)

    # Tied weights are stored once, under the name that is not tied.
    tied = set(model.all_tied_weights_keys)
    tensors = {name: value.contiguous() for name, value in model.state_dict().items() if name not in tied}

    folder.mkdir(exist_ok=True)  # why: a dequantised model, inside the staging folder of the caller
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    use_umask(folder / SINGLE_FILE)

    model.config.save_pretrained(folder)  # why: beside the weights, inside the staging folder of the caller
    model.generation_config.save_pretrained(folder)
    load_gguf_tokenizer(path).save_pretrained(folder)


def load_gguf_tokenizer(path: Path) -> Any:
    """Return the tokenizer inside a GGUF file.

    Raises:
        CheckpointError: transformers cannot read it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # why: the tokenizers library raises nothing more precise
        raise CheckpointError(f"the tokenizer in {path.name} cannot be read: {error}", code="TK01") from error


def load_gguf_model(path: Path, dtype: str) -> Any:
    """Load a GGUF file as a dense model, without the quantisation config that would forbid saving it.

    Args:
        path: The file.
        dtype: torch's name of the dtype to decode to.

    Raises:
        CheckpointError: transformers cannot read the file.
    """
    from transformers import AutoModelForCausalLM

    check_gguf(path)
    with _damage(path):
        model, loading = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype, output_loading_info=True, **_dequantise()
        )

    # transformers fills what it did not find with random numbers and goes on.
    missing = sorted(set(loading["missing_keys"]) - set(model.all_tied_weights_keys))
    if missing:
        raise CheckpointError(
            f"{path.name} lacks {len(missing)} tensors, the first {missing[0]}",
            code="CK23",
            where=path.name,
            hint="the file is damaged, or transformers does not know its tensor names",
        )

    # What is left is an ordinary dense model: nothing of its config speaks of the file it came from.
    model.hf_quantizer = None
    for key in ("quantization_config", "_name_or_path"):
        if hasattr(model.config, key):
            delattr(model.config, key)
    return model.eval()


def _dequantise() -> dict[str, Any]:
    """Return the argument that keeps transformers from leaving the weights packed; older ones never do."""
    try:
        from transformers import GgufConfig
    except ImportError:  # why: older transformers have no such option and always dequantise
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn what transformers and gguf raise on a bad file into one error."""
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path.name} cannot be read: {text}",
            code="CK02",
            where=path.name,
            hint="the file is cut off, or its architecture is not one that transformers reads",
        ) from error
