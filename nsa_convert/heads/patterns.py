"""MInference's head files: which pattern each query head has, read into a plan and written from one.

The published files are a JSON list with an object per layer, ``{"0": [pattern, first, second, score], ...}``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nsa_convert.config import LayerRule, SparseAttentionConfig
from nsa_convert.errors import ConfigError
from nsa_convert.methods.minference import head_problems
from nsa_convert.settings import raise_problems
from nsa_convert.strict_files import parse_json

FILE_LIMIT = 16 << 20
"""Bytes of a head file; the published ones have less than 100 kB."""

HeadPattern = tuple[str, int, int]


def is_head_file(path: Path) -> bool:
    """Return whether a file holds a JSON list, as head files do."""
    try:
        with path.open("rb") as file:
            return file.read(4096).lstrip().startswith(b"[")
    except OSError:  # why: a file that cannot be read is refused where it is read
        return False


def read_head_file(path: Path) -> SparseAttentionConfig:
    """Read a head file into a plan with one rule for each run of layers with the same heads.

    Raises:
        ConfigError: It is too big or not such a file; every problem is named.
        CheckpointError: It is not JSON.
    """
    if path.stat().st_size > FILE_LIMIT:
        raise ConfigError(f"{path} has more than {FILE_LIMIT:,} bytes", code="CF22", where=str(path))

    layers = parse_json(path.read_bytes(), path.name)

    problems = []
    patterns = []
    for number, heads in enumerate(layers if isinstance(layers, list) else []):
        # Heads are numbered from 0 without a gap.
        names = sorted(heads, key=_number) if isinstance(heads, dict) else []
        if not names or [_number(name) for name in names] != list(range(len(names))):
            problems.append(f"layer {number}: expected an object with the query heads 0, 1, ..., got {names}")
            continue

        # Of each entry the pattern and its two numbers; the score of the search is not needed.
        row = []
        for name in names:
            entry = heads[name]
            head = tuple(entry[:3]) if isinstance(entry, list) else entry
            problems += [f"layer {number}, head {name}: {problem}" for problem in head_problems(head)]
            row.append(head)

        patterns.append(row)

    if not problems and not patterns:
        problems.append("expected a list with one object per layer")
    raise_problems(problems, code="CF22", hint="MInference's files say which pattern each query head has")

    return plan_of_patterns(patterns)


def plan_of_patterns(patterns: Sequence[Sequence[HeadPattern]]) -> SparseAttentionConfig:
    """Return the plan in which every layer has the patterns of its query heads.

    Args:
        patterns: ``[L][HQ]``.
    """
    # Join neighbouring layers with the same heads.
    runs: list[tuple[list[int], list[list[Any]]]] = []
    for layer, heads in enumerate(patterns):
        listed = [list(head) for head in heads]
        if runs and runs[-1][1] == listed:
            runs[-1][0].append(layer)
        else:
            runs.append(([layer], listed))

    rules = tuple(
        LayerRule(method="minference", settings={"head_patterns": heads}, layers=tuple(layers))
        for layers, heads in runs
    )
    return SparseAttentionConfig(default=LayerRule(method="minference"), rules=rules)


def write_head_file(
    path: Path, patterns: Sequence[Sequence[HeadPattern]], scores: Sequence[Sequence[float]]
) -> None:
    """Write patterns ``[L][HQ]`` with their scores in the published form."""
    layers = [
        {str(i): [*head, score] for i, (head, score) in enumerate(zip(heads, row, strict=True))}
        for heads, row in zip(patterns, scores, strict=True)
    ]
    # why: head patterns in their published form, where the caller asks
    path.write_text(json.dumps(layers, indent=1) + "\n", encoding="utf-8")


def _number(name: str) -> int:
    return int(name) if name.isdigit() else -1
