"""A dense checkpoint folder, checked from its headers and its config before a single weight is read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nsa_convert.checkpoint.headers import WEIGHT_DTYPES, TensorEntry
from nsa_convert.checkpoint.problems import Problems
from nsa_convert.checkpoint.shards import INDEX_FILE, WeightFiles, find_weight_files, resolve_inside
from nsa_convert.checkpoint.source_config import (
    check_source_config,
    dense_tensor_shapes,
    read_source_config,
    refuse_quantised,
    strip_source_config,
)
from nsa_convert.config import AttentionGeometry
from nsa_convert.errors import CheckpointError
from nsa_convert.families import ModelFamily, family_of, family_of_sparse, geometry_of
from nsa_convert.strict_files import read_json_mapping

SPARSE_TENSOR = re.compile(r"^model\.layers\.\d+\.self_attn\.sparse\.")
LAYER_TENSOR = re.compile(r"^model\.layers\.(\d+)\.")
ROTARY_BUFFER = re.compile(r"\.rotary_emb\.inv_freq$")
"""Old checkpoints store this constant; transformers ignores it."""

SIDE_FILES = re.compile(
    r"tokenizer\.json|tokenizer\.model|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|"
    r"vocab\.json|vocab\.txt|merges\.txt|chat_template\.(jinja|json)|generation_config\.json|"
    r"(LICENSE|LICENCE|NOTICE|USE_POLICY)(\.(txt|md))?"
)
"""Files that travel with the weights unchanged; nothing else is copied out of a source folder."""

SOURCE_README = "README.md"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose headers and config agree.

    Attributes:
        folder: Where it lies.
        config: config.json, without keys that would run foreign code.
        family: Its row of the family table.
        geometry: Attention sizes.
        weights: Shards and index.
        side_files: Names of the tokenizer and licence files to carry along.
        left_out: Names of the files that are not carried along.
        warnings: What is odd but harmless.
    """

    folder: Path
    config: dict[str, Any]
    family: ModelFamily
    geometry: AttentionGeometry
    weights: WeightFiles
    side_files: tuple[str, ...]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.config["num_hidden_layers"]

    @property
    def parameters(self) -> int:
        """Number of weights in the files."""
        return sum(entry.size for entry in self.weights.tensors().values())

    @property
    def weight_bytes(self) -> int:
        """Size of the weight files."""
        return sum(shard.header.file_bytes for shard in self.weights.shards)


def open_checkpoint(
    folder: Path, *, allow_extra_tensors: bool = False, weights: WeightFiles | None = None
) -> Checkpoint:
    """Check a dense checkpoint folder from its config and its safetensors headers; reads no weights.

    Args:
        folder: The folder.
        allow_extra_tensors: Accept tensors that the architecture does not have; they are kept.
        weights: What the weight files hold, where they are not those of the folder.

    Raises:
        UnsupportedModelError: The architecture cannot be converted, or the checkpoint already is.
        CheckpointError: Anything else; every problem found is in the one message.
        MachineError: A file may not be read.
    """
    config, warnings = strip_source_config(read_source_config(folder))
    family = family_of(config)
    refuse_quantised(config)
    return _check(folder, config, family, warnings, allow_extra_tensors, sparse=False, weights=weights)


def open_converted(folder: Path) -> Checkpoint:
    """Check a converted folder in the same way; ``config`` and ``family`` describe it as it is.

    Raises:
        UnsupportedModelError: The folder is not a converted checkpoint.
        CheckpointError: Headers and config do not agree.
    """
    config = read_source_config(folder)
    refuse_quantised(config)
    family = family_of_sparse(str(config.get("model_type")))
    return _check(folder, config, family, (), allow_extra_tensors=True, sparse=True)


def is_converted(folder: Path) -> bool:
    """Return whether the folder's config is that of a converted model."""
    return "sparse_attention" in read_source_config(folder)


def _check(
    folder: Path,
    config: dict[str, Any],
    family: ModelFamily,
    warnings: tuple[str, ...],
    allow_extra_tensors: bool,
    sparse: bool,
    weights: WeightFiles | None = None,
) -> Checkpoint:
    problems = Problems(str(folder))

    # The config first: what follows computes with its numbers.
    dense_config = {**config, "model_type": family.model_type}
    check_source_config(dense_config, family, problems)
    weights = weights or find_weight_files(folder, problems)
    problems.raise_found()

    # The dense tensors: right number of layers, names, shapes and dtypes.
    tensors = {
        name: entry for name, entry in weights.tensors().items() if not (sparse and SPARSE_TENSOR.match(name))
    }
    _check_layers(dense_config, tensors, problems)
    problems.raise_found()
    _check_tensors(dense_tensor_shapes(dense_config, family), tensors, weights, problems)
    tied = _check_tie(dense_config, tensors, problems)

    extra = () if allow_extra_tensors else _extra_tensors(dense_config, family, tensors)
    for name in extra[:20]:
        problems.add(
            f"tensor {name} does not belong to a {family.title} model",
            code="CK24",
            where=name,
            hint="--allow-extra-tensors keeps it untouched",
        )

    side, left_out, notes = _side_files(folder, {shard.name for shard in weights.shards}, problems)
    problems.raise_found()

    return Checkpoint(
        folder=folder,
        config=config,
        family=family,
        geometry=geometry_of(dense_config, family),
        weights=weights,
        side_files=side,
        left_out=left_out,
        warnings=(*warnings, *weights.warnings, *tied, *_dtype_notes(config, weights), *notes),
    )


def _check_layers(config: Mapping[str, Any], tensors: Mapping[str, TensorEntry], problems: Problems) -> None:
    """Report a number of layers other than that of the headers, before anything of that size is built."""
    held = {int(match[1]) for name in tensors if (match := LAYER_TENSOR.match(name))}
    count = config["num_hidden_layers"]
    if held and (len(held) != count or max(held) != count - 1):
        span = f"{min(held)}-{max(held)}" if len(held) == max(held) + 1 else f"{sorted(held)[:20]}"
        problems.add(
            f"config.json says num_hidden_layers {count}, the headers contain layers {span}",
            code="CF04",
            where="config.json: num_hidden_layers",
            expected=str(max(held) + 1),
            found=str(count),
        )


def _check_tensors(
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, TensorEntry],
    weights: WeightFiles,
    problems: Problems,
) -> None:
    missing = [name for name in shapes if name not in tensors]

    # The message names the files that were searched, unless there are many.
    searched = ", ".join(shard.name for shard in weights.shards[:4])
    if len(weights.shards) > 4:
        searched = f"{len(weights.shards)} shards"

    for name in missing[:20]:
        problems.add(
            f"tensor {name} is missing (expected shape {list(shapes[name])}, searched {searched})",
            code="CF11" if name == "lm_head.weight" else "CK23",
            where=name,
            expected=str(list(shapes[name])),
            found="nothing",
            hint="the download is incomplete, or config.json belongs to another model",
        )
    if len(missing) > 20:
        problems.add(f"{len(missing) - 20} more tensors are missing", code="CK23")

    # Those that are there must fit.
    for name, shape in shapes.items():
        entry = tensors.get(name)
        if entry is not None and entry.shape != shape:
            problems.add(
                f"tensor {name} has shape {list(entry.shape)}, config.json asks for {list(shape)}",
                code="CK25",
                where=name,
                expected=str(list(shape)),
                found=str(list(entry.shape)),
            )
        if entry is not None and entry.dtype not in WEIGHT_DTYPES:
            problems.add(
                f"tensor {name} has dtype {entry.dtype}",
                code="CK26",
                where=name,
                expected=", ".join(WEIGHT_DTYPES),
                found=entry.dtype,
                hint="dequantise the checkpoint first",
            )


def _extra_tensors(
    config: Mapping[str, Any], family: ModelFamily, tensors: Mapping[str, TensorEntry]
) -> list[str]:
    known = dense_tensor_shapes(config, family).keys() | {"lm_head.weight"}
    return [name for name in tensors if name not in known and not ROTARY_BUFFER.search(name)]


def _check_tie(
    config: Mapping[str, Any], tensors: Mapping[str, TensorEntry], problems: Problems
) -> tuple[str, ...]:
    """Report tied embeddings that are stored twice in two shapes; warn of all that are stored twice."""
    head = tensors.get("lm_head.weight")
    table = tensors.get("model.embed_tokens.weight")
    if not config.get("tie_word_embeddings", False) or head is None or table is None:
        return ()

    if head.shape != table.shape or head.dtype != table.dtype:
        problems.add(
            "config.json ties lm_head to the embeddings, but both are stored and differ",
            code="CF11",
            where="lm_head.weight",
            expected=f"{table.dtype} {list(table.shape)}",
            found=f"{head.dtype} {list(head.shape)}",
        )

    return ("lm_head.weight is stored although the embeddings are tied; transformers ignores it (CK40)",)


def _dtype_notes(config: Mapping[str, Any], weights: WeightFiles) -> tuple[str, ...]:
    stated = str(config.get("dtype", config.get("torch_dtype")) or "auto").removeprefix("torch.")
    held = WEIGHT_DTYPES.get(weights.dtype(), weights.dtype())
    if stated in {"auto", held}:
        return ()
    return (f"config.json says dtype {stated}, the weights are {held}; they stay as they are",)


def _side_files(
    folder: Path, shards: set[str], problems: Problems
) -> tuple[tuple[str, ...], tuple[str, ...], list[str]]:
    """Return the files to carry along, those left behind, and warnings."""
    side = []
    left_out = []
    notes = []
    used = {*shards, "config.json", INDEX_FILE, SOURCE_README}

    for name in sorted(path.name for path in folder.iterdir()):
        if not SIDE_FILES.fullmatch(name):
            if name not in used:
                left_out.append(name)
            continue

        # Damage to the tokenizer is a problem; damage to the generation settings is worth a warning.
        with problems.collect():
            real = resolve_inside(folder, name)
            side.append(name)
            if name == "tokenizer_config.json":
                _check_tokenizer_config(read_json_mapping(real, code="TK03"))
            if name == "generation_config.json":
                try:
                    read_json_mapping(real)
                except CheckpointError as error:
                    notes.append(f"{error.message} (TK06)")

    if not any(name.startswith("tokenizer") or name in {"vocab.json", "vocab.txt"} for name in side):
        notes.append("the folder has no tokenizer; the converted model will have none (TK01)")

    return tuple(side), tuple(left_out), notes


def _check_tokenizer_config(config: Mapping[str, Any]) -> None:
    """Refuse a tokenizer config that names files outside of its own folder."""
    for key, value in config.items():
        if (
            key.endswith("_file")
            and isinstance(value, str)
            and ("/" in value or "\\" in value or ".." in value)
        ):
            raise CheckpointError(
                f"tokenizer_config.json: {key} {value!r} leaves the checkpoint directory",
                code="TK03",
                where=f"tokenizer_config.json: {key}",
                expected="a file name without any folder",
                found=value,
            )
