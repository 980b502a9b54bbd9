from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from nsa_convert.cli import main
from nsa_convert.cli.options import parse_layers, parse_settings, read_plan
from nsa_convert.error_codes import ERROR_CODES, EXIT_STATUS, render_markdown
from nsa_convert.errors import ConfigError, UsageError
from nsa_convert.methods.parts.registry import METHODS
from tests.checkpoints import tree_hash, write_dense

ROOT = Path(__file__).parents[1]
SETTINGS = [
    "--set",
    "block_size=8",
    "--set",
    "num_blocks=4",
    "--set",
    "compression_block=8",
    "--set",
    "compression_stride=4",
    "--set",
    "window_size=8",
]
JSON_ERROR = {"schema", "ok", "code", "exit", "message", "where", "expected", "found", "hint", "problems"}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense") / "model")


def run(*words: str):
    return CliRunner().invoke(main, [str(word) for word in words])


def process(*words: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, "-m", "nsa_convert.cli", *map(str, words)]
    return subprocess.run(command, env=env, capture_output=True, stdin=subprocess.DEVNULL, check=False)


def test_cl01_no_arguments_show_help():
    result = run()
    assert result.exit_code == 0
    assert "convert" in result.stdout


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["conver"], "did you mean 'convert'"),
        (["convert", "a", "b", "--metod", "nsa"], "--method"),
        (["convert"], "MODEL"),
        (["inspect", "x", "--context", "8k"], "--context"),
        (["eval", "x", "--suite", "huge"], "quick"),
        (["explain", "CK99"], "CK"),
        (["convert", "x", "y"], "--method"),
        (["convert", "x", "y", "--method", "nsa", "--layers", "3-1"], "--layers"),
        (["convert", "x", "y", "--method", "nsa", "--set", "block_size"], "key=value"),
        (["generate", "x"], "--prompt"),
        (["generate", "x", "--prompt", "a", "--max-new-tokens", "-1"], "--max-new-tokens"),
    ],
)
def test_cl02_cl03_usage(words, text):
    result = run(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert text in result.stderr
    assert "Traceback" not in result.stderr


def test_convert_verify_revert(source, tmp_path):
    out, dense = tmp_path / "out", tmp_path / "dense"
    result = run("convert", source, out, "--method", "nsa", *SETTINGS, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["schema"], report["ok"], report["dense_until"]) == (1, True, 32)
    result = run("verify", out, "--against", source, "--json")
    assert result.exit_code == 0, result.stderr
    assert all(check["ok"] for check in json.loads(result.stdout)["checks"])
    assert run("revert", out, dense).exit_code == 0
    assert tree_hash(dense) == tree_hash(source)
    result = run("inspect", out, "--json")
    assert json.loads(result.stdout)["converted"] is True
    (out / "tokenizer.json").unlink()
    result = run("verify", out, "--json")
    assert result.exit_code == 4
    assert json.loads(result.stdout)["code"] == "CK29"


def test_cl04_every_error_is_one_json_object(source, tmp_path):
    cases = {
        3: ["inspect", tmp_path / "missing"],
        2: ["convert", source, source, "--method", "nsa"],
        6: ["inspect", "org/name-that-is-nowhere"],
    }
    for status, words in cases.items():
        result = process(*words, "--json")
        assert result.returncode == status
        error = json.loads(result.stdout)
        assert set(error) == JSON_ERROR
        assert (error["ok"], error["exit"]) == (False, status)
        assert error["code"] in ERROR_CODES


def test_cl09_dry_run(source, tmp_path):
    before = tree_hash(source)
    result = run("convert", source, tmp_path / "out", "--method", "ssa", "--layers", "1", "--dry-run")
    assert result.exit_code == 0
    assert "nothing was written" in result.stdout
    assert "layers 0: full" in result.stdout
    assert list(tmp_path.iterdir()) == []
    assert tree_hash(source) == before


def test_config_file_and_overrides(source, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert run("convert", source, first, "--method", "nsa", *SETTINGS, "--layers", "0").exit_code == 0
    assert run("convert", source, second, "--config", first / "recipe.yaml").exit_code == 0
    assert tree_hash(first) == tree_hash(second)
    result = run(
        "convert",
        source,
        tmp_path / "third",
        "--config",
        first / "recipe.yaml",
        "--set",
        "num_blocks=5",
        "--json",
    )
    rules = json.loads(result.stdout)["layers"]
    assert rules[0]["settings"]["num_blocks"] == 5
    assert (
        run("convert", source, tmp_path / "x", "--config", first / "recipe.yaml", "--method", "nsa").exit_code
        == 2
    )
    assert run("convert", source, tmp_path / "x", "--config", tmp_path / "none.yaml").exit_code == 3


def test_unknown_setting_names_the_nearest(source, tmp_path):
    result = run("convert", source, tmp_path / "out", "--method", "nsa", "--set", "blok_size=8")
    assert result.exit_code == 3
    assert "did you mean 'block_size'" in result.stderr


def test_cl05_reader_goes_away():
    command = f"{sys.executable} -m nsa_convert.cli methods | head -1"
    done = subprocess.run(
        command,
        shell=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_cl06_cl07_plain_output(source, tmp_path):
    out = tmp_path / "模型"
    result = process(
        "convert",
        source,
        out,
        "--method",
        "nsa",
        TERM="dumb",
        NO_COLOR="1",
        COLUMNS="40",
        LC_ALL="C",
        PYTHONUTF8="0",
        PYTHONCOERCECLOCALE="0",
        PYTHONIOENCODING="ascii",
    )
    assert result.returncode == 0, result.stderr
    assert b"\x1b" not in result.stdout + result.stderr
    assert b"\r" not in result.stderr
    assert result.stdout.isascii()
    assert result.stderr.count(b"weight files)") == 10


def test_cl08_interrupt(source, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("nsa_convert.convert.convert_checkpoint", interrupted)
    assert run("convert", source, tmp_path / "out", "--method", "nsa").exit_code == 130


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (RuntimeError("strange\nsecond line"), 1, "RuntimeError: strange"),
        (MemoryError(), 5, "not enough memory"),
        (OSError(28, "No space left on device"), 5, "No space left"),
        (PermissionError(13, "Permission denied", "/x"), 5, "Permission denied"),
        (ModuleNotFoundError("No module named 'gguf'", name="gguf"), 5, "pip install gguf"),
    ],
)
def test_cl11_cl14_other_failures(source, tmp_path, monkeypatch, error, status, text):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr("nsa_convert.convert.convert_checkpoint", fails)
    result = run("convert", source, tmp_path / "out", "--method", "nsa")
    assert result.exit_code == status
    assert text in result.stderr
    assert "Traceback" not in result.stderr
    assert "second line" not in result.stderr
    result = run("convert", source, tmp_path / "out", "--method", "nsa", "--debug")
    assert result.exception is error


def test_cl14_an_internal_error_leaves_its_traceback_in_a_file(source, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("strange")

    monkeypatch.setattr("nsa_convert.convert.convert_checkpoint", fails)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = run("convert", source, tmp_path / "out", "--method", "nsa")
    (file,) = tmp_path.glob("nsa-convert-*.txt")
    assert str(file) in result.stderr
    assert file.read_text().startswith("Traceback")
    assert "in fails" in file.read_text()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["", "~/nothing-here", "*.gguf", "./a/b", "/nowhere", "no-such-model"])
def test_cl16_odd_model_names(name):
    result = run("inspect", name)
    assert result.exit_code == 3
    assert "CF24" in result.stderr


def test_a_local_path_never_goes_to_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    assert "CF24" in run("inspect", "org/missing").stderr


def test_hb12_offline():
    result = process("inspect", "org/name-that-is-nowhere")
    assert result.returncode == 6
    assert b"HF_HUB_OFFLINE is set" in result.stderr


def test_methods_and_explain():
    listed = json.loads(run("methods", "--json").stdout)["methods"]
    assert [method["name"] for method in listed] == list(METHODS)
    assert all(set(method["defaults"]) == set(method["sources"]) for method in listed)
    assert "Phases ()" not in run("methods").stdout
    assert "exit status 3" in run("explain", "ck23").stdout


def test_doctor():
    report = json.loads(run("doctor", "--json").stdout)
    assert report["kernel_ok"] is True
    assert report["versions"]["torch"]


def test_values_of_set():
    assert parse_settings(["a=1", "b=1e-4", "c=true", "d=[1, 2]", "e=text", "f="]) == {
        "a": 1,
        "b": 1e-4,
        "c": True,
        "d": [1, 2],
        "e": "text",
        "f": None,
    }
    assert parse_layers("0-3,7") == (0, 1, 2, 3, 7)
    with pytest.raises(UsageError):
        read_plan(None, None, (), None)
    with pytest.raises(ConfigError):
        parse_settings(["a=[1"])


@pytest.mark.slow
def test_a_method_for_each_phase(source, tmp_path):
    words = ["--method", "phases", "--set", "prefill=xattention"]
    words += ["--set", "decode={method: quest, num_blocks: 8}"]
    result = run("convert", source, tmp_path / "out", *words, "--json")
    assert json.loads(result.stdout)["ok"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    prefill, (decode,) = config["sparse_attention"]["default"], config["sparse_attention"]["rules"]
    assert (prefill["method"], prefill["threshold"]) == ("xattention", 0.9)
    assert (decode["method"], decode["num_blocks"], decode["phase"]) == ("quest", 8, "decode")
    assert run("verify", tmp_path / "out").exit_code == 0


YAML_FAULTS = {
    "RC01-tab": "a:\t1\n\tb: 2",
    "RC04-twice": "sparse_attention: {}\nsparse_attention: {}",
    "RC06-object": "sparse_attention: !!python/object/apply:os.system [true]",
    "RC07-anchors": "a: &a [1]\nb: [*a, *a]",
    "RC12-list": "- 1",
}


@pytest.mark.parametrize("text", YAML_FAULTS.values(), ids=YAML_FAULTS)
def test_bad_recipe(source, tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    result = run("convert", source, tmp_path / "out", "--config", tmp_path / "recipe.yaml")
    assert result.exit_code == 3
    assert "recipe.yaml" in result.stderr


def test_error_table():
    """Every code the package uses is in the table, with an exit status that exists; the page is in step."""
    import re

    used = set()
    for path in (ROOT / "nsa_convert").rglob("*.py"):
        used |= set(re.findall(r'"((?:CK|CF|TK|SV|RC|HB|KN|EV|DA|CL|NC)\d{2})"', path.read_text()))
    assert used - set(ERROR_CODES) == set()
    assert {entry.exit for entry in ERROR_CODES.values()} <= set(EXIT_STATUS)
    assert (ROOT / "docs/reference/errors.md").read_text() == render_markdown()
