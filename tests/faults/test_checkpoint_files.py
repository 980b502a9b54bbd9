"""Weight files that are damaged, not what they seem, or not where they should be."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.checkpoints import shard_paths
from tests.faults.checks import (
    converted,
    entry,
    python,
    refused,
    rename_in_index,
    safetensors_bytes,
    snapshot,
    third,
)


def test_ck01_empty_shard(source):
    os.truncate(third(source), 0)
    refused(source, "CK01", third(source).name, "0 bytes", "download is incomplete")


@pytest.mark.parametrize("keep", ["half", "all but one"])
def test_ck02_shard_cut_off(source, keep):
    size = third(source).stat().st_size
    left = size // 2 if keep == "half" else size - 1
    os.truncate(third(source), left)
    refused(source, "CK02", third(source).name, f"{size:,} bytes", f"{left:,} bytes")


def test_ck02_cut_inside_the_header(source):
    os.truncate(third(source), 20)
    refused(source, "CK02", "inside its header", "20 bytes")


def test_ck03_trailing_byte(source):
    size = third(source).stat().st_size
    with third(source).open("ab") as file:
        file.write(b"x")
    refused(source, "CK03", "1 bytes after its last tensor", f"{size:,} bytes", f"{size + 1:,} bytes")


CK04 = {
    "2^63": (safetensors_bytes({}, bytes(100), length=2**63), f"{2**63:,} bytes"),
    "seven bytes": (bytes(7), "7 bytes"),
    "90 MB": (safetensors_bytes(None, raw=b'{"a":[' + b"[]," * 29_999_990), "89,999,976 bytes"),
    "30 MB of lists": (safetensors_bytes(None, raw=b'{"a":[' + b"[]," * 9_999_990), "values"),
    "deep": (safetensors_bytes(None, raw=b'{"a":' + b"[" * 100_000), "nested too deeply"),
}


@pytest.mark.parametrize(("content", "told"), CK04.values(), ids=CK04)
def test_ck04_impossible_header(source, content, told):
    third(source).write_bytes(content)
    refused(source, "CK04", third(source).name, told, seconds=1)


def test_ck04_many_large_headers(source):
    """Each is small enough, together they are not."""
    names = [f'"{i:0500000d}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(30)]
    content = safetensors_bytes(None, raw=("{" + ",".join(names) + "}").encode())
    for path in shard_paths(source)[:3]:
        path.write_bytes(content)
    refused(source, "CK04", "together", "at most 32,000,000 bytes", seconds=2)


def test_ck04_takes_little_memory(tmp_path):
    """Small lists take thirty times the memory of their text, so their number is looked at first."""
    path = tmp_path / "model.safetensors"
    script = (
        "import re, sys; from pathlib import Path\n"
        "from nsa_convert.errors import CheckpointError\n"
        "from nsa_convert.checkpoint.headers import read_header\n"
        "for path in sys.argv[1:]:\n"
        "    try: read_header(Path(path)); print('accepted')\n"
        "    except CheckpointError as error: print(error.code)\n"
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) // 1024)\n"
    )
    keys = b"{" + b",".join(b'"%057d":1' % number for number in range(490_000)) + b"}"
    contents = [CK04["90 MB"][0], CK04["30 MB of lists"][0], safetensors_bytes(None, raw=keys)]
    paths = [path.with_name(f"{number}.safetensors") for number in range(len(contents))]
    for place, content in zip(paths, contents, strict=True):
        place.write_bytes(content)
    done = python(script, *paths)
    assert done.stdout.split()[:3] == ["CK04", "CK04", "CK05"], done.stderr
    assert int(done.stdout.split()[3]) < 500


CK05 = {
    "not UTF-8": (safetensors_bytes(None, raw=b'{"\xff": 1}'), "not UTF-8"),
    "not JSON": (safetensors_bytes(None, raw=b'{"a": '), "not valid JSON"),
    "leading space": (safetensors_bytes(None, raw=b' {"a": 1}'), "does not start with '{'"),
    "list": (safetensors_bytes(None, raw=b"[]"), "does not start with '{'"),
    "no offsets": (safetensors_bytes({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "data_offsets"),
    "metadata": (safetensors_bytes({"__metadata__": 1}), "__metadata__"),
}


@pytest.mark.parametrize(("content", "told"), CK05.values(), ids=CK05)
def test_ck05_header_that_is_no_json(source, content, told):
    third(source).write_bytes(content)
    refused(source, "CK05", third(source).name, told)


CK06 = {
    "tensor twice": b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
    b'"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
    "dtype twice": b'{"a":{"dtype":"U8","dtype":"I8","shape":[2],"data_offsets":[0,2]}}',
    "NaN": b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,2]}}',
    "infinite": b'{"a":{"dtype":"U8","shape":[1e999],"data_offsets":[0,2]}}',
    "half a character": b'{"\\ud800":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
}


@pytest.mark.parametrize("raw", CK06.values(), ids=CK06)
def test_ck06_name_listed_twice(source, raw):
    third(source).write_bytes(safetensors_bytes(None, bytes(2), raw=raw))
    refused(source, "CK06", third(source).name)


CK07 = {
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "overlaps"),
    "gap": ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "gap"),
    "negative": ({"a": entry(-8, 0)}, 8, "whole numbers"),
    "backwards": ({"a": entry(8, 0)}, 8, "offsets span"),
    "shape does not fit": ({"a": entry(0, 8, (3,))}, 8, "12 bytes"),
    "overflow": ({"a": entry(0, 8, (2**40, 2**40))}, 8, "bytes"),
    "float": ({"a": entry(0, 8, (2.0,))}, 8, "whole numbers"),
    "true": ({"a": entry(0, 4, (True,))}, 4, "whole numbers"),
}


@pytest.mark.parametrize(("table", "size", "told"), CK07.values(), ids=CK07)
def test_ck07_impossible_offsets(source, table, size, told):
    third(source).write_bytes(safetensors_bytes(table, bytes(size)))
    refused(source, "CK07", third(source).name, told)


def test_ck08_git_lfs_pointer(source):
    third(source).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(source, "CK08", third(source).name, "Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"<!DOCTYPE html><html>404</html>", "HTML"), (b'{"error": "not found"}', "JSON error message")],
)
def test_ck09_error_page(source, content, told):
    third(source).write_bytes(content)
    refused(source, "CK09", third(source).name, told, "again")


@pytest.mark.parametrize("missing", [(2,), (1, 3, 5)])
def test_ck10_missing_shards_are_all_named(source, missing):
    paths = [shard_paths(source)[number] for number in missing]
    for path in paths:
        path.unlink()
    error = refused(source, "CK10", *(path.name for path in paths), "missing")
    assert len(error["problems"]) == (len(paths) if len(paths) > 1 else 0)


def outside(source: Path, name: str) -> None:
    """Put the shard outside of the folder and let the index lead there."""
    shutil.copy(third(source), source.parent / "evil.safetensors")
    rename_in_index(source, name)


def test_ck11_index_leads_to_the_parent(source):
    outside(source, "../evil.safetensors")
    refused(source, "CK11", "'../evil.safetensors'", "leaves the checkpoint directory")


def test_ck12_index_with_an_absolute_path(source):
    outside(source, str(source.parent / "evil.safetensors"))
    refused(source, "CK12", "leaves the checkpoint directory")


@pytest.mark.parametrize(
    "name", ["x\\evil", "x/evil", "x\nevil", "x\0evil", "con.safetensors", "", ".", "a?b", "x" * 300]
)
def test_ck13_index_with_a_name_that_is_none(source, name):
    outside(source, name)
    refused(source, "CK13", "is not a plain file name", repr(name))


def test_ck13_backslashes_to_the_parent(source):
    outside(source, "..\\evil")
    refused(source, "CK11", "leaves the checkpoint directory")


def test_ck14_symlink_to_the_outside(source):
    third(source).rename(source.parent / "elsewhere.safetensors")
    (source / "model-00003-of-00010.safetensors").symlink_to(source.parent / "elsewhere.safetensors")
    refused(source, "CK14", "model-00003-of-00010.safetensors", "elsewhere", "symlink that leaves")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.json"])
def test_ck14_other_files_may_not_lead_outside_either(source, name):
    (source / name).rename(source.parent / "elsewhere")
    (source / name).symlink_to(source.parent / "elsewhere")
    refused(source, "CK14", name, "symlink that leaves")


def test_ck15_symlink_loop(source):
    name = third(source).name
    third(source).unlink()
    (source / name).symlink_to(name)
    refused(source, "CK15", name, "leads back to itself")


def test_ck15_symlink_to_nothing(source):
    name = third(source).name
    third(source).unlink()
    (source / name).symlink_to("nothing")
    refused(source, "CK15", name, "leads nowhere")


def hub_cache(source: Path) -> Path:
    """Lay a checkpoint out as the Hub's cache does: links to blobs that are called by their hash."""
    cache = source.parent / "models--x--y"
    cached, blobs = cache / "snapshots/abc", cache / "blobs"
    cached.mkdir(parents=True)
    blobs.mkdir()
    for name, digest in snapshot(source).items():
        shutil.copy(source / name, blobs / digest)
        (cached / name).symlink_to(Path("../../blobs") / digest)
    return cached


def test_ck16_hub_cache(source):
    cached = hub_cache(source)
    before = snapshot(cached.parents[1])
    out, _ = converted(cached, out=source.parent / "out")
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert snapshot(cached.parents[1]) == before


def test_ck17_pipe_is_never_opened(source):
    name = third(source).name
    third(source).unlink()
    os.mkfifo(source / name)
    refused(source, "CK17", name, "a pipe, socket or device", seconds=2)


def test_ck18_folder_as_a_shard(source):
    name = third(source).name
    third(source).unlink()
    (source / name).mkdir()
    refused(source, "CK18", name, "a directory", "a regular file")


def test_ck19_shard_without_read_permission(source):
    """As another user, since root may read everything; modules are loaded before the change of user."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    for path in source.iterdir():
        path.chmod(0o644)
    third(source).chmod(0)
    for path in (source, *source.parents):
        if path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
    script = (
        "import os, sys; from nsa_convert.cli import main\n"
        "try: main(['inspect', sys.argv[2], '--json'])\n"
        "except SystemExit: pass\n"
        "sys.stdout.flush(); os.setgid(65534); os.setuid(65534)\n"
        "print(); main(['inspect', sys.argv[1], '--json'])\n"
    )
    other = shutil.copytree(source, source.parent / "readable", copy_function=shutil.copyfile)
    done = python(script, source, other)
    assert done.returncode == 5, done.stderr
    assert '"code": "CK19"' in done.stdout.splitlines()[-1]
    assert third(source).name in done.stdout.splitlines()[-1]
    assert "chmod u+r" in done.stdout.splitlines()[-1]
