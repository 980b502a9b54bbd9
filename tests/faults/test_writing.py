"""Failures while writing: OUT is absent or complete, the source is as it was, nothing is left behind."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nsa_convert.convert import convert_checkpoint
from nsa_convert.errors import NsaConvertError
from nsa_convert.patch import staging
from nsa_convert.patch.manifest import check_manifest
from nsa_convert.verification import revert_checkpoint
from tests.checkpoints import tree_hash
from tests.test_convert import NSA

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def refused(code: str, status: int, source: Path, out: Path, **options) -> NsaConvertError:
    before = tree_hash(source)
    with pytest.raises(NsaConvertError) as caught:
        convert_checkpoint(source, out, NSA, **options)
    assert (caught.value.code, caught.value.exit_status) == (code, status), str(caught.value)
    assert tree_hash(source) == before
    assert list(out.parent.glob(".nsa-*")) == []
    return caught.value


def test_sv01_killed_at_random_points(source, tmp_path):
    """SIGKILL leaves OUT absent or complete; the next run for that OUT clears the rest."""
    before = tree_hash(source)
    script = (
        "import sys; from pathlib import Path; from tests.test_convert import NSA, convert_checkpoint\n"
        "print('ready', flush=True)\n"
        "for i in range(100):\n"
        "    convert_checkpoint(sys.argv[1], Path(sys.argv[2]) / f'out{i}', NSA, copy=True)\n"
    )
    work = tmp_path / "work"
    delays = random.Random(0)
    for _ in range(4):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        child = subprocess.Popen(
            [sys.executable, "-c", script, str(source), str(work)], env=ENVIRONMENT, stdout=subprocess.PIPE
        )
        child.stdout.readline()
        time.sleep(delays.uniform(0.05, 1.0))
        child.kill()
        child.wait()
        child.stdout.close()
        finished = len(list(work.glob("out*")))
        assert all(check_manifest(out) == [] for out in work.glob("out*"))
        convert_checkpoint(source, work / f"out{finished}", NSA, copy=True)
        assert check_manifest(work / f"out{finished}") == []
        assert list(work.glob(".nsa-*")) == []
    assert tree_hash(source) == before


def test_sv01_killed_between_the_two_renames(source, tmp_path, monkeypatch):
    """--overwrite: the old folder comes back when the new one did not get its place."""
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


def test_sv02_no_space(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    error = refused("SV02", 5, source, tmp_path / "out")
    assert "are free" in error.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("limit", [2000, 9000])
def test_sv03_file_size_limit(source, tmp_path, limit):
    """RLIMIT_FSIZE stands for a full disk: writing fails in the middle."""
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from nsa_convert.errors import NsaConvertError\n"
        "from tests.test_convert import NSA, convert_checkpoint\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "try: convert_checkpoint(sys.argv[1], sys.argv[2], NSA, copy=True)\n"
        "except NsaConvertError as error: print(error.code, error.exit_status)\n"
    )
    before = tree_hash(source)
    done = subprocess.run(
        [sys.executable, "-c", script, str(source), str(tmp_path / "out")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["SV03", "5"], done.stderr
    assert tree_hash(source) == before
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".nsa-*")) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_sv03_write_fails(source, tmp_path, monkeypatch, code):
    def fails(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("nsa_convert.patch.new_weights.save_file", fails)
    refused("SV03", 5, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sv04_overlapping_places(source, tmp_path):
    refused("SV04", 2, source, source)
    refused("SV04", 2, source, source / "inside")
    refused("SV04", 2, source, source.parent)
    (tmp_path / "link").symlink_to(source)
    refused("SV04", 2, source, tmp_path / "link")


def test_sv05_taken(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("x")
    refused("SV05", 2, source, out)
    refused("SV05", 2, source, out, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["precious.txt"]
    (tmp_path / "file").write_text("x")
    refused("SV05", 2, source, tmp_path / "file", overwrite=True)


def test_empty_folder_is_free(source, tmp_path):
    (tmp_path / "out").mkdir()
    convert_checkpoint(source, tmp_path / "out", NSA)
    assert check_manifest(tmp_path / "out") == []


def test_sv06_only_own_leftovers_are_removed(source, tmp_path):
    (tmp_path / ".tmpABCDEF").write_text("someone else's")
    convert_checkpoint(source, tmp_path / "out", NSA)
    assert (tmp_path / ".tmpABCDEF").exists()


def test_sv07_little_memory(source, tmp_path):
    """The weights are streamed: a limit of the address space just above what the imports take is enough."""
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from tests.test_convert import NSA, convert_checkpoint\n"
        "convert_checkpoint(sys.argv[1], sys.argv[2] + '1', NSA)\n"
        "size = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + 2**28,) * 2)\n"
        "convert_checkpoint(sys.argv[1], sys.argv[2] + '2', NSA)\n"
    )
    command = [sys.executable, "-c", script, str(source), str(tmp_path / "out")]
    subprocess.run(command, env=ENVIRONMENT, check=True)


def test_sv10_read_only_source(source, tmp_path):
    before = tree_hash(source)
    for path in source.iterdir():
        path.chmod(0o444)
    source.chmod(0o555)
    convert_checkpoint(source, tmp_path / "out", NSA)
    source.chmod(0o755)
    assert tree_hash(source) == before


def test_sv13_revert_gives_every_byte_back(source, tmp_path):
    (source / "README.md").write_text("a card\n")
    for copy in (False, True):
        convert_checkpoint(source, tmp_path / f"out{copy}", NSA, copy=copy)
        revert_checkpoint(tmp_path / f"out{copy}", tmp_path / f"back{copy}", copy=copy)
        assert tree_hash(tmp_path / f"back{copy}") == tree_hash(source)


def test_sv15_no_permission(source, tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path))

    monkeypatch.setattr(Path, "mkdir", denied)
    refused("SV15", 5, source, tmp_path / "out")


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
        "from nsa_convert.patch.staging import staged\n"
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
        "from nsa_convert.patch import new_weights\n"
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
