"""Every preset of recipes/accelerate starts a run as its head says, which learns what one process learns.

On a CPU the processes talk by gloo. Two are started where the files say eight; nothing else is changed.
"""

from __future__ import annotations

import shlex

import pytest

from tests.published.pages import ROOT
from tests.published.places import run_command, two_processes, write_recipe
from tests.training.recipes import losses

PRESETS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))


def head_command(path) -> str:
    """Return the one command in the head of a preset."""
    (line,) = (line for line in path.read_text().splitlines() if line.startswith("#   "))
    return line.removeprefix("#   ")


@pytest.mark.slow
def test_presets_train_what_one_process_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    write_recipe(tmp_path)
    run_command(["nsa-convert", "train", "RECIPE", "--set", "out=one"])
    for path in PRESETS:
        run_command([*two_processes(shlex.split(head_command(path))), "--set", f"out={path.stem}"])
        pairs = list(zip(losses(tmp_path / path.stem), losses(tmp_path / "one"), strict=True))
        assert [a[:2] for a, _ in pairs] == [b[:2] for _, b in pairs]
        assert max(abs(a[2] - b[2]) for a, b in pairs) < 1e-5, path.stem


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_names_itself(path):
    words = shlex.split(head_command(path))
    assert words[:4] == ["accelerate", "launch", "--config_file", f"recipes/accelerate/{path.name}"]
    assert "num_processes: 8" in path.read_text()
    assert all(word.endswith("=8") for word in words if word.startswith(("fsdp=", "context=", "tensor=")))
