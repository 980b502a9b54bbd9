"""What the command line has to survive; tests/test_cli.py has the cases on usage, JSON, pipes and texts."""

from __future__ import annotations

import builtins
import os
import re

import pytest

from tests.checkpoint.test_gguf import write_gguf
from tests.checkpoints import dense_model, edit_json
from tests.faults.checks import (
    ENVIRONMENT,
    METHOD,
    converted,
    error_of,
    forked,
    python,
    run,
    snapshot,
)

CONVERT_PHASES = [
    "nsa_convert.hub.resolve_model",
    "nsa_convert.convert.check_free",
    "nsa_convert.convert.open_checkpoint",
    "nsa_convert.convert.check_tokenizer",
    "nsa_convert.convert.place_shards",
    "nsa_convert.convert.write_new_shard",
    "nsa_convert.convert.write_code_files",
    "nsa_convert.convert.write_manifest",
    "nsa_convert.checkpoint.staging._publish",
]


def interrupted(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("phase", CONVERT_PHASES, ids=lambda name: name.rpartition(".")[2])
def test_cl08_interrupt_in_each_phase_of_convert(source, monkeypatch, phase):
    before = snapshot(source.parent)
    monkeypatch.setattr(phase, interrupted)
    result = run("convert", source, source.parent / "out", *METHOD)
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert "Traceback" not in result.stderr
    assert snapshot(source.parent) == before


OTHER_PHASES = {
    "verify": ["_files", "_values", "_kept_tensors", "_full_budget", "_bare"],
    "revert": ["_original_files", "staged", "copy_file"],
}


@pytest.mark.parametrize(
    ("command", "phase"), [(name, phase) for name, phases in OTHER_PHASES.items() for phase in phases]
)
def test_cl08_interrupt_in_each_phase_of_verify_and_revert(source, monkeypatch, command, phase):
    out, _ = converted(source)
    before = snapshot(source.parent)
    if phase == "_bare":
        monkeypatch.setattr("nsa_convert.verification._full_budget", lambda *_, **__: "skipped here")
    monkeypatch.setattr(f"nsa_convert.verification.{phase}", interrupted)
    assert run(command, out, *([source.parent / "dense"] if command == "revert" else [])).exit_code == 130
    assert snapshot(source.parent) == before


def test_cl10_nothing_asks(source, monkeypatch):
    """A folder that would like to run code, with stdin closed and with one that nobody answers."""
    (source / "evil.py").write_text("class Model: pass\n")
    evil = {"AutoConfig": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
    edit_json(source / "config.json", auto_map=evil)
    edit_json(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Model", None]})
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked"))
    out = source.parent / "out"
    for number, words in enumerate((["convert", source, out, *METHOD], ["generate", out, "--prompt", "<1>"])):
        status, _, stderr = forked(lambda: os.close(0), *words)
        assert status == 0, stderr
        assert run(*words, *(["--overwrite"] if number == 0 else [])).exit_code == 0


def test_cl11_pip_line_of_the_evaluation_harness(source, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **options):
        if name.split(".")[0] in {"lm_eval", "matplotlib"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest, **options)

    out, _ = converted(source)
    monkeypatch.setattr(builtins, "__import__", without)
    error = error_of(run("eval", out, "--suite", "tasks", "--set", "tasks=arc", "--json"), 5)
    assert error["code"] == "CL11"
    assert re.search(r"pip install .*lm[-_]eval", error["hint"])


def test_cl12_home_and_cache_that_cannot_be_written(source):
    """Converting and generating need neither."""
    script = (
        "import sys; from nsa_convert.cli import main\n"
        "for words in sys.argv[1].split('|'):\n"
        "    try: main(words.split(' '))\n"
        "    except SystemExit as end: assert end.code == 0, (words, end.code)\n"
    )
    nowhere = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "HF_HOME", "TRITON_CACHE_DIR"), "/proc/nowhere")
    words = [
        "|".join([f"convert {source} {source.parent}/out --method nsa", f"generate {source} --prompt <1>"])
    ]
    done = python(script, *words, env={**ENVIRONMENT, **nowhere})
    assert done.returncode == 0, done.stderr


def test_cl12_cache_that_is_needed(tmp_path, monkeypatch):
    """A GGUF file is dequantised into the cache."""
    pytest.importorskip("gguf")
    path = write_gguf(tmp_path / "tiny.gguf", dense_model())
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    error = error_of(run("generate", path, "--prompt", "t1", "--json"), 5)
    assert error["code"] in {"SV03", "SV15"}
    assert "/proc/nowhere" in error["message"]


@pytest.mark.parametrize(
    "word",
    ["", "-", "--", "-x", "*", "~", "~who/x", "a\0b", "x" * 5000, "x/" + "y" * 200, "http://x/y", "😀"],
)
def test_cl16_odd_model(word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["inspect", "--json", word], ["convert", "--json", *METHOD, word, "out"]):
        result = run(*words)
        assert result.exit_code in {2, 3}, (words, result.stdout)
        error_of(result, result.exit_code)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("word", ["", "x" * 5000, "/proc/nowhere/out", "~nobody/x"])
def test_cl16_odd_output(source, word, monkeypatch):
    monkeypatch.chdir(source.parent)
    before = snapshot(source.parent)
    result = run("convert", source, *METHOD, "--json", word)
    if word == "~nobody/x":  # no shell expanded it: a folder of that name
        assert result.exit_code == 0
        return
    error_of(result, result.exit_code)
    assert result.exit_code in {2, 5}
    assert snapshot(source.parent) == before
