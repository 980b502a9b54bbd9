from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nsa_convert.convert import convert_checkpoint
from nsa_convert.errors import CheckFailedError, CheckpointError, NsaConvertError
from nsa_convert.verification import revert_checkpoint, verify_checkpoint
from tests.checkpoints import FAMILY_OPTIONS, edit_json, shard_paths, tree_hash, write_dense
from tests.flat_code import make_flat
from tests.marks import slow
from tests.test_convert import NSA, SSA

NAMES = ["files", "values", "kept tensors", "full budget = dense", "bare transformers"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    source = write_dense(folder / "dense")
    convert_checkpoint(source, folder / "out", NSA, copy=True)
    return source, folder / "out"


@pytest.fixture
def out(pair, tmp_path) -> Path:
    """A converted folder to damage."""
    return Path(shutil.copytree(pair[1], tmp_path / "out"))


def outcome(out: Path, against: Path | None = None, **options) -> dict[str, bool | None]:
    return {check.name: check.ok for check in verify_checkpoint(out, against, **options).checks}


@pytest.mark.parametrize(("model_type", "sparse"), [("qwen3", NSA), slow("mistral", SSA)], ids=["nsa", "ssa"])
def test_a_conversion_passes(tmp_path, model_type, sparse):
    source = write_dense(tmp_path / "dense", model_type, shards=model_type == "qwen3")
    convert_checkpoint(source, tmp_path / "out", sparse)
    report = verify_checkpoint(tmp_path / "out", source)
    assert report.ok, report.to_text()
    assert [check.name for check in report.checks] == NAMES
    report.raise_failed()


@pytest.mark.parametrize("model_type", FAMILY_OPTIONS)
def test_full_budget_of_every_family(tmp_path, model_type):
    """Lengths on both sides of the visible budget of 32 tokens; weights large enough for errors to show."""
    from nsa_convert.equivalence import compare_with_dense

    source = write_dense(tmp_path / "dense", model_type)
    convert_checkpoint(source, tmp_path / "out", NSA)
    config = json.loads((source / "config.json").read_text())
    worst, lengths = compare_with_dense(tmp_path / "out", config, (5, 32, 101))
    assert worst <= 1e-4
    assert lengths == [5, 32, 101]


def test_ck29_one_bit(pair, out):
    path = shard_paths(out)[3]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    report = verify_checkpoint(out, pair[0])
    results = {check.name: check.ok for check in report.checks}
    assert results == dict(zip(NAMES, [False, True, False, None, None], strict=True))
    with pytest.raises(CheckFailedError, match=path.name) as caught:
        report.raise_failed()
    assert (caught.value.code, caught.value.exit_status) == ("CK29", 4)


def test_missing_and_added_files(pair, out):
    (out / "tokenizer.json").unlink()
    save_file({"x": torch.zeros(1)}, out / "model.safetensors")
    detail = verify_checkpoint(out).checks[0].detail
    assert "tokenizer.json is missing" in detail
    assert "model.safetensors was added" in detail


def test_values_that_are_not_finite(out):
    path = out / "model-sparse.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    assert outcome(out)["values"] is False


def test_other_source(tmp_path, out):
    other = write_dense(tmp_path / "other", seed=1)
    assert outcome(out, other)["kept tensors"] is False


def test_a_model_that_is_not_dense_at_full_budget(pair, monkeypatch):
    """The check has to see a wrong layer: here the budget of the converted model stays as it is."""
    import contextlib

    monkeypatch.setattr("nsa_convert.equivalence.with_full_budget", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr("nsa_convert.verification._bare", lambda *_: "not run here")
    assert outcome(pair[1])["full budget = dense"] is False


@pytest.mark.slow
def test_code_of_others_is_not_run(out, tmp_path):
    sentinel = tmp_path / "sentinel"
    code = out / "modeling_nsa_llama.py"
    code.write_text(code.read_text() + f"\nopen({str(sentinel)!r}, 'w').close()\n")
    manifest = json.loads((out / "nsa_manifest.json").read_text())
    import hashlib

    manifest["files"][code.name] = {
        "bytes": code.stat().st_size,
        "sha256": hashlib.sha256(code.read_bytes()).hexdigest(),
    }
    (out / "nsa_manifest.json").write_text(json.dumps(manifest))
    results = outcome(out)
    assert results["files"] is True
    assert results["bare transformers"] is False
    assert not sentinel.exists()
    assert outcome(out, trust_remote_code=True)["bare transformers"] is True
    assert sentinel.exists()


def test_a_folder_of_an_earlier_version_is_read_and_goes_back(pair, out, tmp_path):
    flat = make_flat(out, "nsa_llama")
    results = {check.name: check for check in verify_checkpoint(out).checks}
    assert [name for name, check in results.items() if not check.ok] == ["bare transformers"]
    assert "not those this version writes" in results["bare transformers"].detail
    assert len(flat) > 60
    revert_checkpoint(out, tmp_path / "back")
    assert tree_hash(tmp_path / "back") == tree_hash(pair[0])


@pytest.mark.slow
def test_a_folder_of_an_earlier_version_runs_its_own_code(out):
    make_flat(out, "nsa_llama")
    assert outcome(out, trust_remote_code=True)["bare transformers"] is True


def test_not_a_converted_folder(pair):
    with pytest.raises(CheckpointError) as caught:
        verify_checkpoint(pair[0])
    assert caught.value.code == "SV17"


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd"])
def test_manifest_may_not_lead_outside(out, name):
    edit_json(out / "nsa_manifest.json", files={name: {"bytes": 1, "sha256": "0"}})
    with pytest.raises(CheckpointError):
        verify_checkpoint(out)


@pytest.mark.parametrize("model_type", FAMILY_OPTIONS)
@pytest.mark.parametrize("shards", [True, False])
def test_revert(tmp_path, model_type, shards):
    source = write_dense(tmp_path / "dense", model_type, shards=shards)
    convert_checkpoint(source, tmp_path / "out", NSA)
    report = revert_checkpoint(tmp_path / "out", tmp_path / "back")
    assert tree_hash(tmp_path / "back") == tree_hash(source)
    assert report.files == sorted(tree_hash(source))


def test_sv13_a_changed_model_has_no_dense_form(out, tmp_path):
    path = shard_paths(out)[2]
    tensors = {name: tensor + 1 for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckFailedError) as caught:
        revert_checkpoint(out, tmp_path / "back")
    assert (caught.value.code, caught.value.exit_status) == ("SV13", 4)
    assert not (tmp_path / "back").exists()


def test_revert_does_not_leave_the_folder(out, tmp_path):
    (tmp_path / "secret").write_text("x")
    report = json.loads((out / "conversion_report.json").read_text())
    report["source"]["side_files"] = ["../secret"]
    (out / "conversion_report.json").write_text(json.dumps(report))
    with pytest.raises(NsaConvertError):
        revert_checkpoint(out, tmp_path / "back")
    assert not (tmp_path / "back").exists()
