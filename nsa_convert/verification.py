"""Check a converted checkpoint, and turn it back into the dense one."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nsa_convert.checkpoint.gguf import is_gguf, load_gguf_model
from nsa_convert.checkpoint.headers import WEIGHT_DTYPES
from nsa_convert.checkpoint.manifest import (
    MANIFEST,
    REPORT,
    SOURCE_FOLDER,
    TRAINING,
    check_manifest,
    read_manifest,
)
from nsa_convert.checkpoint.scan import hash_file, hash_tensors, run_threads, scan_shard
from nsa_convert.checkpoint.shards import resolve_inside
from nsa_convert.checkpoint.source import SPARSE_TENSOR, open_checkpoint, open_converted
from nsa_convert.checkpoint.staging import (
    check_free,
    check_places,
    copy_file,
    link_file,
    require_space,
    staged,
)
from nsa_convert.config import SparseAttentionConfig
from nsa_convert.equivalence import bare_logits, compare_with_dense, probe_lengths, sparse_logits
from nsa_convert.errors import CheckFailedError, CheckpointError, NsaConvertError
from nsa_convert.families import family_of_sparse
from nsa_convert.methods.parts.mix import leaves_of
from nsa_convert.notices import Say, silent
from nsa_convert.patch.remote_code import code_files
from nsa_convert.plan import resolve_plan
from nsa_convert.strict_files import read_json_mapping

TOLERANCE = 1e-4
"""Largest difference of fp32 logits between the full budget and the dense model."""

_TRAINED = "not run: the weights were saved after the conversion, and may have been trained"
_MIXED_KEYS = "not run: the layers mix the keys of neighbours before they attend, as no dense model does"

BARE_TOKENS = 300
"""Longest probe without the package: that check is about loading."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was checked.

    Attributes:
        name: What.
        ok: Whether it holds; None when it was not checked.
        detail: Numbers, or the reason.
        code: Error code of a failure.
    """

    name: str
    ok: bool | None
    detail: str
    code: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerificationReport:
    """All checks of one converted folder.

    Attributes:
        out: The folder.
        checks: In the order they ran.
    """

    out: Path
    checks: list[Check]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return all(check.ok is not False for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "out": str(self.out),
            "passed": self.ok,
            "checks": [dataclasses.asdict(c) for c in self.checks],
        }

    def to_text(self) -> str:
        """Return the report for people."""
        words = {True: "ok", False: "FAILED", None: "skipped"}
        return "\n".join(f"{words[check.ok]:8} {check.name:20} {check.detail}" for check in self.checks)

    def raise_failed(self) -> None:
        """Raise CheckFailedError for the first check that failed, if any."""
        failed = [check for check in self.checks if check.ok is False]
        if failed:
            others = f" (and {len(failed) - 1} more checks failed)" if len(failed) > 1 else ""
            raise CheckFailedError(
                f"{failed[0].name}: {failed[0].detail}{others}",
                code=failed[0].code,
                where=str(self.out),
                hint="convert the source again; a folder that fails is not the model it was made from",
            )


def verify_checkpoint(
    out: str | Path,
    against: str | Path | None = None,
    *,
    lengths: Sequence[int] | None = None,
    trust_remote_code: bool = False,
    say: Say = silent,
) -> VerificationReport:
    """Check that a converted folder is whole and still holds the dense model.

    Weights that were trained are no longer those of the source: they have to be finite and of its shapes, and
    with a budget for the whole context the model has to equal dense attention over the same weights.

    Args:
        out: The converted folder.
        against: The dense source, folder or ``.gguf`` file: its tensors must be in ``out`` bit by bit. Left
            out, the hashes noted at conversion stand for it.
        lengths: Context lengths for the comparison of logits; chosen by the size of the model when left out.
        trust_remote_code: Also run code files in ``out`` that this version of the package would not have
            written.
        say: Called with the name of each check before it runs.

    Returns:
        Every check with its outcome; a check that cannot run because an earlier one failed says so.

    Raises:
        CheckpointError: ``out`` is not a converted folder.
    """
    out = Path(out)

    read_manifest(out)
    trained = (out / TRAINING).is_file()

    # Checks of the files; a trained folder no longer holds the weights of its source.
    checks: list[Check] = []
    for name, code, work in (
        ("files", "CK29", lambda: _files(out)),
        ("values", "CK27", lambda: _values(out)),
        ("kept tensors", "SV18", lambda: _kept_tensors(out, against)),
    ):
        say(name)
        moot = trained and code == "SV18"
        checks.append(_skipped(name, code, _TRAINED) if moot else _run(name, code, work))

    # Checks that load the model: only for a whole folder.
    whole = all(check.ok is not False for check in checks)
    for name, code, work in (
        ("full budget = dense", "SV19", lambda: _full_budget(out, lengths, trained=trained)),
        ("bare transformers", "SV20", lambda: _bare(out, trust_remote_code)),
    ):
        say(name)
        if trained and code == "SV19" and whole and _mixes_keys(out):
            checks.append(_skipped(name, code, _MIXED_KEYS))
        elif whole:
            checks.append(_run(name, code, work))
        else:
            checks.append(_skipped(name, code, "not run: the folder is not whole"))

    return VerificationReport(out=out, checks=checks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RevertReport:
    """What a revert wrote.

    Attributes:
        dense: The folder.
        files: Names of its files.
        placed: ``"linked"`` or ``"copied"``: how the weights got there.
    """

    dense: Path
    files: list[str]
    placed: str

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {"dense": str(self.dense), "files": self.files, "placed": self.placed}

    def to_text(self) -> str:
        """Return the report for people."""
        return (
            f"written: {self.dense} ({len(self.files)} files, weights {self.placed}), bit-equal to the source"
        )


def revert_checkpoint(
    out: str | Path, dense: str | Path, *, overwrite: bool = False, copy: bool = False
) -> RevertReport:
    """Write the dense checkpoint that a converted folder was made from, byte for byte.

    Args:
        out: The converted folder.
        dense: The new folder.
        overwrite: Replace an existing checkpoint at ``dense``.
        copy: Copy the weight files instead of linking them.

    Raises:
        CheckpointError: ``out`` is not a converted folder.
        CheckFailedError: A file of the source was changed since the conversion, as training does.
        UsageError: ``dense`` is taken, or overlaps ``out``.
        MachineError: Disk or permission.
    """
    out = Path(out)
    dense = Path(dense)
    check_places(out, dense)
    check_free(dense, overwrite=overwrite, recognise="config.json")

    places = _original_files(out)
    linked = not copy
    if copy:
        require_space(dense, sum(path.stat().st_size for path, _ in places.values()))

    # Linking may fail for a file (another file system); it is copied then.
    with staged(dense) as folder:
        for name, (path, is_shard) in places.items():
            if not (is_shard and linked and link_file(path, folder / name)):
                copy_file(path, folder / name)
                linked = linked and not is_shard

    return RevertReport(dense=dense, files=sorted(places), placed="linked" if linked else "copied")


def _original_files(out: Path) -> dict[str, tuple[Path, bool]]:
    """Return name in the dense folder -> (file in OUT, whether it is a weight file), hashes checked."""
    manifest = read_manifest(out)
    kept = f"{SOURCE_FOLDER}/"

    # Weight files by the hashes in the report, other files by those in the manifest.
    shards, side_files = _source_files(out)
    places = {name: (entry["file"], entry["sha256"], True) for name, entry in shards.items()}
    for place in [*side_files, *(name for name in manifest if name.startswith(kept))]:
        listed = manifest.get(place, {}).get("sha256")
        places[place.removeprefix(kept)] = (place, listed, False)

    # No name may lead out of the folder, and no file may have changed.
    for name, (place, expected, _) in places.items():
        if Path(name).name != name or place not in manifest:
            raise CheckpointError(f"{REPORT} names a file that cannot be: {name}", code="SV17", where=REPORT)
        path = out / place
        if not path.is_file() or hash_file(path) != expected:
            raise CheckFailedError(
                f"{place} was changed since the conversion; the dense model cannot be given back from it",
                code="SV13",
                where=str(path),
                expected=f"sha256 {expected}",
                hint="a trained model has no dense form; take the original checkpoint",
            )

    return {name: (out / place, is_shard) for name, (place, _, is_shard) in places.items()}


def _source_files(out: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return what the conversion noted about the source: its weight files and its side files."""
    try:
        source = read_json_mapping(out / REPORT, code="SV17")["source"]
        shards = {name: dict(entry) for name, entry in source["files"].items()}
        names = [entry[key] for entry in shards.values() for key in ("file", "sha256")]
        if all(isinstance(name, str) for name in [*names, *source["side_files"]]):
            return shards, list(source["side_files"])
    except (KeyError, TypeError, ValueError, AttributeError, OSError):
        # why: every kind of damage ends in the one error below it
        pass
    raise CheckpointError(f"{REPORT} is missing or damaged", code="SV17", where=REPORT, hint="convert again")


def _skipped(name: str, code: str, why: str) -> Check:
    return Check(name=name, ok=None, detail=why, code=code)


def _run(name: str, code: str, work: Callable[[], str | None]) -> Check:
    """Run one check: its return value is the detail, the message of its error the reason of a failure."""
    try:
        detail = work()
    except CheckFailedError as error:
        return Check(name=name, ok=False, detail=error.message, code=code)
    except NsaConvertError as error:
        if error.exit_status != CheckpointError.exit_status:
            raise
        return Check(name=name, ok=False, detail=error.message, code=error.code)
    return Check(name=name, ok=True, detail=detail or "", code=code)


def _files(out: Path) -> str:
    """Check that the manifest's files are there and unchanged, and that nothing loadable was added.

    transformers' Trainer adds its arguments, a pickle, to what it saves; nothing loads it with a model.
    """
    problems = check_manifest(out)
    listed = read_manifest(out)

    problems += [
        f"{path.name} was added after conversion"
        for path in sorted(out.iterdir())
        if path.suffix in {".py", ".safetensors", ".bin"} and path.name not in {*listed, "training_args.bin"}
    ]

    if problems:
        raise CheckFailedError("; ".join(problems[:10]))
    return f"{len(listed)} files match {MANIFEST}"


def _values(out: Path) -> str:
    checkpoint = open_converted(out)
    run_threads(lambda shard: scan_shard(shard, shard.header.path), checkpoint.weights.shards)
    return f"{len(checkpoint.weights.tensors())} tensors are finite; headers and config agree"


def _kept_tensors(out: Path, against: str | Path | None) -> str:
    """Compare the tensors of the source with those of OUT, by hash."""
    # Without the source: the files against the hashes that the conversion noted.
    if against is None:
        files, _ = _source_files(out)
        changed = [entry["file"] for entry in files.values() if not _is_unchanged(out, entry)]
        if changed:
            raise CheckFailedError(f"weights changed since the conversion: {', '.join(changed[:5])}")
        return f"{len(files)} weight files have the hashes noted at conversion (--against compares tensors)"

    # With the source: tensor by tensor, under the same name.
    here = _tensor_hashes(out)
    there = _source_hashes(Path(against), out)
    different = sorted(name for name in there if here.get(name) != there[name])
    if different:
        raise CheckFailedError(
            f"{len(different)} of {len(there)} tensors differ from {against}: {', '.join(different[:5])}"
        )

    extra = sorted(name for name in here if name not in there and not SPARSE_TENSOR.match(name))
    if extra:
        raise CheckFailedError(f"tensors that {against} does not have: {', '.join(extra[:5])}")
    return f"{len(there)} tensors are bit-equal to {against}"


def _is_unchanged(out: Path, entry: dict[str, Any]) -> bool:
    name = entry["file"]
    path = out / name
    return Path(name).name == name and path.is_file() and hash_file(path) == entry["sha256"]


def _tensor_hashes(folder: Path) -> dict[str, str]:
    checkpoint = open_converted(folder)
    tables = run_threads(lambda shard: hash_tensors(shard.header), checkpoint.weights.shards)

    return {name: digest for table in tables for name, digest in table.items()}


def _source_hashes(source: Path, out: Path) -> dict[str, str]:
    if not is_gguf(source):
        shards = open_checkpoint(source, allow_extra_tensors=True).weights.shards
        tables = run_threads(lambda shard: hash_tensors(shard.header), shards)
        return {name: digest for table in tables for name, digest in table.items()}

    # A GGUF source is dequantised again; tensors are hashed as in hash_tensors: dtype, shape, bytes.
    code = open_converted(out).weights.dtype()
    model = load_gguf_model(source, WEIGHT_DTYPES[code])
    hashes = {}

    for name, tensor in model.state_dict().items():
        if name not in model.all_tied_weights_keys:
            digest = hashlib.sha256(f"{code}{list(tensor.shape)}".encode())
            digest.update(memoryview(tensor.contiguous().view(-1).view(_byte_type()).numpy()))
            hashes[name] = digest.hexdigest()
    return hashes


def _byte_type() -> Any:
    import torch

    return torch.uint8


def _mixes_keys(out: Path) -> bool:
    """Return whether a layer attends to keys that a dense model does not have; trained, they differ."""
    checkpoint = open_converted(out)
    plan = SparseAttentionConfig.from_dict(checkpoint.config["sparse_attention"])
    methods = resolve_plan(plan, checkpoint.num_layers, checkpoint.geometry)
    return any(leaf.cache_needs().key_taps > 1 for leaf in leaves_of(methods))


def _full_budget(out: Path, lengths: Sequence[int] | None, *, trained: bool) -> str:
    """Compare with the dense model that has the same weights; training may have changed its config (RoPE)."""
    if trained:
        config = read_json_mapping(out / "config.json")
        dense_config = {**config, "model_type": family_of_sparse(config["model_type"]).model_type}
        for key in ("sparse_attention", "architectures", "auto_map"):
            dense_config.pop(key, None)
    else:
        dense_config = read_json_mapping(resolve_inside(out / SOURCE_FOLDER, "config.json"))
    worst, used = compare_with_dense(out, dense_config, lengths)
    spans = ", ".join(str(length) for length in used)

    if not worst <= TOLERANCE:
        raise CheckFailedError(
            f"fp32 logits differ by up to {worst:.2e} at lengths {spans} (at most {TOLERANCE:g})"
        )

    return f"fp32 logits within {worst:.1e} at lengths {spans}"


def _bare(out: Path, trust_remote_code: bool) -> str:
    """Load OUT with its own code files in a Python that cannot see this package."""
    # Code files that differ from those of this version, or that it would not write.
    ours = code_files(open_converted(out).config)
    other = [name for name, text in ours.items() if not _same_text(out / name, text)]
    other += [path.name for path in out.glob("*.py") if path.name not in ours]

    if other and not trust_remote_code:
        raise CheckFailedError(
            f"the code files are not those this version writes ({', '.join(other[:5])}); they are not run "
            "without --trust-remote-code"
        )

    length = max(length for length in probe_lengths(out) if length <= BARE_TOKENS)
    difference = float((bare_logits(out, length) - sparse_logits(out, length)).abs().max())

    if not difference <= TOLERANCE:
        raise CheckFailedError(f"logits without the package differ by {difference:.2e}")

    return f"loads with trust_remote_code alone; logits within {difference:.1e} of the package's"


def _same_text(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text
