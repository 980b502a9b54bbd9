"""Damaged versions of a small checkpoint and of a recipe, drawn by hypothesis, and what holds for each."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from tests.checkpoints import SETTINGS
from tests.faults.checks import INDEX, METHOD, run, snapshot

SHARD = "model-00003-of-00010.safetensors"
JSON_FILES = (
    "config.json",
    INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
)
RECIPE = "recipe.yaml"
SECONDS = 2.0

ODD_VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    2**31,
    2**63,
    10**400,
    0.5,
    -1e308,
    1e-320,
    "",
    "1",
    "null",
    "../../x",
    "/etc/passwd",
    "..\\x",
    "a\0b",
    "\ud800",
    "é" * 300,
    "nsa",
    "full_attention",
    "F32",
    "BF16",
    [],
    {},
    [[]],
    [0, 0],
    [0, 2**62],
    [-1, 1],
    [None],
    {"": 0},
    {"method": "nsa"},
)
ODD_KEYS = ("", "a", "model_type", "default", "rules", "method", "layers", "heads", "__metadata__", "\ud800")


@st.composite
def mutations(draw: st.DrawFn, pristine: Mapping[str, bytes]) -> dict[str, bytes]:
    """Draw one to three damaged files: file name -> content."""
    names = draw(st.lists(st.sampled_from([*JSON_FILES, SHARD, RECIPE]), min_size=1, max_size=3, unique=True))
    return {name: draw(_content(name, pristine[name])) for name in names}


def _content(name: str, content: bytes) -> st.SearchStrategy[bytes]:
    structured = _header(content) if name == SHARD else _document(name, content)
    return st.one_of(structured, structured, _bytes(content))


@st.composite
def _bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Change, cut, repeat or insert bytes."""
    damaged = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(damaged) - 1)))
        length = draw(st.sampled_from((1, 2, 8, 64, 4096)))
        kind = draw(st.sampled_from(("replace", "insert", "delete", "repeat", "cut", "flip")))
        if kind == "replace":
            damaged[at : at + length] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "insert":
            damaged[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "delete":
            del damaged[at : at + length]
        elif kind == "repeat":
            damaged[at:at] = damaged[at : at + length] * draw(st.integers(1, 50))
        elif kind == "cut":
            del damaged[at:]
        elif damaged:
            damaged[at] ^= 1 << draw(st.integers(0, 7))
    return bytes(damaged)


@st.composite
def _document(draw: st.DrawFn, name: str, content: bytes) -> bytes:
    value = yaml.safe_load(content) if name == RECIPE else json.loads(content)
    value = draw(_changed(value))
    if name == RECIPE:
        return yaml.safe_dump(value, sort_keys=False).encode("utf-8", "surrogatepass")
    return _json_text(draw, value)


@st.composite
def _header(draw: st.DrawFn, content: bytes) -> bytes:
    """Change the header of a weight file, its length agreeing or not."""
    length = int.from_bytes(content[:8], "little")
    head = _json_text(draw, draw(_changed(json.loads(content[8 : 8 + length]))))
    stated = draw(st.sampled_from((len(head), len(head), len(head), len(head) + 1, 0, 2**40, 2**63)))
    return stated.to_bytes(8, "little") + head + content[8 + length :]


def _json_text(draw: st.DrawFn, value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=draw(st.booleans()))
    if draw(st.integers(0, 9)) == 0:
        text = text.replace(":", f": {draw(st.sampled_from(('NaN', '1e999', '-', '9' * 5000, '{')))},", 1)
    return text.encode("utf-8", "surrogatepass")


@st.composite
def _changed(draw: st.DrawFn, value: Any) -> Any:
    """Replace, remove, copy or add one to four values anywhere in a document."""
    root = {"": copy.deepcopy(value)}
    for _ in range(draw(st.integers(1, 4))):
        place: Any = root
        key: Any = ""
        for _ in range(draw(st.integers(0, 4))):
            inner = place[key]
            if not isinstance(inner, (dict, list)) or not inner:
                break
            keys = list(inner) if isinstance(inner, dict) else range(len(inner))
            place, key = inner, draw(st.sampled_from(list(keys)))
        kind = draw(st.sampled_from(("odd", "odd", "remove", "add", "wrap", "double")))
        if kind == "odd" or place is root:
            place[key] = copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))
        elif kind == "remove":
            del place[key]
        elif kind == "add" and isinstance(place, dict):
            place[draw(st.sampled_from(ODD_KEYS))] = copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))
        elif kind == "wrap":
            place[key] = [place[key]]
        elif isinstance(place, list):
            place.append(copy.deepcopy(place[key]))
        if root[""] is None:
            break
    return root[""]


def pristine_files(source: Path) -> dict[str, bytes]:
    """Return the files that are damaged, a recipe among them."""
    plan = {
        "base_model": {"id": "x"},
        "sparse_attention": {
            "default": {"method": "nsa", **SETTINGS},
            "rules": [
                {"method": "ssa", "layers": [0], "heads": [0], "block_size": 8, "num_blocks": 4},
                {"method": "full", "layers": [-1]},
            ],
        },
    }
    files = {name: (source / name).read_bytes() for name in (*JSON_FILES, SHARD)}
    return {**files, RECIPE: yaml.safe_dump(plan, sort_keys=False).encode()}


def check_mutation(source: Path, files: Mapping[str, bytes], pristine: Mapping[str, bytes]) -> list[int]:
    """Put the damaged files in place, run both commands, and put the files back.

    Returns:
        The exit statuses.

    Raises:
        AssertionError: An exit status beside 0 and 3, a traceback, more than SECONDS of CPU time, or a file
            that was not there before.
    """
    recipe = source.parent / RECIPE
    for name, content in files.items():
        (recipe if name == RECIPE else source / name).write_bytes(content)
    plan = ["--config", recipe] if RECIPE in files else METHOD
    before = snapshot(source.parent)
    statuses = []
    try:
        for words in (["inspect", source], ["convert", source, source.parent / "out", *plan, "--dry-run"]):
            begin = time.process_time()
            result = run(*words)
            seconds = time.process_time() - begin
            told = f"{words[0]}: exit {result.exit_code} in {seconds:.2f} s: {result.stderr}"
            assert result.exit_code in {0, 3}, told
            assert "Traceback" not in result.stderr + result.stdout, told
            assert seconds < SECONDS, told
            statuses.append(result.exit_code)
        assert snapshot(source.parent) == before, "a file was written"
    finally:
        for name in files:
            if name != RECIPE:
                (source / name).write_bytes(pristine[name])
        recipe.unlink(missing_ok=True)
    return statuses
