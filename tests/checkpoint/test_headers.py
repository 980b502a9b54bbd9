from __future__ import annotations

import os
import time

import pytest
import torch
from safetensors.torch import save_file

from nsa_convert.checkpoint.headers import read_header
from nsa_convert.errors import NsaConvertError
from tests.faults.checks import entry, safetensors_bytes


def test_header_agrees_with_safetensors(tmp_path):
    tensors = {"b": torch.ones(3, 4, dtype=torch.bfloat16), "a": torch.zeros(5), "scalar": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert {e.name: (e.dtype, e.shape) for e in header.tensors} == {
        "a": ("F32", (5,)),
        "b": ("BF16", (3, 4)),
        "scalar": ("F32", ()),
    }
    assert header.metadata == {"format": "pt"}
    content = (tmp_path / "x.safetensors").read_bytes()
    for e in header.tensors:
        raw = tensors[e.name].reshape(-1).view(torch.uint8).numpy().tobytes()
        assert content[e.start : e.end] == raw


def test_pipe_and_folder_are_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, code in (("pipe", "CK17"), ("folder", "CK18"), ("nothing", "CK10")):
        with pytest.raises(NsaConvertError) as caught:
            read_header(tmp_path / name)
        assert caught.value.code == code


def test_large_header_is_read_quickly(tmp_path):
    table = {f"model.layers.{i}.{'x' * 500}": entry(i, i + 1, (1,), "U8") for i in range(50_000)}
    path = tmp_path / "many.safetensors"
    path.write_bytes(safetensors_bytes(table, bytes(50_000)))
    begin = time.process_time()
    assert len(read_header(path).tensors) == 50_000
    assert time.process_time() - begin < 5
