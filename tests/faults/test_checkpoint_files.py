"""Damaged and hostile checkpoint files: refused with the right code, OUT absent, the source untouched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nsa_convert.convert import convert_checkpoint
from nsa_convert.errors import NsaConvertError
from tests.checkpoints import edit_json, shard_paths, tree_hash, write_dense
from tests.test_convert import NSA

INDEX = "model.safetensors.index.json"


def cut(source: Path, size: int) -> None:
    os.truncate(shard_paths(source)[2], size)


def replace_shard(source: Path, content: bytes) -> None:
    shard_paths(source)[2].write_bytes(content)


def rename_in_index(source: Path, name: str) -> None:
    weight_map = json.loads((source / INDEX).read_text())["weight_map"]
    old = shard_paths(source)[2].name
    edit_json(
        source / INDEX, weight_map={key: name if value == old else value for key, value in weight_map.items()}
    )


def to_outside(source: Path, name: str) -> None:
    shutil.copy(shard_paths(source)[2], source.parent / "evil.safetensors")
    rename_in_index(source, name)


def edit_tensors(source: Path, change) -> None:
    path = shard_paths(source)[2]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_weight_map(source: Path, change) -> None:
    weight_map = json.loads((source / INDEX).read_text())["weight_map"]
    change(weight_map)
    edit_json(source / INDEX, weight_map=weight_map)


def name_of(source: Path, shard: int = 2) -> str:
    return sorted(load_file(shard_paths(source)[shard]))[0]


def link_outside(source: Path) -> None:
    path = shard_paths(source)[2]
    path.rename(source.parent / "elsewhere.safetensors")
    path.symlink_to(source.parent / "elsewhere.safetensors")


def link_to_itself(source: Path) -> None:
    path = shard_paths(source)[2]
    path.unlink()
    path.symlink_to(path.name)


def swap_shards(source: Path) -> None:
    first, second = shard_paths(source)[2:4]
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)


def drop_tensor(source: Path) -> None:
    name = name_of(source)
    path = shard_paths(source)[2]
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    edit_weight_map(source, lambda weight_map: weight_map.pop(name))


def duplicate_tensor(source: Path) -> None:
    extra = load_file(shard_paths(source)[3])
    edit_tensors(source, lambda tensors: tensors.update(extra))


def ghost_tensor(source: Path) -> None:
    edit_weight_map(source, lambda weight_map: weight_map.update({"ghost": shard_paths(source)[2].name}))


def only_pickles(source: Path) -> None:
    for path in [*shard_paths(source), source / INDEX]:
        path.unlink()
    torch.save({}, source / "pytorch_model.bin")


def only_adapter(source: Path) -> None:
    for path in [*shard_paths(source), source / INDEX, source / "config.json"]:
        path.unlink()
    (source / "adapter_config.json").write_text("{}")


def a_pipe(source: Path) -> None:
    path = shard_paths(source)[2]
    path.unlink()
    os.mkfifo(path)


def a_folder(source: Path) -> None:
    path = shard_paths(source)[2]
    path.unlink()
    path.mkdir()


def set_value(value: float):
    def change(tensors):
        next(iter(tensors.values())).view(-1)[3] = value

    return change


def case_clash(source: Path) -> None:
    path = shard_paths(source)[2]
    shutil.copy(path, path.with_name(path.name.upper().replace("SAFETENSORS", "safetensors")))
    name = name_of(source)
    edit_weight_map(
        source,
        lambda weight_map: weight_map.update({name: path.name.upper().replace("SAFETENSORS", "safetensors")}),
    )


def first_key(tensors: dict) -> str:
    return sorted(tensors)[0]


def widen(tensors: dict) -> None:
    tensors[first_key(tensors)] = torch.zeros(3, 3)


def as_integers(tensors: dict) -> None:
    tensors[first_key(tensors)] = tensors[first_key(tensors)].int()


CASES = {
    "CK01": lambda s: cut(s, 0),
    "CK02": lambda s: cut(s, shard_paths(s)[2].stat().st_size // 2),
    "CK02-one byte": lambda s: cut(s, shard_paths(s)[2].stat().st_size - 1),
    "CK03": lambda s: replace_shard(s, shard_paths(s)[2].read_bytes() + b"x"),
    "CK04": lambda s: replace_shard(s, (2**63).to_bytes(8, "little") + bytes(100)),
    "CK08": lambda s: replace_shard(s, b"version https://git-lfs.github.com/spec/v1\n"),
    "CK09": lambda s: replace_shard(s, b"<html>not found</html>"),
    "CK10": lambda s: shard_paths(s)[2].unlink(),
    "CK11": lambda s: to_outside(s, "../evil.safetensors"),
    "CK12": lambda s: to_outside(s, str(s.parent / "evil.safetensors")),
    "CK13-backslash": lambda s: to_outside(s, "x\\evil.safetensors"),
    "CK13-folder": lambda s: to_outside(s, "x/evil.safetensors"),
    "CK13-newline": lambda s: to_outside(s, "x\n.safetensors"),
    "CK13-zero byte": lambda s: to_outside(s, "x\0.safetensors"),
    "CK13-device": lambda s: to_outside(s, "con.safetensors"),
    "CK14": link_outside,
    "CK15": link_to_itself,
    "CK17": a_pipe,
    "CK18": a_folder,
    "CK20-not JSON": lambda s: (s / INDEX).write_text("{"),
    "CK20-no map": lambda s: edit_json(s / INDEX, weight_map=...),
    "CK21-ghost": ghost_tensor,
    "CK21-omitted": lambda s: edit_weight_map(s, lambda m: m.pop(name_of(s))),
    "CK21-twice": duplicate_tensor,
    "CK23": drop_tensor,
    "CK24": lambda s: (
        edit_tensors(s, lambda t: t.update(extra=torch.zeros(2))),
        edit_weight_map(s, lambda m: m.update(extra=shard_paths(s)[2].name)),
    ),
    "CK25": lambda s: edit_tensors(s, widen),
    "CK26": lambda s: edit_tensors(s, as_integers),
    "CK27-nan": lambda s: edit_tensors(s, set_value(float("nan"))),
    "CK27-inf": lambda s: edit_tensors(s, set_value(float("-inf"))),
    "CK30": swap_shards,
    "CK31": only_pickles,
    "CK36": lambda s: edit_json(s / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
    "CK37": only_adapter,
    "SV14": case_clash,
}


@pytest.mark.parametrize("case", CASES)
def test_refused(source, tmp_path, case):
    CASES[case](source)
    before = None if case == "CK17" else tree_hash(source)
    with pytest.raises(NsaConvertError) as caught:
        convert_checkpoint(source, tmp_path / "out", NSA)
    error = caught.value
    codes = {error.code, *(problem.code for problem in error.problems)}
    assert case[:4] in codes
    assert error.exit_status == 3
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".nsa")] == []
    assert before is None or tree_hash(source) == before


def test_ck10_names_all_missing_shards(source, tmp_path):
    missing = [shard_paths(source)[i] for i in (1, 3, 5)]
    for path in missing:
        path.unlink()
    with pytest.raises(NsaConvertError) as caught:
        convert_checkpoint(source, tmp_path / "out", NSA)
    assert all(path.name in str(caught.value) for path in missing)
    assert len(caught.value.problems) == 3


def test_ck19_no_permission(source, tmp_path):
    """As another user, since root may read everything."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    shard_paths(source)[2].chmod(0)
    for path in (source, *source.parents):
        if os.access(path, os.W_OK) and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
    script = (
        "import os, sys; os.setgid(65534); os.setuid(65534)\n"
        "from nsa_convert.errors import NsaConvertError\n"
        "from nsa_convert.patch.headers import read_header\n"
        "from pathlib import Path\n"
        "try: read_header(Path(sys.argv[1]))\n"
        "except NsaConvertError as error: print(error.code, error.exit_status)\n"
    )
    # Imported before the change of user, the package need not be readable for it.
    script = "import nsa_convert.patch.headers\n" + script
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", script, str(shard_paths(source)[2])],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["CK19", "5"], done.stderr


def test_ck20_missing_metadata_is_no_error(source, tmp_path):
    edit_json(source / INDEX, metadata=...)
    report = convert_checkpoint(source, tmp_path / "out", NSA)
    assert any("no 'metadata'" in line for line in report.warnings)


def test_ck22_wrong_total_is_corrected(source, tmp_path):
    edit_json(source / INDEX, metadata={"total_size": 1})
    report = convert_checkpoint(source, tmp_path / "out", NSA)
    assert any("CK22" in line for line in report.warnings)
    assert json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]["total_size"] > 1


def test_ck24_extra_tensors_can_be_kept(source, tmp_path):
    CASES["CK24"](source)
    convert_checkpoint(source, tmp_path / "out", NSA, allow_extra_tensors=True)
    assert "extra" in json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]


def test_ck27_names_tensor_index_and_count(source, tmp_path):
    path = shard_paths(source)[2]
    tensors = load_file(path)
    name = max(tensors, key=lambda key: tensors[key].numel())
    tensors[name][1, 2] = float("nan")
    tensors[name][2, 0] = float("inf")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        NsaConvertError, match=r"2 values that are not finite, the first at \[1, 2\]"
    ) as caught:
        convert_checkpoint(source, tmp_path / "out", NSA)
    assert name in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_ck27_in_every_dtype(tmp_path, dtype):
    source = write_dense(tmp_path / "dense", shards=False)
    path = source / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    convert_checkpoint(source, tmp_path / "fine", NSA)
    tensors["model.norm.weight"][-1] = float("inf")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(NsaConvertError, match=r"model.norm.weight .* at \[31\]"):
        convert_checkpoint(source, tmp_path / "out", NSA)


def test_ck32_pickles_are_not_run(source, tmp_path):
    only_pickles(source)
    sentinel = tmp_path / "sentinel"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {sentinel}",)

    torch.save({"x": Evil()}, source / "pytorch_model.bin")
    with pytest.raises(NsaConvertError):
        convert_checkpoint(source, tmp_path / "out", NSA)
    assert not sentinel.exists()


def test_ck33_ck34_harmless_leftovers(tmp_path):
    source = write_dense(tmp_path / "dense", shards=False)
    (source / "pytorch_model.bin").write_bytes(b"old")
    (source / INDEX).write_text("{}")
    warnings = " ".join(convert_checkpoint(source, tmp_path / "out", NSA).warnings)
    assert "CK33" in warnings
    assert "CK34" in warnings


def test_ck35_already_converted(source, tmp_path):
    convert_checkpoint(source, tmp_path / "once", NSA)
    with pytest.raises(NsaConvertError, match="already converted") as caught:
        convert_checkpoint(tmp_path / "once", tmp_path / "twice", NSA)
    assert (caught.value.code, caught.value.exit_status) == ("CK35", 3)


def test_ck39_file_changes_between_check_and_reading(source, tmp_path, monkeypatch):
    from nsa_convert import convert

    def swap_then_check(checkpoint):
        path = shard_paths(source)[2]
        tensors = load_file(path)
        os.unlink(path)
        save_file({name.replace("weight", "wright"): tensor for name, tensor in tensors.items()}, path)

    monkeypatch.setattr(convert, "check_tokenizer", swap_then_check)
    with pytest.raises(NsaConvertError) as caught:
        convert_checkpoint(source, tmp_path / "out", NSA)
    assert caught.value.code == "CK39"
    assert not (tmp_path / "out").exists()


def test_ck40_tied_head_stored_twice(tmp_path):
    source = write_dense(tmp_path / "dense", shards=False, tie_word_embeddings=True)
    path = source / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    assert any("CK40" in line for line in convert_checkpoint(source, tmp_path / "out", NSA).warnings)
