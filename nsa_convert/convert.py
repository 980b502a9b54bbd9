"""Convert a dense checkpoint to sparse attention: the weights are linked, the few new tensors are added."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nsa_convert import __version__
from nsa_convert.checkpoint.download_notes import compare_hashes
from nsa_convert.checkpoint.gguf import is_gguf, open_gguf, write_dense_folder
from nsa_convert.checkpoint.headers import WEIGHT_DTYPES
from nsa_convert.checkpoint.manifest import RECIPE, REPORT, write_json, write_manifest
from nsa_convert.checkpoint.new_weights import NewTensor, planned_tensors, write_new_shard
from nsa_convert.checkpoint.output import (
    SPARSE_SHARD,
    converted_index,
    keep_originals,
    place_shards,
    same_device,
    shard_names,
)
from nsa_convert.checkpoint.pickles import is_pickled, open_pickled, write_unpickled
from nsa_convert.checkpoint.scan import hash_file
from nsa_convert.checkpoint.shards import INDEX_FILE, resolve_inside
from nsa_convert.checkpoint.source import Checkpoint, open_checkpoint
from nsa_convert.checkpoint.staging import (
    check_free,
    check_places,
    copy_file,
    gigabytes,
    require_space,
    staged,
)
from nsa_convert.checkpoint.tied import check_tie
from nsa_convert.checkpoint.tokenizer_files import check_tokenizer
from nsa_convert.config import LayerRule, SparseAttentionConfig, number_ranges
from nsa_convert.errors import UsageError
from nsa_convert.estimate import CONTEXTS, ContextCost, context_costs, cost_lines, dense_until
from nsa_convert.methods.parts.base import SparseMethod
from nsa_convert.methods.parts.registry import read_rule
from nsa_convert.notices import Progress, silent
from nsa_convert.patch.remote_code import write_code_files
from nsa_convert.plan import resolve_plan, sparse_config_dict

OVERHEAD_BYTES = 4_000_000
"""Room for config, index, code and report files in the disk check."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What a conversion did, or would do.

    Attributes:
        out: The folder, or None after a dry run.
        source: ``id``, ``revision``, ``format`` and, after a conversion, ``files`` with their hashes.
        family: Title of the model family.
        layers: For each run of layers with the same rule: ``layers``, ``method``, ``settings``.
        kept_tensors: Tensors that stay as they are.
        kept_parameters: Their weights.
        new_tensors: Tensors that are added, with shape, dtype and initial value.
        dense_until: Tokens up to which nothing is sparse; None when every layer is dense.
        costs: Cache size and attention work at several lengths, dense against sparse.
        placed: How the weights got to OUT: ``"linked"``, ``"copied"``, ``"dequantised"`` or ``"unpickled"``.
        new_bytes: Bytes on disk that did not exist before.
        warnings: What the user should know.
    """

    out: Path | None
    source: dict[str, Any]
    family: str
    layers: list[dict[str, Any]]
    kept_tensors: int
    kept_parameters: int
    new_tensors: list[NewTensor]
    dense_until: int | None
    costs: list[ContextCost]
    placed: str
    new_bytes: int
    warnings: list[str]

    @property
    def new_parameters(self) -> int:
        """Number of weights that are added."""
        return sum(tensor.size for tensor in self.new_tensors)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        out = dataclasses.asdict(self)
        out["out"] = None if self.out is None else str(self.out)
        return {**out, "new_parameters": self.new_parameters}

    def to_text(self) -> str:
        """Return the report for people."""
        share = self.new_parameters / self.kept_parameters

        lines = [
            f"{self.source['id']} ({self.family})",
            f"kept: {self.kept_parameters:,} parameters in {self.kept_tensors} tensors",
            *(
                f"layers {run['layers']}{_scope_text(run)}: {run['method']} {_settings_text(run['settings'])}"
                for run in self.layers
            ),
            f"new: {self.new_parameters:,} parameters ({share:.2%}) in {len(self.new_tensors)} tensors",
            f"disk: {gigabytes(self.new_bytes)} new (weights {self.placed})",
        ]

        if self.dense_until is not None:
            lines.append(f"no sparsity below {self.dense_until:,} tokens: up to there it is the dense model")

        lines += ["", *cost_lines(self.costs), ""]
        lines.append("dry run: nothing was written" if self.out is None else f"written: {self.out}")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Job:
    """A checked source together with a checked plan."""

    checkpoint: Checkpoint
    sparse: SparseAttentionConfig
    methods: list[SparseMethod]
    new: list[NewTensor]


def convert_checkpoint(
    source: str | Path,
    out: str | Path,
    sparse: SparseAttentionConfig,
    *,
    dry_run: bool = False,
    overwrite: bool = False,
    copy: bool = False,
    allow_extra_tensors: bool = False,
    allow_pickle: bool = False,
    dtype: str = "float32",
    source_id: str | None = None,
    revision: str | None = None,
    contexts: Sequence[int] = CONTEXTS,
    threads: int | None = None,
    progress: Progress = silent,
) -> ConversionReport:
    """Write the sparse form of a dense checkpoint to a new folder.

    The weight files are hard-linked where the file system allows it, else copied; they are read once, to hash
    them and to look for values that are not finite. OUT appears complete or not at all.

    Args:
        source: Folder of a dense checkpoint, or a ``.gguf`` file.
        out: The new folder.
        sparse: Which method runs in which layer.
        dry_run: Do every check and all arithmetic, write nothing.
        overwrite: Replace an existing checkpoint at ``out``.
        copy: Copy the weight files instead of linking them.
        allow_extra_tensors: Accept (and keep) tensors the architecture does not have.
        allow_pickle: Accept pickled weights; they are read by torch's restricted unpickler.
        dtype: Dtype of the weights of a dequantised ``.gguf`` file.
        source_id: Name of the source for the report; the folder's name when left out.
        revision: Commit of the source for the report.
        contexts: Lengths for the cost table.
        threads: Threads that read; one per core when left out.
        progress: Called with shard name, shards done and shards in all.

    Raises:
        UsageError: ``out`` is taken, or overlaps the source.
        UnsupportedModelError: The architecture is not supported.
        ConfigError: The plan does not fit the model.
        CheckpointError: The source is damaged; all problems in one message.
        MachineError: Disk, memory or permission.
    """
    source = Path(source)
    out = Path(out)

    check_places(source, out)
    check_free(out, overwrite=overwrite, recognise="config.json")
    identity = {"id": source_id or source.resolve().name, "revision": revision}

    # A source that is not safetensors takes a detour over a dense folder.
    foreign = _foreign(source, dtype, allow_pickle, allow_extra_tensors)
    if foreign is not None:
        options: dict[str, Any] = {"threads": threads, "progress": progress}
        return _convert_foreign(
            foreign, out, sparse, identity, contexts, dry_run, allow_extra_tensors, **options
        )

    # Every check comes before the first byte is written.
    job = _prepare(open_checkpoint(source, allow_extra_tensors=allow_extra_tensors), sparse)
    check_tie(job.checkpoint)
    placed = "linked" if not copy and same_device(job.checkpoint, out) else "copied"
    report = _report(job, {**identity, "format": "safetensors"}, contexts, placed)
    require_space(out, report.new_bytes + OVERHEAD_BYTES)

    if dry_run:
        return report
    with staged(out) as folder:
        report, hashes = _fill(folder, job, report, copy=copy, threads=threads, progress=progress)
        write_manifest(folder, hashes)
    return dataclasses.replace(report, out=out)


def explicit_settings(sparse: SparseAttentionConfig) -> SparseAttentionConfig:
    """Return the plan with every setting written out, so that a later change of a default changes nothing."""

    def explicit(rule: LayerRule, where: str) -> LayerRule:
        _, settings = read_rule(rule, where)
        return dataclasses.replace(rule, settings=dataclasses.asdict(settings))

    rules = tuple(explicit(rule, f"rules[{i}]") for i, rule in enumerate(sparse.rules))
    return SparseAttentionConfig(default=explicit(sparse.default, "default"), rules=rules)


def _prepare(checkpoint: Checkpoint, sparse: SparseAttentionConfig) -> _Job:
    methods = resolve_plan(sparse, checkpoint.num_layers, checkpoint.geometry)

    # The plan that is written counts layers from the front.
    sparse = sparse.resolved(checkpoint.num_layers, checkpoint.geometry.num_kv_heads)
    new = planned_tensors(methods, checkpoint.geometry, WEIGHT_DTYPES[checkpoint.weights.dtype()])
    check_tokenizer(checkpoint)

    return _Job(checkpoint=checkpoint, sparse=explicit_settings(sparse), methods=methods, new=new)


def _report(job: _Job, source: dict[str, Any], contexts: Sequence[int], placed: str) -> ConversionReport:
    checkpoint = job.checkpoint

    # Linked files take no space of their own.
    new_bytes = sum(tensor.nbytes for tensor in job.new)
    if placed != "linked":
        new_bytes += checkpoint.weight_bytes

    until = dense_until(job.methods)
    width = checkpoint.weights.value_bytes()

    return ConversionReport(
        out=None,
        source=source,
        family=checkpoint.family.title,
        layers=layer_table(job.sparse, checkpoint.num_layers, checkpoint.geometry.num_kv_heads),
        kept_tensors=len(checkpoint.weights.tensors()),
        kept_parameters=checkpoint.parameters,
        new_tensors=job.new,
        dense_until=until,
        costs=context_costs(job.methods, checkpoint.geometry, width, contexts),
        placed=placed,
        new_bytes=new_bytes,
        warnings=[*checkpoint.warnings, *_left_out(checkpoint), *_never_sparse(until, checkpoint)],
    )


def layer_table(sparse: SparseAttentionConfig, num_layers: int, num_kv_heads: int) -> list[dict[str, Any]]:
    """Return the plan as runs of layers that share a rule."""
    runs: list[dict[str, Any]] = []
    last: list[dict[str, Any]] = []

    for layer in range(num_layers):
        # The rules of this layer: one, or one for each group of KV heads.
        entries = [
            {"method": rule.method, "settings": dict(rule.settings)}
            | ({} if rule.heads is None else {"heads": number_ranges(rule.heads)})
            | ({} if rule.phase is None else {"phase": rule.phase})
            for rule in sparse.for_layer(layer, num_kv_heads)
        ]

        # A layer with the same rules as the one before extends its runs ("0-3" becomes "0-4").
        if entries == last:
            for run in runs[-len(entries) :]:
                run["layers"] = f"{run['layers'].split('-')[0]}-{layer}"
        else:
            runs += [{"layers": str(layer), **entry} for entry in entries]

        last = entries
    return runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Foreign:
    """A source that is first written as a dense folder: a GGUF file or pickled weights.

    Attributes:
        format: Its name in the report.
        placed: How its weights get to OUT.
        checkpoint: What the dense folder will be.
        write: Writes it.
        facts: Returns what else the report says of the source; reads all of its bytes.
    """

    format: str
    placed: str
    checkpoint: Checkpoint
    write: Callable[[Path], None]
    facts: Callable[[], dict[str, Any]]


def _foreign(source: Path, dtype: str, allow_pickle: bool, allow_extra_tensors: bool) -> _Foreign | None:
    """Return how to read a source that is no folder of safetensors; None for one that is."""
    # A GGUF file: its quantised weights become floating-point numbers of the dtype.
    if is_gguf(source):
        dtypes = WEIGHT_DTYPES.values()
        if dtype not in dtypes:
            raise UsageError(f"unknown dtype {dtype!r}", code="CL03", expected=", ".join(dtypes))
        return _Foreign(
            format="gguf",
            placed="dequantised",
            checkpoint=open_gguf(source, dtype),
            write=lambda folder: write_dense_folder(source, folder, dtype),
            facts=lambda: {"sha256": hash_file(source), "dtype": dtype},
        )

    # Pickled weights, if the user allows them.
    if not (allow_pickle and is_pickled(source)):
        return None

    checkpoint = open_pickled(source, allow_extra_tensors=allow_extra_tensors)
    names = [shard.header.path.name for shard in checkpoint.weights.shards]

    return _Foreign(
        format="pickle",
        placed="unpickled",
        checkpoint=checkpoint,
        write=lambda folder: write_unpickled(source, folder, checkpoint.side_files),
        facts=lambda: {"sha256": {name: hash_file(source / name) for name in names}},
    )


def _convert_foreign(
    foreign: _Foreign,
    out: Path,
    sparse: SparseAttentionConfig,
    identity: Mapping[str, Any],
    contexts: Sequence[int],
    dry_run: bool,
    allow_extra_tensors: bool,
    **options: Any,
) -> ConversionReport:
    """Write the source as a dense folder inside the staging folder, and convert that."""
    # Checks and arithmetic first, from the headers of the dense folder to come.
    info = {**identity, "format": foreign.format}
    report = _report(_prepare(foreign.checkpoint, sparse), info, contexts, foreign.placed)
    require_space(out, report.new_bytes + OVERHEAD_BYTES)
    if dry_run:
        return report
    with staged(out) as folder:
        # Made in the staging folder: its shards can be linked, and a failure removes it too.
        dense = folder / "dense"
        notes = report.warnings
        foreign.write(dense)

        # Convert it like any other dense checkpoint.
        job = _prepare(open_checkpoint(dense, allow_extra_tensors=allow_extra_tensors), sparse)
        check_tie(job.checkpoint)

        # The second report adds hashes of the source and knows the real shards; warnings of both, each once.
        report = _report(job, {**info, **foreign.facts()}, contexts, foreign.placed)
        report = dataclasses.replace(report, warnings=list(dict.fromkeys([*notes, *report.warnings])))
        report, hashes = _fill(folder, job, report, copy=False, **options)
        shutil.rmtree(dense)  # why: the dense model made on the way, inside the staging folder
        write_manifest(folder, hashes)
    return dataclasses.replace(report, out=out)


def _fill(
    folder: Path,
    job: _Job,
    report: ConversionReport,
    *,
    copy: bool,
    threads: int | None,
    progress: Progress,
) -> tuple[ConversionReport, dict[str, str]]:
    """Write everything but the manifest; return the report and the hashes that are known already."""
    checkpoint = job.checkpoint

    # Weights: the shards, then one more with the new tensors.
    names = shard_names(checkpoint, job.new)
    scans, linked = place_shards(folder, checkpoint, names, copy, threads, progress)
    notes = compare_hashes(checkpoint.folder, {scan.name: scan.sha256 for scan in scans})
    if job.new:
        write_new_shard(folder / SPARSE_SHARD, checkpoint, job.sparse)

    # Files beside the weights; the originals of those that conversion replaces are kept too.
    for name in checkpoint.side_files:
        copy_file(resolve_inside(checkpoint.folder, name), folder / name)
    keep_originals(folder, checkpoint)

    # Config, code and index of the converted model.
    config = sparse_config_dict(checkpoint.config, job.sparse)
    write_code_files(folder, config)
    write_json(folder / "config.json", config)
    if job.new or checkpoint.weights.index is not None:
        write_json(folder / INDEX_FILE, converted_index(checkpoint.weights, names, job.new))

    # What was measured of the shards goes into the report.
    files = {
        scan.name: {"file": names[scan.name], "bytes": scan.bytes, "sha256": scan.sha256} for scan in scans
    }
    how = "linked" if linked else "copied"
    report = dataclasses.replace(
        report,
        source={**report.source, "files": files, "side_files": list(checkpoint.side_files)},
        placed=how if report.placed in {"linked", "copied"} else report.placed,
        warnings=[*report.warnings, *notes, *(line for scan in scans for line in scan.warnings)],
    )

    # why: inside the staging folder of the caller
    (folder / RECIPE).write_text(recipe_text(report, job.sparse), encoding="utf-8")

    # OUT is left out of the stored report: the folder may be moved.
    stored = {"schema": 1, "versions": _versions(), **report.to_dict()}
    del stored["out"]
    write_json(folder / REPORT, stored)

    return report, {names[scan.name]: scan.sha256 for scan in scans}


def recipe_text(report: ConversionReport, sparse: SparseAttentionConfig) -> str:
    """Return the recipe that repeats a conversion."""
    import yaml

    base = {key: report.source[key] for key in ("id", "revision", "dtype") if report.source.get(key)}
    body = yaml.safe_dump({"base_model": base, "sparse_attention": sparse.to_dict()}, sort_keys=False)
    return f"# nsa-convert convert MODEL OUT --config {RECIPE}\n{body}"


def _scope_text(run: dict[str, Any]) -> str:
    heads = f", KV heads {run['heads']}" if "heads" in run else ""
    return heads + (f", {run['phase']}" if "phase" in run else "")


def _settings_text(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items())


def _versions() -> dict[str, str]:
    return {
        "nsa_convert": __version__,
        **{name: version(name) for name in ("torch", "transformers", "safetensors")},
    }


def _never_sparse(until: int | None, checkpoint: Checkpoint) -> list[str]:
    positions = checkpoint.config.get("max_position_embeddings")
    if until is None or positions is None or until < positions:
        return []

    return [f"no sparsity at any length of this model: {until:,} tokens are dense, it has {positions:,}"]


def _left_out(checkpoint: Checkpoint) -> list[str]:
    if not checkpoint.left_out:
        return []

    names = ", ".join(checkpoint.left_out[:10]) + (" ..." if len(checkpoint.left_out) > 10 else "")
    return [f"not carried over: {names}"]
