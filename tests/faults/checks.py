"""Inject a fault, run the command line, and check what every refusal has to keep."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from nsa_convert.cli import main
from tests.checkpoints import SETTINGS, edit_json, shard_paths

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
INDEX = "model.safetensors.index.json"
METHOD = [
    "--method",
    "nsa",
    *(word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")),
]


def run(*words: Any) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(main, [str(word) for word in words])


def python(script: str, *words: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own."""
    command = [sys.executable, "-c", script, *map(str, words)]
    return subprocess.run(
        command, **{"env": ENVIRONMENT, "capture_output": True, "text": True, "check": False, **options}
    )


def forked(prepare: Callable[[], object], *words: Any) -> tuple[int, str, str]:
    """Run the command line in a forked process, after ``prepare`` there; return status, stdout and stderr.

    A fork takes no seconds to import torch, and what ``prepare`` does, such as a limit, ends with it.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            prepare()
            result = run(*words)
            os.write(writer, json.dumps([result.exit_code, result.stdout, result.stderr]).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        content = pipe.read()
    _, status = os.waitpid(child, 0)
    assert content, f"the process died, status {status}"
    return tuple(json.loads(content))


def snapshot(folder: Path) -> dict[str, str]:
    """Return path -> what lies there: content, target of a link, or kind; nothing but files is opened."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            what = f"link to {os.readlink(path)}"
        elif stat.S_ISREG(mode):
            what = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            what = f"kind {stat.S_IFMT(mode)}"
        found[str(path.relative_to(folder))] = what
    return found


def converted(source: Path, *options: Any, out: Path | None = None) -> tuple[Path, dict[str, Any]]:
    """Convert through the command line; return the folder and the report."""
    out = out or source.parent / "out"
    result = run("convert", source, out, *METHOD, *options, "--json")
    assert result.exit_code == 0, result.stdout + result.stderr
    return out, json.loads(result.stdout)


def warned(source: Path, *told: str, options: tuple[Any, ...] = ()) -> Path:
    """Convert; one warning must hold all of ``told``."""
    out, report = converted(source, *options)
    assert any(all(part in line for part in told) for line in report["warnings"]), report["warnings"]
    return out


def refused(
    source: Path,
    code: str,
    *told: str,
    status: int = 3,
    options: tuple[Any, ...] = (*METHOD,),
    inspect: bool = True,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Convert (and inspect) a damaged source: refused, explained, and nothing changed on disk.

    Args:
        source: The damaged folder.
        code: Error code, of the error itself or of one of its problems.
        told: What the error must say somewhere.
        status: Exit status.
        options: Of ``convert``.
        inspect: Whether ``inspect`` has to refuse the folder too: its headers or config are wrong.
        seconds: CPU time for each command.

    Returns:
        What ``convert --json`` printed.
    """
    before = snapshot(source.parent)
    begin = time.process_time()
    result = run("convert", source, source.parent / "out", *options, "--json")
    assert seconds is None or time.process_time() - begin < seconds
    error = error_of(result, status)
    assert code in {error["code"], *(problem["code"] for problem in error["problems"])}, error
    text = " ".join(str(error[key]) for key in ("message", "where", "expected", "found", "hint"))
    assert [part for part in told if part not in text] == [], text
    if inspect:
        error_of(run("inspect", source, "--json"), status)
    assert snapshot(source.parent) == before
    return error


def error_of(result: Result, status: int) -> dict[str, Any]:
    """Return the one JSON object of a failed command; it says what to do, and there is no traceback."""
    assert result.exit_code == status, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    error = json.loads(result.stdout)
    assert error["exit"] == status
    assert error["hint"], error
    return error


def third(source: Path) -> Path:
    """Return the weight file that most tests damage."""
    return shard_paths(source)[2]


def edit_weight_map(source: Path, change: Any) -> None:
    weight_map = json.loads((source / INDEX).read_text())["weight_map"]
    change(weight_map)
    edit_json(source / INDEX, weight_map=weight_map)


def rename_in_index(source: Path, name: str) -> None:
    """Make the index call the third shard by another name."""
    old = third(source).name

    def rename(weight_map: dict[str, str]) -> None:
        weight_map.update({key: name for key, value in weight_map.items() if value == old})

    edit_weight_map(source, rename)


def edit_tensors(path: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def safetensors_bytes(
    table: Any, data: bytes = b"", *, raw: bytes | None = None, length: int | None = None
) -> bytes:
    """Return a file with this header; ``raw`` replaces its text, ``length`` what it says of its length."""
    head = json.dumps(table).encode() if raw is None else raw
    return (len(head) if length is None else length).to_bytes(8, "little") + head + data


def entry(start: int, end: int, shape: Any = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
