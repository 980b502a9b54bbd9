from __future__ import annotations

import contextlib
import json
import os
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from nsa_convert.errors import CheckpointError, NsaConvertError
from nsa_convert.patch.headers import read_header


def build(table, data: bytes = b"", *, raw: bytes | None = None, length: int | None = None) -> bytes:
    """Return the bytes of a file with this header, or with these raw header bytes."""
    head = json.dumps(table).encode() if raw is None else raw
    return (len(head) if length is None else length).to_bytes(8, "little") + head + data


def entry(start: int, end: int, shape=(2,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


BAD_FILES = {
    "CK01 empty": (b"", "CK01"),
    "CK02 cut in the data": (build({"a": entry(0, 8)}, bytes(7)), "CK02"),
    "CK02 cut in the header": (build({"a": entry(0, 8)}, bytes(8))[:20], "CK02"),
    "CK03 trailing byte": (build({"a": entry(0, 8)}, bytes(9)), "CK03"),
    "CK04 seven bytes": (bytes(7), "CK04"),
    "CK04 huge length": (build({}, length=2**63), "CK04"),
    "CK05 not UTF-8": (build(None, raw=b'{"\xff": 1}'), "CK05"),
    "CK05 not JSON": (build(None, raw=b'{"a": '), "CK05"),
    "CK05 leading space": (build(None, raw=b' {"a": 1}'), "CK05"),
    "CK04 deep nesting": (build(None, raw=b'{"a":' + b"[" * 100_000), "CK04"),
    "CK05 no offsets": (build({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "CK05"),
    "CK06 tensor twice": (
        build(
            None,
            raw=b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
            b'"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
            data=bytes(2),
        ),
        "CK06",
    ),
    "CK07 overlap": (build({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "CK07"),
    "CK07 gap": (build({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)), "CK07"),
    "CK07 negative": (build({"a": entry(-8, 0)}, bytes(8)), "CK07"),
    "CK07 shape does not fit": (build({"a": entry(0, 8, shape=(3,))}, bytes(8)), "CK07"),
    "CK07 overflow": (build({"a": entry(0, 8, shape=(2**40, 2**40))}, bytes(8)), "CK07"),
    "CK07 float shape": (build({"a": entry(0, 8, shape=(2.0,))}, bytes(8)), "CK07"),
    "CK08 LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "CK08"),
    "CK09 HTML": (b"<!DOCTYPE html><html><body>404</body></html>", "CK09"),
    "CK09 JSON error": (b'{"error": "Repository not found"}', "CK09"),
    "CK26 unknown dtype": (build({"a": entry(0, 8, dtype="Q4")}, bytes(8)), "CK26"),
}


@pytest.mark.parametrize(("content", "code"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file(tmp_path, content, code):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(NsaConvertError) as caught:
        read_header(path)
    assert caught.value.code == code
    assert caught.value.exit_status == 3
    assert "model.safetensors" in str(caught.value)


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
    path.write_bytes(build(table, bytes(50_000)))
    begin = time.process_time()
    assert len(read_header(path).tensors) == 50_000
    assert time.process_time() - begin < 5


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 400), value=st.integers(0, 255), cut=st.integers(0, 500))
def test_damaged_files_never_crash(tmp_path, position, value, cut):
    content = bytearray(build({"a": entry(0, 8), "b": entry(8, 16, (2, 1))}, bytes(16)))
    content[position % len(content)] = value
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(content)[: len(content) - cut if cut < 100 else len(content)])
    with contextlib.suppress(CheckpointError):
        header = read_header(path)
        assert sum(e.nbytes for e in header.tensors) == header.file_bytes - header.data_start
