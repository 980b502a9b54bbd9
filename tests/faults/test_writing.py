"""Failures while writing: OUT is absent or complete, the source is as it was, nothing is left behind."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nsa_convert.checkpoint import scan, staging
from nsa_convert.checkpoint.manifest import check_manifest
from nsa_convert.convert import convert_checkpoint
from nsa_convert.errors import NsaConvertError
from nsa_convert.loading import load_causal_model
from nsa_convert.verification import revert_checkpoint
from tests.checkpoints import edit_json, tree_hash
from tests.evaluation.tiny import save_pair
from tests.faults.checks import (
    ENVIRONMENT,
    METHOD,
    converted,
    error_of,
    forked,
    python,
    refused,
    run,
    snapshot,
)
from tests.faults.kills import kill_conversions, kill_evaluations
from tests.test_convert import NSA


def test_sv01_killed_at_random_points(source, tmp_path):
    tally = kill_conversions(source, tmp_path / "work", kills=12, seed=0)
    assert tally.killed == 12, tally
    assert tally.lost == [], tally


def test_sv01_killed_between_the_two_renames(source, tmp_path, monkeypatch):
    """--overwrite where folders cannot be swapped in one step: the old one comes back."""
    out = tmp_path / "out"
    convert_checkpoint(source, out, NSA)
    before = tree_hash(out)

    class Killed(BaseException):
        pass

    rename = Path.rename

    def dies(self, target):
        if ".nsa-staging" in self.name:
            raise Killed
        return rename(self, target)

    monkeypatch.setattr(staging, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", dies)
    with pytest.raises(Killed):
        convert_checkpoint(source, out, NSA, overwrite=True)
    assert not out.exists()
    monkeypatch.undo()
    with staging.staged(out) as folder:
        assert tree_hash(out) == before
        (folder / "config.json").write_text("{}")
    assert [path.name for path in tmp_path.glob("*out*")] == ["out"]
    assert list(tmp_path.glob(".nsa-*")) == []


def test_sv02_no_space(source, monkeypatch):
    usage = shutil.disk_usage(source)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused(source, "SV02", "needs", "are free", status=5, inspect=False)


def test_sv02_disk_really_full(source, tmp_path):
    """A file system of 2 MB: refused before writing; full in the middle, cleaned up."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], check=False)
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    try:
        error = error_of(run("convert", source, disk / "out", *METHOD, "--json"), 5)
        assert error["code"] == "SV02"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nsa_convert.convert.require_space", lambda *_: None)
            (disk / "ballast").write_bytes(bytes(2_000_000))
            error = error_of(run("convert", source, disk / "out", *METHOD, "--json"), 5)
        assert error["code"] == "SV03"
        assert "No space left" in error["message"]
        assert [path.name for path in disk.iterdir()] == ["ballast"]
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("limit", [2000, 9000])
def test_sv03_file_size_limit(source, limit):
    """RLIMIT_FSIZE stands for a full disk: writing fails in the middle."""
    before = snapshot(source.parent)

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    words = ("convert", source, source.parent / "out", *METHOD, "--copy", "--json")
    status, stdout, _ = forked(small_files, *words)
    assert (status, json.loads(stdout)["code"]) == (5, "SV03"), stdout
    assert json.loads(stdout)["hint"]
    assert snapshot(source.parent) == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_sv03_write_fails(source, monkeypatch, code):
    def fails(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("nsa_convert.checkpoint.new_weights.save_file", fails)
    refused(source, "SV03", os.strerror(code), status=5, inspect=False)


def test_sv05_overwrite_swaps(source, tmp_path, monkeypatch):
    """In one step: a reader never finds the place empty."""
    out, _ = converted(source)
    monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("OUT was away for a moment"))
    edit_json(out / "config.json", note="old")
    converted(source, "--overwrite")
    assert "note" not in json.loads((out / "config.json").read_text())
    assert check_manifest(out) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_sv05_overwrite_that_fails_keeps_the_old_one(source, monkeypatch):
    converted(source)

    def fails(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("nsa_convert.checkpoint.new_weights.save_file", fails)
    refused(source, "SV03", status=5, options=(*METHOD, "--overwrite"), inspect=False)


def test_sv06_leftovers_of_dead_runs(source, tmp_path):
    """Ours are removed by the next run for the same OUT; those of others stay."""
    (tmp_path / ".tmpABCDEF").write_text("someone else's")
    with staging.staged(tmp_path / "other") as folder:
        (folder / "kept").write_text("of another OUT")
        dead = folder.rename(tmp_path / "dead")
        folder.mkdir()
    shutil.rmtree(tmp_path / "other")

    class Killed(BaseException):
        pass

    def dies(*_, **__):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nsa_convert.checkpoint.staging.shutil.rmtree", lambda *_, **__: None)
        patch.setattr("nsa_convert.checkpoint.new_weights.save_file", dies)
        with pytest.raises(Killed):
            convert_checkpoint(source, tmp_path / "out", NSA)
    assert list(tmp_path.glob(".nsa-staging-*"))
    converted(source)
    assert list(tmp_path.glob(".nsa-*")) == []
    assert (tmp_path / ".tmpABCDEF").exists()
    assert (dead / "kept").exists()


def test_sv07_little_memory(source):
    """The weights are streamed: a limit of the address space just above what there is now is enough."""
    converted(source, out=source.parent / "warm")

    def little_memory():
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2**28,) * 2)

    status, _, stderr = forked(little_memory, "convert", source, source.parent / "out", *METHOD)
    assert status == 0, stderr


def test_sv07_out_of_memory(source):
    """A limit that not even one piece fits under: a large one, since a process keeps memory it freed."""

    def no_memory():
        scan.CHUNK_BYTES = 1 << 30
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2**18,) * 2)

    converted(source, out=source.parent / "warm")
    before = snapshot(source.parent)
    words = ("convert", source, source.parent / "out", *METHOD, "--json")
    status, stdout, _ = forked(no_memory, *words)
    assert (status, json.loads(stdout)["code"]) == (5, "SV07"), stdout
    assert snapshot(source.parent) == before


def test_sv08_same_bytes_every_time(source, tmp_path):
    """Another process, hash seed, working directory and thread count."""
    first, _ = converted(source)
    script = (
        "import sys; from pathlib import Path; from tests.test_convert import NSA, convert_checkpoint\n"
        "convert_checkpoint(sys.argv[1], Path('second'), NSA, threads=1)\n"
    )
    done = python(script, source, cwd=tmp_path, env={**ENVIRONMENT, "PYTHONHASHSEED": "7"})
    assert done.returncode == 0, done.stderr
    assert tree_hash(first) == tree_hash(tmp_path / "second")


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_sv09_files_have_the_mode_of_the_umask(source, mask, mode):
    """safetensors alone would make the new shard private."""
    before = os.umask(mask)
    try:
        out, _ = converted(source, "--copy")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in out.rglob("*") if path.is_file()}
    assert modes == {mode}
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~mask


def test_sv10_read_only_source(source):
    before = tree_hash(source)
    for path in source.iterdir():
        path.chmod(0o444)
    source.chmod(0o555)
    converted(source)
    source.chmod(0o755)
    assert tree_hash(source) == before


def test_sv12_save_load_save(source, tmp_path):
    """A converted model saved by transformers twice is the same, and tells nothing of this machine."""
    out, _ = converted(source)
    for before, after in ((out, tmp_path / "once"), (tmp_path / "once", tmp_path / "twice")):
        load_causal_model(before, torch.float32).save_pretrained(after)
    assert tree_hash(tmp_path / "once") == tree_hash(tmp_path / "twice")
    for folder in (out, tmp_path / "once"):
        texts = [
            path.read_bytes()
            for path in folder.rglob("*")
            if path.suffix != ".safetensors" and path.is_file()
        ]
        assert not any(str(tmp_path).encode() in text for text in texts)
    tensors = load_causal_model(tmp_path / "twice", torch.float32).state_dict()
    assert all(
        torch.equal(value, tensors[name])
        for name, value in load_causal_model(out, torch.float32).state_dict().items()
    )


def test_sv13_revert_gives_every_byte_back(source, tmp_path):
    (source / "README.md").write_text("a card\n")
    for copy in (False, True):
        convert_checkpoint(source, tmp_path / f"out{copy}", NSA, copy=copy)
        revert_checkpoint(tmp_path / f"out{copy}", tmp_path / f"back{copy}", copy=copy)
        assert tree_hash(tmp_path / f"back{copy}") == tree_hash(source)


def test_interrupt_leaves_nothing(source, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "out", NSA, progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_terminate_leaves_nothing(source, tmp_path):
    """SIGTERM to the command line: exit 143, staging removed."""
    script = (
        "import sys, time\n"
        "from nsa_convert.checkpoint import new_weights\n"
        "def slow(*_, **__): print('writing', flush=True); time.sleep(60)\n"
        "new_weights.save_file = slow\n"
        "from nsa_convert.cli import main\n"
        "main(['convert', sys.argv[1], sys.argv[2], '--method', 'nsa', '--set', 'num_blocks=4'])\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(source), str(tmp_path / "out")],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdout.readline() == "writing\n"
    child.send_signal(signal.SIGTERM)
    assert child.wait(20) == 143
    child.stdout.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.slow
def test_sv01_killed_a_hundred_times(source, tmp_path):
    tally = kill_conversions(source, tmp_path / "work", kills=100, seed=1)
    assert tally.lost == [], tally


@pytest.mark.slow
def test_ev09_killed_at_random_points(tmp_path):
    tally = kill_evaluations(save_pair(tmp_path)[1], tmp_path / "work", kills=30, seed=0)
    assert tally.lost == [], tally


def test_sv03_a_report_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "new/report.json"
    staging.write_whole(path, "old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NsaConvertError, match="No space left"):
        staging.write_whole(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]
