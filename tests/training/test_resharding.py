"""A run that goes on with another number of processes, or with other ways to share the work."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.training.processes import SHARDED
from tests.training.recipes import NSA, losses, recipe_values, stage
from tests.training.test_parallel_runs import LIMIT, LORA, MODEL, train_together

SLOW = pytest.mark.slow
ROWS = {"batch_tokens": 4 * 32, "tokens": 5 * 4 * 32}
"""Four rows in each of five steps: as many as processes in the largest of these runs."""
STAGES = {"all": stage(**ROWS), "lora": {**LORA, **ROWS}}
CHANGES = {
    "fsdp 2, one": ("all", (2, {"fsdp": 2}), (1, {})),
    "one, fsdp 2": ("all", (1, {}), (2, {"fsdp": 2})),
    "fsdp 2, fsdp 4": ("all", (2, {"fsdp": 2}), (4, {"fsdp": 4})),
    "rows 2, fsdp 4 and context 2": ("all", (2, {}), (4, {"fsdp": 4, "context": 2})),
    "tensor 2, fsdp 2": ("all", (2, {"tensor": 2}), (2, {"fsdp": 2})),
    "context 2, one": ("all", (2, {"context": 2}), (1, {})),
    "lora, fsdp 2, one": ("lora", (2, {"fsdp": 2}), (1, {})),
    "lora, one, fsdp 2": ("lora", (1, {}), (2, {"fsdp": 2})),
}
"""What is trained, and the processes with their keys before and after the stop."""


def values(out: Path, case: str, keys: dict[str, Any]) -> dict[str, Any]:
    # Four processes share the rows of tied embeddings.
    model = {**copy.deepcopy(MODEL), "vocab": 260}
    return recipe_values(out, NSA, copy.deepcopy(STAGES[case]), model=model, **keys)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Return the folder of all runs and a whole one of each case; one launch for each number of processes."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("runs")

    # Each is stopped after its third step, then goes on.
    for part, stop in ((1, 2), (2, None)):
        jobs: dict[int, list[dict[str, Any]]] = {}
        for name, (case, *how) in CHANGES.items():
            count, keys = how[part - 1]
            recipe = values(folder / name, case, keys)
            jobs.setdefault(count, []).append({"recipe": recipe, "stop_at": stop, "resume": part == 2})
        if part == 1:
            whole = [
                {"recipe": values(folder / case, case, {}), "stop_at": None, "resume": False}
                for case in STAGES
            ]
            jobs[1] += whole
        for count, some in jobs.items():
            train_together(folder / f"{part} {count}", some, count)
        if part == 1:
            assert {len(losses(folder / name)) for name in CHANGES} == {3}
    return folder


@SLOW
@SHARDED
@pytest.mark.parametrize("name", CHANGES)
def test_a_run_goes_on_with_other_processes(name, runs):
    out, whole = runs / name, runs / CHANGES[name][0]

    # The same rows: the loss of a step on any other row is another one.
    found, want = losses(out), losses(whole)
    assert [row[:2] for row in found] == [row[:2] for row in want]
    assert max(abs(x[2] - y[2]) for x, y in zip(found, want, strict=True)) < LIMIT
    assert len({row[2] for row in want}) == len(want)

    a, b = (load_file(folder / "pretrain" / "model" / "model.safetensors") for folder in (out, whole))
    assert a.keys() == b.keys()
    assert max((a[key] - b[key]).abs().max().item() for key in a) < LIMIT
