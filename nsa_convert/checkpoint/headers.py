"""Read safetensors headers without reading weights, and refuse every file that breaks the format.

The format is 8 bytes of header length (little endian), a JSON header, the tensor bytes, as in the safetensors
format description. A path is looked at before it is opened, so a pipe can never block us.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import stat
from pathlib import Path
from typing import Any

from nsa_convert.errors import CheckpointError, MachineError
from nsa_convert.strict_files import parse_json

MAX_HEADER_BYTES = 32_000_000
"""The format allows three times that, real headers have less than one. It keeps reading below 0.5 GB."""
MAX_TENSOR_BYTES = 2**62

DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}
"""Bytes of one element, for the dtypes whose elements are whole bytes."""

WEIGHT_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Dtypes a dense weight may have, with torch's name for them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor of a shard, as its header describes it.

    Attributes:
        name: Parameter name.
        dtype: safetensors dtype name, such as ``"BF16"``.
        shape: Sizes.
        start: First byte, counted from the start of the file.
        end: One past the last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.end - self.start


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardHeader:
    """What a safetensors file says about itself.

    Attributes:
        path: The regular file, symlinks resolved.
        file_bytes: Its size.
        data_start: Offset of the first tensor byte.
        digest: sha256 of everything before ``data_start``.
        tensors: Entries in the order of their bytes.
        metadata: The ``__metadata__`` strings.
    """

    path: Path
    file_bytes: int
    data_start: int
    digest: str
    tensors: tuple[TensorEntry, ...]
    metadata: dict[str, str]


def require_regular_file(path: Path, name: str) -> int:
    """Return the size of a regular file, without opening it.

    Raises:
        CheckpointError: It is missing, or is a directory, pipe, socket or device.
    """
    try:
        info = path.stat()
    except OSError as error:
        code = "CK15" if path.is_symlink() else "CK10"
        what = "is a symlink that leads nowhere" if path.is_symlink() else "is missing"
        hint = "the download is incomplete; fetch the checkpoint again"
        raise CheckpointError(f"{name} {what}", code=code, where=name, hint=hint) from error

    if not stat.S_ISREG(info.st_mode):
        kind = "a directory" if stat.S_ISDIR(info.st_mode) else "a pipe, socket or device"
        code = "CK18" if stat.S_ISDIR(info.st_mode) else "CK17"
        raise CheckpointError(
            f"{name} is {kind}", code=code, where=name, expected="a regular file", found=kind
        )

    return info.st_size


def read_header(path: Path, name: str | None = None) -> ShardHeader:
    """Parse and check the header of one safetensors file.

    Args:
        path: The file.
        name: How messages call it; its file name when left out.

    Raises:
        CheckpointError: Any breach of the format; the message says which and what was found.
        MachineError: The file may not be read.
    """
    name = name or path.name
    size = require_regular_file(path, name)
    try:
        with path.open("rb") as file:
            raw = _read_raw_header(file, size, name)
    except PermissionError as error:
        raise MachineError(
            f"{name} may not be read: permission denied", code="CK19", where=name, hint=f"chmod u+r {name}"
        ) from error

    # The length of the JSON (8 bytes) and the JSON; the tensors' bytes come after it.
    data_start = 8 + len(raw)
    table = _parse_header(raw, name)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{name}: __metadata__ must be a mapping", code="CK05", where=name)

    entries = sorted(
        (_entry(key, value, data_start, name) for key, value in table.items()), key=lambda e: (e.start, e.end)
    )
    _check_offsets(entries, data_start, size, name)

    digest = hashlib.sha256(len(raw).to_bytes(8, "little") + raw).hexdigest()
    return ShardHeader(
        path=path,
        file_bytes=size,
        data_start=data_start,
        digest=digest,
        tensors=tuple(entries),
        metadata=metadata,
    )


def _read_raw_header(file: Any, size: int, name: str) -> bytes:
    """Return the JSON bytes of the header; say what the file is when it is something else."""
    if size == 0:
        raise CheckpointError(
            f"{name} has 0 bytes; the download is incomplete?",
            code="CK01",
            where=name,
            found="0 bytes",
            hint="fetch the checkpoint again",
        )

    head = file.read(512)
    _refuse_other_formats(head, name)
    if size < 8:
        raise CheckpointError(f"{name} has {size} bytes, too few for a header", code="CK04", where=name)

    # The first 8 bytes are the length of the JSON, little-endian.
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{name} is not a safetensors file of weights: its header would have {length:,} bytes",
            code="CK04",
            where=name,
            expected=f"at most {MAX_HEADER_BYTES:,} bytes",
            found=f"{length:,}",
        )

    if 8 + length > size:
        raise CheckpointError(
            f"{name} is cut off inside its header: {size:,} bytes, the header alone needs {8 + length:,}",
            code="CK02",
            where=name,
            expected=f"at least {8 + length:,} bytes",
            found=f"{size:,} bytes",
            hint="fetch the checkpoint again",
        )

    if length and head[8:9] != b"{":
        raise CheckpointError(f"{name}: the header does not start with '{{'", code="CK05", where=name)

    file.seek(8)
    return file.read(length)


def _refuse_other_formats(head: bytes, name: str) -> None:
    """Recognise what is often found where a shard should be."""
    text = head.lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{name} is a Git LFS pointer, not the weights",
            code="CK08",
            where=name,
            hint="run `git lfs pull`",
        )

    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(
            f"{name} is an HTML page, not weights",
            code="CK09",
            where=name,
            hint="the download returned an error page; fetch the checkpoint again",
        )

    if text.startswith((b'{"error', b'{"message', b'{"detail')):
        raise CheckpointError(
            f"{name} is a JSON error message, not weights",
            code="CK09",
            where=name,
            hint="the download returned an error; fetch the checkpoint again",
        )


def _parse_header(raw: bytes, name: str) -> dict[str, Any]:
    """Return the header's JSON object; a tensor that is listed twice is an error."""
    table = parse_json(raw, f"the header of {name}", syntax="CK05", size="CK04", value="CK06")
    if not isinstance(table, dict):
        raise CheckpointError(f"{name}: the header is not a JSON object", code="CK05", where=name)
    return table


def _entry(key: str, value: Any, data_start: int, name: str) -> TensorEntry:
    """Check one header entry: dtype known, sizes and offsets whole numbers, bytes = shape x dtype."""
    where = f"{name}: {key}"
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise CheckpointError(f"{where}: dtype, shape or data_offsets is missing", code="CK05", where=where)
    dtype = value["dtype"]
    shape = value["shape"]
    offsets = value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(
            f"{where}: dtype {dtype!r} is not known", code="CK26", where=where, found=repr(dtype)
        )
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{where}: shape {shape} and offsets {offsets} must be whole numbers from 0",
            code="CK07",
            where=where,
        )

    # The bytes that the header claims must be those that shape and dtype need.
    expected = math.prod(shape) * DTYPE_BYTES[dtype]
    if expected > MAX_TENSOR_BYTES or offsets[1] - offsets[0] != expected:
        raise CheckpointError(
            f"{where}: shape {shape} in {dtype} takes {expected:,} bytes, the offsets span "
            f"{offsets[1] - offsets[0]:,}",
            code="CK07",
            where=where,
        )

    return TensorEntry(
        name=key, dtype=dtype, shape=tuple(shape), start=data_start + offsets[0], end=data_start + offsets[1]
    )


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_offsets(entries: list[TensorEntry], data_start: int, size: int, name: str) -> None:
    """Require that the tensors follow one another without gap or overlap and end with the file."""
    at = data_start

    # Tensor by tensor: each begins where the one before it ends.
    for entry in entries:
        if entry.start != at:
            kind = "overlaps the tensor before it" if entry.start < at else "leaves a gap before it"
            raise CheckpointError(
                f"{name}: {entry.name} {kind} (byte {entry.start - data_start}, expected {at - data_start})",
                code="CK07",
                where=f"{name}: {entry.name}",
            )
        at = entry.end

    # The last one ends with the file.
    if at > size:
        raise CheckpointError(
            f"{name} is cut off: {size:,} bytes, its header promises {at:,}",
            code="CK02",
            where=name,
            expected=f"{at:,} bytes",
            found=f"{size:,} bytes",
            hint="fetch the checkpoint again",
        )
    if at < size:
        raise CheckpointError(
            f"{name} has {size - at:,} bytes after its last tensor",
            code="CK03",
            where=name,
            expected=f"{at:,} bytes",
            found=f"{size:,} bytes",
        )
