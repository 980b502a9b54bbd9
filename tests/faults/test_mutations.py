"""Whatever is in a checkpoint or a recipe: refused or accepted, quickly, without a traceback or a write."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nsa_convert.checkpoint.headers import read_header
from nsa_convert.errors import CheckpointError
from tests.faults.checks import entry, safetensors_bytes
from tests.faults.fuzz import fuzz
from tests.faults.mutations import check_mutation, pristine_files

SOME = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_pristine_files_are_accepted(source):
    files = pristine_files(source)
    assert check_mutation(source, files, files) == [0, 0]


def test_a_crash_would_be_seen(source, monkeypatch):
    def crash(*_, **__):
        raise IndexError("list index out of range")

    monkeypatch.setattr("nsa_convert.inspection.open_checkpoint", crash)
    files = pristine_files(source)
    with pytest.raises(AssertionError, match="exit 1"):
        check_mutation(source, files, files)


def test_a_write_would_be_seen(source, monkeypatch):
    monkeypatch.setattr("nsa_convert.convert._never_sparse", lambda *_: (source.parent / "new").touch() or [])
    files = pristine_files(source)
    with pytest.raises(AssertionError, match="a file was written"):
        check_mutation(source, files, files)


def test_mutations(source):
    tally = fuzz(source, examples=100, seed=int(os.environ.get("FUZZ_SEED", "0")))
    assert tally["inspect 3"] > 20
    assert tally["convert 0"] > 2


@SOME
@given(position=st.integers(0, 400), value=st.integers(0, 255), cut=st.integers(0, 500))
def test_an_accepted_file_adds_up(tmp_path, position, value, cut):
    content = bytearray(safetensors_bytes({"a": entry(0, 8), "b": entry(8, 16, (2, 1))}, bytes(16)))
    content[position % len(content)] = value
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(content)[: len(content) - cut if cut < 100 else len(content)])
    try:
        header = read_header(path)
    except CheckpointError:
        return
    assert sum(e.nbytes for e in header.tensors) == header.file_bytes - header.data_start
