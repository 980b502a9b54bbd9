"""Where a folder may be written, and what it may be called."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nsa_convert.checkpoint import staging
from nsa_convert.checkpoint.manifest import check_manifest
from nsa_convert.convert import convert_checkpoint
from nsa_convert.errors import NsaConvertError
from tests.faults.checks import (
    ENVIRONMENT,
    METHOD,
    converted,
    edit_weight_map,
    error_of,
    refused,
    run,
    snapshot,
    third,
)
from tests.test_convert import NSA


def refused_place(code: str, source: Path, out: Path, *options: str, status: int = 2) -> dict:
    """Convert to a place that cannot be; nothing on disk changes."""
    before = snapshot(source.parent)
    error = error_of(run("convert", source, out, *METHOD, *options, "--json"), status)
    assert error["code"] == code, error
    assert snapshot(source.parent) == before
    return error


def test_sv04_overlapping_places(source, tmp_path):
    (tmp_path / "link").symlink_to(source)
    for out in (source, source / "inside", source.parent, tmp_path / "link", source / "../model"):
        assert "overlap" in refused_place("SV04", source, out)["message"]


def test_sv05_taken(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("x")
    assert "--overwrite" in refused_place("SV05", source, out)["hint"]
    assert "not replaced" in refused_place("SV05", source, out, "--overwrite")["message"]
    (tmp_path / "file").write_text("x")
    assert "not a folder" in refused_place("SV05", source, tmp_path / "file", "--overwrite")["message"]


def test_empty_folder_is_free(source, tmp_path):
    (tmp_path / "out").mkdir()
    convert_checkpoint(source, tmp_path / "out", NSA)
    assert check_manifest(tmp_path / "out") == []


@pytest.mark.parametrize("name", ["with space", "ünïcode-模型", "-leading", "x" * 255, "slash/", "a'b", "%d"])
def test_sv11_odd_output_names(source, name, monkeypatch):
    monkeypatch.chdir(source.parent)
    result = run("convert", *METHOD, "--", "model", name)
    assert result.exit_code == 0, result.stderr
    assert check_manifest(Path(name)) == []
    assert len(list(source.parent.iterdir())) == 2


def test_sv11_odd_source_names(source, tmp_path):
    odd = source.rename(tmp_path / "ein Modell, 模型 'x'")
    _, report = converted(odd)
    assert report["source"]["id"] == odd.name


def test_sv14_names_that_differ_only_in_case(source):
    twin = third(source).name.upper().replace("SAFETENSORS", "safetensors")
    shutil.copy(third(source), source / twin)
    edit_weight_map(source, lambda table: table.update({next(iter(table)): twin}))
    refused(source, "SV14", "differ only in case")


@pytest.mark.parametrize(
    "name", ["aux.safetensors", "model:1", "trailing.", "trailing ", "com1", "a|b", 'a"b']
)
def test_sv14_names_that_windows_cannot_hold(source, name):
    first = third(source).name
    third(source).rename(source / name)
    edit_weight_map(source, lambda table: table.update({k: name for k, v in table.items() if v == first}))
    refused(source, "CK13", repr(name), "not a plain file name")


def test_sv15_no_permission(source, tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path))

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(NsaConvertError) as caught:
        convert_checkpoint(source, tmp_path / "out", NSA)
    assert (caught.value.code, caught.value.exit_status) == ("SV15", 5)


def test_sv15_as_another_user(source, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    place = tmp_path / "closed"
    place.mkdir(mode=0o755)
    for path in (tmp_path, *tmp_path.parents):
        if path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
    script = (
        "import os, sys; from pathlib import Path\n"
        "from nsa_convert.errors import NsaConvertError\n"
        "from nsa_convert.checkpoint.staging import staged\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "try:\n"
        "    with staged(Path(sys.argv[1])): pass\n"
        "except NsaConvertError as error: print(error.code, error.exit_status)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(place / "out")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["SV15", "5"], done.stderr


def test_sv16_two_at_once(tmp_path):
    with staging.staged(tmp_path / "out") as first:
        (first / "x").write_text("1")
        with pytest.raises(NsaConvertError) as caught, staging.staged(tmp_path / "out"):
            pass
        assert (caught.value.code, caught.value.exit_status) == ("SV16", 2)
    assert (tmp_path / "out/x").read_text() == "1"
