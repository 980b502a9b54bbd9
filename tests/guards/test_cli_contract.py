"""Commands, arguments and options are a contract: scripts and acceptance checks rely on them."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from nsa_convert.cli import main

ROOT = Path(__file__).parents[2]
COMMON = {"--json", "--debug", "--help"}

# command -> (arguments, options beside COMMON)
COMMANDS = {
    "bench": ([], {"--geometry", "--lengths", "--method", "--device", "--set", "--check", "--csv"}),
    "card": (["MODEL"], {"--license", "--base-model", "--name", "--out"}),
    "convert": (
        ["MODEL", "OUT"],
        {
            "--method",
            "--config",
            "--set",
            "--layers",
            "--profile",
            "--density",
            "--dry-run",
            "--dtype",
            "--revision",
            "--copy",
            "--overwrite",
            "--allow-extra-tensors",
            "--allow-pickle",
        },
    ),
    "doctor": ([], set()),
    "eval": (["MODEL"], {"--method", "--against", "--suite", "--set", "--plan", "--out"}),
    "explain": (["CODE"], set()),
    "generate": (
        ["MODEL"],
        {"--method", "--set", "--prompt", "--prompt-file", "--max-new-tokens", "--chat"},
    ),
    "inspect": (["MODEL"], {"--method", "--context", "--measure", "--set"}),
    "methods": ([], set()),
    "push": (
        ["MODEL", "REPO"],
        {"--private", "--public", "--dry-run", "--allow-unverified", "--allow-unevaluated"},
    ),
    "recipes": (["ACTION", "NAME"], set()),
    "revert": (["OUT", "DENSE"], {"--copy", "--overwrite"}),
    "train": (
        ["RECIPE"],
        {
            "--set",
            "--resume",
            "--dry-run",
            "--allow-partial-resume",
            "--allow-data-change",
            "--allow-eager-fallback",
        },
    ),
    "verify": (["OUT"], {"--against", "--trust-remote-code"}),
}


def options_of(command: click.Command) -> set[str]:
    """Return every long option of a command, ``--help`` included, secondary names (``--no-x``) too."""
    options = [p for p in command.params if isinstance(p, click.Option)]
    names = {name for p in options for name in (*p.opts, *p.secondary_opts)}
    return {name for name in names if name.startswith("--")} | {"--help"}


def arguments_of(command: click.Command) -> list[str]:
    return [p.human_readable_name for p in command.params if isinstance(p, click.Argument)]


def run(*words: str) -> tuple[subprocess.CompletedProcess, float]:
    """Run the command line in a fresh interpreter; return the result and the seconds it took."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "nsa_convert.cli", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done, time.perf_counter() - begin


def test_commands():
    assert set(main.commands) == set(COMMANDS)


@pytest.mark.parametrize(("name", "arguments", "options"), [(name, *rest) for name, rest in COMMANDS.items()])
def test_arguments_and_options(name, arguments, options):
    command = main.commands[name]
    assert arguments_of(command) == arguments
    assert options_of(command) == options | COMMON


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_does(name):
    silent = [p.name for p in main.commands[name].params if isinstance(p, click.Option) and not p.help]
    assert silent == []
    assert main.commands[name].get_short_help_str()


def test_help_is_fast_and_imports_no_torch():
    runs = [run("--help") for _ in range(3)]
    for done, _ in runs:
        assert done.returncode == 0
        assert all(name in done.stdout for name in COMMANDS)
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert imported & {"torch", "transformers", "numpy", "huggingface_hub", "rich"} == set()
    assert statistics.median(seconds for _, seconds in runs) < 0.5


def test_option_reader_sees_a_change():
    @click.command()
    @click.argument("model")
    @click.option("--color/--no-color", "-c")
    def command(model: str, color: bool) -> None: ...

    assert options_of(command) == {"--color", "--no-color", "--help"}
    assert arguments_of(command) == ["MODEL"]
