"""The weight files of a converted folder: linked or copied from the source, one more, and their index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nsa_convert.checkpoint.manifest import SOURCE_FOLDER
from nsa_convert.checkpoint.new_weights import NewTensor
from nsa_convert.checkpoint.scan import ShardScan, run_threads, scan_shard
from nsa_convert.checkpoint.shards import INDEX_FILE, SINGLE_FILE, Shard, WeightFiles, resolve_inside
from nsa_convert.checkpoint.source import SOURCE_README, Checkpoint
from nsa_convert.checkpoint.staging import copy_file, link_file
from nsa_convert.errors import CheckpointError
from nsa_convert.notices import Progress

SPARSE_SHARD = "model-sparse.safetensors"
"""Holds the new tensors."""

"""Called with the name of a finished shard, the shards done, and the shards in all."""


def shard_names(checkpoint: Checkpoint, new: Sequence[NewTensor]) -> dict[str, str]:
    """Return the name in OUT of each shard of the source.

    A single ``model.safetensors`` gets a number: under its own name transformers would load it alone and
    ignore the index, and with it the new tensors.
    """
    shards = checkpoint.weights.shards

    if new and SPARSE_SHARD in {shard.name for shard in shards}:
        raise CheckpointError(f"the source already holds {SPARSE_SHARD}", code="CK35", where=SPARSE_SHARD)

    if new and [shard.name for shard in shards] == [SINGLE_FILE]:
        return {SINGLE_FILE: "model-00001-of-00001.safetensors"}
    return {shard.name: shard.name for shard in shards}


def converted_index(
    weights: WeightFiles, names: Mapping[str, str], new: Sequence[NewTensor]
) -> dict[str, Any]:
    """Return the index of the converted folder."""
    where = {entry.name: names[shard.name] for shard in weights.shards for entry in shard.header.tensors}
    where |= {tensor.name: SPARSE_SHARD for tensor in new}

    # Sizes are those of the tensors, without headers.
    kept = weights.tensors().values()
    metadata = {
        "total_parameters": sum(t.size for t in kept) + sum(t.size for t in new),
        "total_size": sum(t.nbytes for t in kept) + sum(t.nbytes for t in new),
    }

    return {"metadata": metadata, "weight_map": dict(sorted(where.items()))}


def place_shards(
    folder: Path,
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    copy: bool,
    threads: int | None,
    progress: Progress,
) -> tuple[list[ShardScan], bool]:
    """Link or copy every shard and read it once; returns the scans and whether all were linked."""
    shards = checkpoint.weights.shards
    done: list[str] = []

    def place(shard: Shard) -> tuple[ShardScan, bool]:
        target = folder / names[shard.name]
        linked = not copy and link_file(shard.header.path, target)
        scan = scan_shard(shard, target if linked else shard.header.path, None if linked else target)
        done.append(shard.name)
        progress(shard.name, len(done), len(shards))
        return scan, linked

    results = run_threads(place, shards, threads)
    return [scan for scan, _ in results], all(linked for _, linked in results)


def keep_originals(folder: Path, checkpoint: Checkpoint) -> None:
    """Keep the files that conversion replaces, so that revert gives the very same bytes back."""
    kept = folder / SOURCE_FOLDER
    kept.mkdir()  # why: the kept originals, inside the staging folder of the caller
    for name in ("config.json", INDEX_FILE, SOURCE_README):
        if (checkpoint.folder / name).exists():
            copy_file(resolve_inside(checkpoint.folder, name), kept / name)


def same_device(checkpoint: Checkpoint, out: Path) -> bool:
    """Return whether every shard lies on the file system that will hold OUT."""
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    device = parent.stat().st_dev
    return all(shard.header.path.stat().st_dev == device for shard in checkpoint.weights.shards)
