"""Indexes, tensors and values that do not belong together, and folders that are no dense checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub._local_folder import write_download_metadata
from safetensors.torch import load_file, save_file

from tests.checkpoints import edit_json, shard_paths, write_dense
from tests.faults.checks import (
    INDEX,
    converted,
    edit_tensors,
    edit_weight_map,
    entry,
    error_of,
    refused,
    run,
    safetensors_bytes,
    snapshot,
    third,
    warned,
)
from tests.faults.test_checkpoint_files import hub_cache


@pytest.fixture(scope="session")
def single(tmp_path_factory) -> Path:
    return write_dense(tmp_path_factory.mktemp("single") / "model", shards=False)


@pytest.fixture
def one_file(single, tmp_path) -> Path:
    """A fresh checkpoint in a single weight file."""
    return Path(shutil.copytree(single, tmp_path / "model"))


def first_name(source: Path) -> str:
    return min(load_file(third(source)))


def matrix(path: Path) -> str:
    """Return the name of a matrix in a weight file."""
    return next(name for name, tensor in sorted(load_file(path).items()) if tensor.dim() == 2)


@pytest.mark.parametrize("content", ["{", "", "[]", "\ufeff<html>"])
def test_ck20_index_that_is_no_json(source, content):
    (source / INDEX).write_text(content)
    refused(source, "CK20", INDEX)


@pytest.mark.parametrize("weight_map", [..., {}, [], {"a": 1}, {"a": None}])
def test_ck20_index_without_a_weight_map(source, weight_map):
    edit_json(source / INDEX, weight_map=weight_map)
    refused(source, "CK23" if weight_map == {} else "CK20")


def test_ck20_index_without_metadata_is_fine(source):
    edit_json(source / INDEX, metadata=...)
    warned(source, "no 'metadata'")


def test_ck20_index_of_40_mb(source):
    with (source / INDEX).open("ab") as file:
        file.truncate(40_000_000)
    refused(source, "CF18", "40,000,000 bytes", seconds=1)


def test_ck21_index_lists_a_ghost(source):
    edit_weight_map(source, lambda table: table.update(ghost=third(source).name))
    refused(source, "CK21", "ghost", third(source).name)


def test_ck21_index_omits_a_tensor(source):
    name = first_name(source)
    edit_weight_map(source, lambda table: table.pop(name))
    refused(source, "CK21", name, "is not in")


def test_ck21_tensor_in_two_shards(source):
    more = load_file(shard_paths(source)[3])
    edit_tensors(third(source), lambda tensors: tensors.update(more))
    refused(source, "CK21", "is in two shards", shard_paths(source)[3].name)


def test_ck22_wrong_total_is_corrected(source):
    edit_json(source / INDEX, metadata={"total_size": 1})
    out = warned(source, "CK22")
    assert json.loads((out / INDEX).read_text())["metadata"]["total_size"] > 1


def test_ck23_missing_tensor_is_never_made_up(source):
    name = first_name(source)
    edit_tensors(third(source), lambda tensors: tensors.pop(name))
    edit_weight_map(source, lambda table: table.pop(name))
    refused(source, "CK23", name, "missing", "expected shape")


def test_ck24_unknown_tensor(source):
    edit_tensors(third(source), lambda tensors: tensors.update(extra=torch.zeros(2)))
    edit_weight_map(source, lambda table: table.update(extra=third(source).name))
    refused(source, "CK24", "extra", "--allow-extra-tensors", inspect=False)
    out, _ = converted(source, "--allow-extra-tensors")
    assert "extra" in json.loads((out / INDEX).read_text())["weight_map"]


def test_ck25_wrong_shape(source):
    name = first_name(source)
    right = list(load_file(third(source))[name].shape)
    edit_tensors(third(source), lambda tensors: tensors.update({name: torch.zeros(3, 3)}))
    refused(source, "CK25", name, "[3, 3]", str(right))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn, torch.bool, torch.complex64])
def test_ck26_weights_that_are_no_floats(source, dtype):
    name = first_name(source)
    edit_tensors(third(source), lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    refused(source, "CK26", name, "BF16")


def test_ck26_unknown_dtype(one_file):
    table = safetensors_bytes({"a": entry(0, 8, dtype="Q4")}, bytes(8))
    (one_file / "model.safetensors").write_bytes(table)
    refused(one_file, "CK26", "'Q4'")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_ck27_values_that_are_not_finite(one_file, dtype):
    path = one_file / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][1, 2], tensors[name][2, 0] = float("nan"), float("-inf")
    save_file(tensors, path, metadata={"format": "pt"})
    refused(one_file, "CK27", name, "2 values that are not finite", "[1, 2]", inspect=False)


def test_ck28_suspicious_values(one_file):
    path = one_file / "model.safetensors"
    names = [
        f"model.layers.{layer}.mlp.{part}_proj.weight" for layer, part in ((0, "up"), (1, "up"), (1, "gate"))
    ]

    def change(tensors):
        tensors[names[0]].zero_()
        tensors[names[1]][0, 0] = 5e4
        tensors[names[2]].fill_(0.25)

    edit_tensors(path, change)
    _, report = converted(one_file)
    lines = [line for line in report["warnings"] if "CK28" in line]
    words = ("all zero", "values above", "same value everywhere")
    for name, word in zip(names, words, strict=True):
        assert any(name in line and word in line for line in lines), word
    assert len(lines) == 3


def test_ck29_one_bit_after_conversion(source):
    out, _ = converted(source)
    path = third(out)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.unlink()  # it is a hard link: the source keeps its bytes
    path.write_bytes(bytes(content))
    error = error_of(run("verify", out, "--json"), 4)
    assert error["code"] == "CK29"
    assert path.name in error["message"]


def test_ck30_shards_swapped(source):
    first, second = shard_paths(source)[2:4]
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    refused(source, "CK30", first.name, second.name, "swapped or mixed")


def test_ck30_shard_of_another_model(source, tmp_path):
    other = write_dense(tmp_path / "other/model", intermediate_size=40)
    shutil.copy(shard_paths(other)[3], shard_paths(source)[3])
    refused(source, "CK21", "is in two shards")


def test_ck30_shard_of_a_twin_in_the_hub_cache(source, tmp_path):
    """Names, shapes and dtypes agree; the name of the blob, which is its hash, does not."""
    twin = write_dense(tmp_path / "other/model", seed=1)
    cached = hub_cache(source)
    blob = (cached / third(source).name).resolve()
    shutil.copy(shard_paths(twin)[2], blob)
    refused(cached, "CK30", third(source).name, blob.name, "download again", inspect=False)


def note_download(folder: Path, old: int = 0) -> None:
    """Note what ``hf download --local-dir`` notes; the first ``old`` shards are of an earlier revision."""
    for i, path in enumerate(shard_paths(folder)):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        write_download_metadata(folder, path.name, ("a" if i < old else "b") * 40, digest)


def test_ck30_shard_of_a_twin_in_a_downloaded_folder(source, tmp_path):
    """Names, shapes and dtypes agree; the hash that ``hf download`` noted does not."""
    note_download(source)
    assert not any("CK30" in line for line in converted(source, out=tmp_path / "first")[1]["warnings"])
    twin = write_dense(tmp_path / "other/model", seed=1)
    shutil.copy2(shard_paths(twin)[2], third(source))
    refused(source, "CK30", third(source).name, "download again", inspect=False)


def test_ck30_shards_of_two_revisions(source):
    """An update with ``hf download`` that was interrupted; a shard written since counts for nothing."""
    note_download(source, old=2)
    names = [path.name for path in shard_paths(source)]
    refused(source, "CK30", f"{names[0]} at aaaa", f"{names[2]} at bbbb", "hf download")
    for path in shard_paths(source)[2:]:
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime + 9))
    converted(source)


@pytest.mark.parametrize("place", [".cache", ".cache/huggingface", ".cache/huggingface/download"])
def test_ck30_notes_outside_of_the_folder_are_not_read(source, tmp_path, place):
    note_download(source, old=2)
    elsewhere = (source / place).rename(tmp_path / "elsewhere")
    (source / place).symlink_to(elsewhere)
    converted(source)


def test_ck30_a_name_that_leaves_no_room_for_a_note(source):
    note_download(source)
    old, new = third(source).name, "x" * 240 + ".safetensors"
    third(source).rename(source / new)
    edit_weight_map(source, lambda table: table.update({k: new for k, v in table.items() if v == old}))
    converted(source)


def test_ck30_files_rewritten_after_a_download(source):
    note_download(source)
    for note in (source / ".cache/huggingface/download").glob("*.metadata"):
        revision, _, when = note.read_text().splitlines()
        note.write_text(f"{revision}\n{'0' * 64}\n{when}\n")
    warned(source, "were changed after they were downloaded")


def test_ck30_a_shard_that_was_not_downloaded_with_the_others(source):
    note_download(source)
    (source / f".cache/huggingface/download/{third(source).name}.metadata").unlink()
    warned(source, f"not downloaded with the other weight files: {third(source).name}")


@pytest.mark.parametrize("note", ["", "x\ny\nz", "0" * 5000, f'{"a" * 40}\n"etag"\n1.0\n'])
def test_ck30_notes_that_say_nothing(source, note):
    note_download(source)
    for path in (source / ".cache/huggingface/download").glob("*.metadata"):
        path.write_text(note)
    assert not any("CK30" in line for line in converted(source)[1]["warnings"])


def test_ck30_shard_of_a_twin_in_a_converted_folder(source, tmp_path):
    out, _ = converted(source)
    twin = write_dense(tmp_path / "other/model", seed=1)
    third(out).unlink()
    shutil.copy(shard_paths(twin)[2], out / third(source).name)
    error = error_of(run("verify", out, "--json"), 4)
    assert third(source).name in error["message"]


def test_ck34_stale_index(one_file):
    (one_file / INDEX).write_text("{}")
    warned(one_file, "CK34")


def test_ck35_already_converted(source):
    out, _ = converted(source)
    out = out.rename(source.parent / "once")
    refused(out, "CK35", "already converted", "revert", inspect=False)


QUANTISED = {
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "compressed-tensors": {"quant_method": "compressed-tensors"},
}


@pytest.mark.parametrize(("name", "note"), QUANTISED.items(), ids=QUANTISED)
def test_ck36_quantised(source, name, note):
    edit_json(source / "config.json", quantization_config=note)
    refused(source, "CK36", name, "dequantize")


def test_ck36_folder_with_a_gguf_file(source):
    for path in [*shard_paths(source), source / INDEX]:
        path.unlink()
    (source / "model.gguf").write_bytes(b"GGUF")
    refused(source, "CK36", "name the file itself", "model.gguf")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("adapter_config.json", "merge_and_unload"),
        ("__0_0.distcp", "accelerate merge-weights"),
        ("pytorch_model_fsdp_0", "accelerate merge-weights"),
        ("global_step100", "zero_to_fp32"),
    ],
)
@pytest.mark.parametrize("with_config", [False, True])
def test_ck37_adapter_and_training_state(source, name, told, with_config):
    gone = [*shard_paths(source), source / INDEX]
    for path in gone if with_config else [*gone, source / "config.json"]:
        path.unlink()
    (source / name).write_text("{}")
    alone = name == "adapter_config.json" and with_config
    refused(source, *(("CK10",) if alone else ("CK37", told)))


def test_ck38_header_with_many_entries(one_file):
    """Beyond what a model can have: refused at once; tests/checkpoint/test_headers.py reads 50,000."""
    raw = b",".join(b'"%0500d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(100_000))
    (one_file / "model.safetensors").write_bytes(safetensors_bytes(None, raw=b"{" + raw + b"}"))
    refused(one_file, "CK04", "at most 32,000,000 bytes", seconds=5)


def test_ck39_file_changes_between_check_and_reading(source, monkeypatch):
    def swap_then_check(checkpoint):
        path = third(source)
        tensors = load_file(path)
        path.unlink()
        save_file({name.replace("weight", "wright"): tensor for name, tensor in tensors.items()}, path)

    monkeypatch.setattr("nsa_convert.convert.check_tokenizer", swap_then_check)
    error = error_of(run("convert", source, source.parent / "out", "--method", "nsa", "--json"), 3)
    assert error["code"] == "CK39"
    assert third(source).name in error["message"]
    assert [path.name for path in source.parent.iterdir()] == ["model"]


def test_ck39_file_grows_while_it_is_read(source, monkeypatch):
    def grow_then_check(checkpoint):
        with third(source).open("ab") as file:
            file.write(b"x")

    monkeypatch.setattr("nsa_convert.convert.check_tokenizer", grow_then_check)
    error = error_of(run("convert", source, source.parent / "out", "--method", "nsa", "--json"), 3)
    assert error["code"] == "CK39"
    assert [path.name for path in source.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("stored", ["once", "twice"])
def test_ck40_tied_embeddings(tmp_path, stored):
    source = write_dense(tmp_path / "model", shards=False, tie_word_embeddings=True)
    if stored == "twice":
        table = "model.embed_tokens.weight"
        edit_tensors(
            source / "model.safetensors",
            lambda tensors: tensors.update({"lm_head.weight": tensors[table].clone()}),
        )
    before = snapshot(source)
    out, report = converted(source)
    assert any("CK40" in line for line in report["warnings"]) == (stored == "twice")
    from nsa_convert.loading import load_causal_model

    model = load_causal_model(out, torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert snapshot(source) == before


def test_ck40_missing_head(one_file):
    edit_tensors(one_file / "model.safetensors", lambda tensors: tensors.pop("lm_head.weight"))
    refused(one_file, "CF11", "lm_head.weight")
