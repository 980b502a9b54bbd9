"""Find the weight files of a checkpoint folder: a single file or an index, and nothing outside the folder."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
from pathlib import Path
from typing import Any

from nsa_convert.checkpoint.download_notes import compare_revisions
from nsa_convert.checkpoint.headers import (
    DTYPE_BYTES,
    MAX_HEADER_BYTES,
    ShardHeader,
    TensorEntry,
    read_header,
    require_regular_file,
)
from nsa_convert.checkpoint.problems import Problems
from nsa_convert.errors import CheckpointError
from nsa_convert.strict_files import read_json_mapping

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
INDEX_LIMIT = 32_000_000

_SHARDED_STATE = re.compile(r"\.distcp$|^\.metadata$|^pytorch_model_fsdp_\d+$|^global_step\d+$")
_WINDOWS_HOSTILE = re.compile(r'[<>:"|?*\x00-\x1f]|[. ]$')
_WINDOWS_DEVICE = re.compile(r"^(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One weight file.

    Attributes:
        name: File name inside the folder.
        header: Its checked header; ``header.path`` is the file itself, symlinks resolved.
    """

    name: str
    header: ShardHeader


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """All weight files of a folder.

    Attributes:
        shards: In the order of their names.
        index: The parsed index file, or None for a single file.
        warnings: What is odd but harmless.
    """

    shards: tuple[Shard, ...]
    index: dict[str, Any] | None
    warnings: tuple[str, ...]

    def tensors(self) -> dict[str, TensorEntry]:
        """Return every tensor entry by name."""
        return {entry.name: entry for shard in self.shards for entry in shard.header.tensors}

    def dtype(self) -> str:
        """Return the safetensors dtype that most bytes have."""
        sizes: dict[str, int] = {}
        for entry in self.tensors().values():
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
        return max(sorted(sizes), key=lambda name: sizes[name], default="F32")

    def value_bytes(self) -> int:
        """Return the bytes of one value of :meth:`dtype`, which a cache of the loaded model has too."""
        return DTYPE_BYTES[self.dtype()]


def resolve_inside(folder: Path, name: str) -> Path:
    """Return the real path of a file of a checkpoint folder.

    A symlink may lead elsewhere inside the folder, or from ``snapshots/REVISION`` to ``blobs`` of the same
    Hub cache entry; everything else is refused. The file is not opened.

    Raises:
        CheckpointError: The name is no plain file name, or the file lies outside the folder, or is missing.
    """
    if (
        name in {"", ".", ".."}
        or "/" in name
        or "\\" in name
        or _WINDOWS_HOSTILE.search(name)
        or (_WINDOWS_DEVICE.match(name))
        or len(os.fsencode(name)) > 255
    ):
        code = "CK12" if name.startswith("/") else "CK11" if ".." in name else "CK13"
        what = "leaves the checkpoint directory" if code != "CK13" else "is not a plain file name"
        raise CheckpointError(
            f"the file name {name!r} {what}",
            code=code,
            where=name,
            expected="a file name without any folder",
            hint="do not use this checkpoint unless you know where it comes from",
        )

    path = folder / name
    try:
        real = path.resolve(strict=True)
    except (RuntimeError, OSError) as error:
        if isinstance(error, RuntimeError) or error.errno == errno.ELOOP:
            raise CheckpointError(
                f"{name} is a symlink that leads back to itself", code="CK15", where=name
            ) from error
        require_regular_file(path, name)
        raise

    # What the links lead to must be inside.
    if not any(real.is_relative_to(root) for root in _allowed_roots(folder)):
        raise CheckpointError(
            f"{name} is a symlink that leaves the checkpoint directory",
            code="CK14",
            where=name,
            expected=f"a file inside {folder.name}",
            found=f"a link to {real}",
            hint="copy the file into the folder if you trust it",
        )

    require_regular_file(real, name)
    return real


def _allowed_roots(folder: Path) -> list[Path]:
    """Return the folder itself and, for a Hub cache snapshot, the blobs folder beside it."""
    roots = [folder.resolve()]
    for place in (folder.absolute(), folder.resolve()):
        if place.parent.name == "snapshots":
            roots.append((place.parent.parent / "blobs").resolve())
    return roots


def find_weight_files(folder: Path, problems: Problems) -> WeightFiles:
    """Read the headers of every weight file of a folder; what is wrong goes to ``problems``."""
    names = {path.name for path in folder.iterdir()}
    warnings = _harmless_oddities(names)

    # A single file wins over an index, as in transformers.
    if SINGLE_FILE in names:
        return WeightFiles(
            shards=_read_shards(folder, [SINGLE_FILE], problems), index=None, warnings=warnings
        )

    if INDEX_FILE not in names:
        _refuse_other_layouts(names, folder)
    index: dict[str, Any] = {}
    with problems.collect():
        index = read_json_mapping(resolve_inside(folder, INDEX_FILE), limit=INDEX_LIMIT, code="CK20")
    if not index:
        return WeightFiles(shards=(), index=None, warnings=warnings)

    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        problems.add(
            f"{INDEX_FILE} has no 'weight_map' from tensor names to file names", code="CK20", where=INDEX_FILE
        )
        return WeightFiles(shards=(), index=None, warnings=warnings)

    files = sorted(set(weight_map.values()))
    if len({name.casefold() for name in files}) != len(files):
        problems.add(f"{INDEX_FILE} names shards that differ only in case", code="SV14", where=INDEX_FILE)

    shards = _read_shards(folder, files, problems)
    if len(shards) == len(files):
        _compare_index(weight_map, shards, problems)
        compare_revisions(folder, files, problems)
        warnings += _metadata_notes(index, shards)

    return WeightFiles(shards=shards, index=index, warnings=warnings)


def _read_shards(folder: Path, names: list[str], problems: Problems) -> tuple[Shard, ...]:
    shards: list[Shard] = []
    for name in names:
        with problems.collect():
            shards.append(Shard(name=name, header=read_header(resolve_inside(folder, name), name)))

        # Many headers of legal size would still take too much memory together.
        total = sum(shard.header.data_start for shard in shards)
        if total > MAX_HEADER_BYTES:
            problems.add(
                f"the headers up to {name} have {total:,} bytes together",
                code="CK04",
                where=name,
                expected=f"at most {MAX_HEADER_BYTES:,} bytes",
                found=f"{total:,} bytes",
            )
            break

    return tuple(shards)


def _compare_index(weight_map: dict[str, str], shards: tuple[Shard, ...], problems: Problems) -> None:
    """Report every tensor on which the index and the headers disagree."""
    held: dict[str, list[str]] = {}

    # The shards that hold each tensor.
    for shard in shards:
        for entry in shard.header.tensors:
            held.setdefault(entry.name, []).append(shard.name)

    for name, files in held.items():
        if len(files) > 1:
            problems.add(f"tensor {name} is in two shards: {', '.join(files)}", code="CK21", where=name)
        elif name not in weight_map:
            problems.add(f"tensor {name} of {files[0]} is not in {INDEX_FILE}", code="CK21", where=name)
        elif weight_map[name] != files[0]:
            problems.add(
                f"{INDEX_FILE} looks for {name} in {weight_map[name]}, it is in {files[0]}",
                code="CK30",
                where=name,
                expected=weight_map[name],
                found=files[0],
                hint="shards were swapped or mixed; fetch them again",
            )

    for name in weight_map.keys() - held.keys():
        problems.add(
            f"{INDEX_FILE} lists {name}, but {weight_map[name]} does not hold it",
            code="CK21",
            where=name,
            hint="the shards do not belong together; fetch the checkpoint again",
        )


def _metadata_notes(index: dict[str, Any], shards: tuple[Shard, ...]) -> tuple[str, ...]:
    metadata = index.get("metadata")
    if not isinstance(metadata, dict):
        return (f"{INDEX_FILE} has no 'metadata'",)

    actual = sum(entry.nbytes for shard in shards for entry in shard.header.tensors)
    if metadata.get("total_size") not in (None, actual):
        return (
            f"{INDEX_FILE} says {metadata['total_size']} bytes in total, the shards hold {actual} (CK22)",
        )
    return ()


def _harmless_oddities(names: set[str]) -> tuple[str, ...]:
    notes = []
    if SINGLE_FILE in names and INDEX_FILE in names:
        notes.append(f"both {SINGLE_FILE} and {INDEX_FILE} are present; the single file is used (CK34)")
    if _pickles(names) and (SINGLE_FILE in names or INDEX_FILE in names):
        notes.append("both .bin and .safetensors weights are present; the .bin files are ignored (CK33)")
    return tuple(notes)


def _pickles(names: set[str]) -> list[str]:
    return sorted(name for name in names if re.fullmatch(r"pytorch_model.*\.bin|consolidated.*\.pth", name))


def refuse_training_state(names: set[str], folder: Path) -> None:
    """Refuse an adapter and the sharded state of a distributed training (FSDP, DCP, DeepSpeed)."""
    if "adapter_config.json" in names and "config.json" not in names:
        raise CheckpointError(
            f"{folder} holds a PEFT adapter, not a model",
            code="CK37",
            where="adapter_config.json",
            hint="merge it first: `PeftModel.from_pretrained(base, adapter).merge_and_unload()`",
        )

    state = sorted(name for name in names if _SHARDED_STATE.search(name))
    if state:
        raise CheckpointError(
            f"{folder} is a distributed training checkpoint ({state[0]})",
            code="CK37",
            where=str(folder),
            expected=f"{SINGLE_FILE} or {INDEX_FILE}",
            found=state[0],
            hint="export it first: `accelerate merge-weights STATE_FOLDER OUT` (FSDP), or zero_to_fp32.py "
            "(DeepSpeed)",
        )


def _refuse_other_layouts(names: set[str], folder: Path) -> None:
    """Say what the folder holds instead of safetensors weights."""
    if any(name.endswith(".gguf") for name in names):
        example = sorted(name for name in names if name.endswith(".gguf"))[0]
        raise CheckpointError(
            f"{folder} holds GGUF weights, not safetensors",
            code="CK36",
            where=str(folder),
            hint=f"name the file itself: {folder / example}",
        )

    refuse_training_state(names, folder)
    pickles = _pickles(names)
    if pickles:
        raise CheckpointError(
            f"{folder} has only pickled weights ({pickles[0]}), which can run code when loaded",
            code="CK31",
            where=pickles[0],
            expected=f"{SINGLE_FILE} or {INDEX_FILE}",
            hint="--allow-pickle reads it with torch's restricted unpickler; or save it as safetensors: "
            "`AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)`",
        )

    raise CheckpointError(
        f"{folder} has no weights",
        code="CK10",
        where=str(folder),
        expected=f"{SINGLE_FILE} or {INDEX_FILE}",
        hint="the download is incomplete; fetch the checkpoint again",
    )
