"""``--method`` on an unmodified checkpoint, and what is scored where one pass would be no measure."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import DynamicCache

from nsa_convert.cli import main
from nsa_convert.cli.commands import BENCH_SETTINGS
from nsa_convert.cli.evaluate import SUITES, suite_settings
from nsa_convert.evaluation.metrics.perplexity import read_out, token_nll
from nsa_convert.evaluation.models import load_model, read_model_facts
from nsa_convert.evaluation.suites.quick import run_quick
from nsa_convert.methods.parts.registry import METHODS
from tests.checkpoints import tree_hash
from tests.evaluation.tiny import byte_tokenizer, save_pair
from tests.models import NSA, QUEST, XATTENTION, plan

LENGTH = 256
SCORED = 64  # a quarter


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_pair(tmp_path_factory.mktemp("pair"))


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def options_of(settings: dict) -> list[str]:
    pairs = (f"{k}={json.dumps(v)}" for k, v in settings.items() if k != "method")
    return ["--method", settings["method"], *(word for p in pairs for word in ("--set", p))]


def test_eval_patches_in_memory_what_convert_would_write(pair: tuple[Path, Path], tmp_path: Path) -> None:
    dense, sparse = pair
    before = tree_hash(dense)
    words = ["--set", f"length={LENGTH}", "--json"]
    patched = json.loads(run("eval", dense, *options_of(NSA), *words, "--out", tmp_path / "out").stdout)
    converted = json.loads(run("eval", sparse, *words).stdout)
    assert tree_hash(dense) == before
    for one, other in zip(patched["texts"], converted["texts"], strict=True):
        assert one["all"] == other["all"]
        assert one["prompt"] == 0
    assert patched["model"]["patched_in_memory"]["default"]["method"] == "nsa"
    assert "--method nsa" in patched["command"]
    assert "block_size=8" in patched["command"]
    assert (tmp_path / "out" / "report.html").is_file()


DENSE_STEPS = {**XATTENTION, "rules": [{"method": "full", "phase": "decode"}]}


@pytest.mark.parametrize("settings", [XATTENTION, QUEST, DENSE_STEPS])
def test_what_follows_a_prompt_is_scored(pair: tuple[Path, Path], settings: dict) -> None:
    report = run_quick(pair[0], plan=plan(settings), length=LENGTH)
    assert any("scored after a prompt" in line for line in report.warnings)
    ids = byte_tokenizer()(report.texts[0].text.text)["input_ids"][:LENGTH]
    model = load_model(pair[0], plan=plan(settings))
    cache = DynamicCache()
    with torch.no_grad():
        out = [model(torch.tensor([ids[: LENGTH - SCORED]]), past_key_values=cache).logits[0, -1:]]
        for i in range(LENGTH - SCORED, LENGTH - 1, 16):
            out.append(model(torch.tensor([ids[i : i + 16]]), past_key_values=cache).logits[0])
    logits = torch.cat(out)[:SCORED]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[-SCORED:]), reduction="none")
    result = report.texts[0]
    assert (result.divergence.sparse_nll - expected).abs().max() < 1e-3
    assert [row["context"] for row in result.bucket_rows()] == [f"{LENGTH - SCORED}-{LENGTH - 1}"]
    assert result.to_dict(32)["prompt"] == LENGTH - SCORED
    assert result.curve()[-1]["context_end"] == LENGTH - 1
    dense = token_nll(read_out(load_model(pair[0]), ids), ids)[-SCORED:]
    assert (result.divergence.dense_nll - dense).abs().max() < 1e-3


def test_prompt_and_steps_read_a_causal_model_as_one_pass_does(pair: tuple[Path, Path]) -> None:
    model, ids = load_model(pair[1]), list(range(200))
    whole = read_out(model, ids).states[129:]
    assert (read_out(model, ids, 130).states - whole).abs().max() < 1e-3


@pytest.mark.slow
def test_a_long_suite_resumes_and_counts_the_method(pair: tuple[Path, Path], tmp_path: Path) -> None:
    words = ["eval", pair[0], "--suite", "long", "--set", "lengths=400", "--set", "tasks=niah_single_1"]
    words += [
        "--set",
        "length=200",
        "--set",
        "times=false",
        "--set",
        "depths=0.5",
        "--out",
        tmp_path / "out",
        "--json",
    ]
    reports = [
        json.loads(run(*words, *options_of(settings)).stdout)
        for settings in (XATTENTION, XATTENTION, {**XATTENTION, "threshold": 0.9})
    ]
    assert [report["cells"]["reused"] > 0 for report in reports] == [False, True, False]
    assert reports[0]["texts"] == reports[1]["texts"] != reports[2]["texts"]
    assert all(report["texts"][0]["prompt"] == 150 for report in reports)


def test_generate(pair: tuple[Path, Path]) -> None:
    words = ["--prompt", "x" * 150, "--max-new-tokens", 8, "--json"]
    patched = json.loads(run("generate", pair[0], *options_of(NSA), *words).stdout)
    assert patched["text"] == json.loads(run("generate", pair[1], *words).stdout)["text"]


def test_bench(tmp_path: Path) -> None:
    words = ["bench", "--geometry", "4/2/16", "--lengths", 300, "--set", "repeats=1", "--json"]
    for settings in (XATTENTION, QUEST, {**NSA, "branch_kv": "independent"}, {"method": "dsa"}):
        result = run(*words, *options_of(settings))
        rows = json.loads(result.stdout)["rows"]
        names = {(row["phase"], row["name"]) for row in rows if not row["name"].startswith("dense")}
        assert names == {("prefill", settings["method"]), ("decode", settings["method"])}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "DENSE", "--method", "xatention"], "did you mean 'xattention'"),
        (["eval", "DENSE", "--method", "xattention", "--set", "treshold=1"], "threshold"),
        (["eval", "DENSE", "--set", "threshold=1"], "unknown key 'threshold'"),
        (["eval", "SPARSE", "--method", "xattention"], "converted already"),
        (["generate", "SPARSE", "--method", "moba", "--prompt", "x"], "converted already"),
        (["generate", "DENSE", "--set", "threshold=1", "--prompt", "x"], "--set belongs to --method"),
        (["bench", "--method", "quest", "--set", "pages=1"], "unknown key 'pages'"),
        (["eval", "DENSE", "--method", "quest", "--suite", "tasks", "--set", "tasks=x"], "one pass"),
    ],
)
def test_bad_requests(pair: tuple[Path, Path], words: list[str], message: str) -> None:
    named = {"DENSE": str(pair[0]), "SPARSE": str(pair[1])}
    result = run(*(named.get(word, word) for word in words))
    assert result.exit_code in (2, 3)
    assert message in result.stderr


def test_facts(pair: tuple[Path, Path]) -> None:
    plans = {name: {"method": name} for name in ("nsa", "moba", "quest", "xattention")}
    plans["phases"] = {"method": "nsa", "rules": [{"method": "quest", "phase": "decode"}]}
    for name, given in plans.items():
        one_pass = name in ("nsa", "moba")
        facts = read_model_facts(pair[0], plan(given))
        assert facts.one_pass == one_pass
        assert facts.methods == (name,) * 3
        assert facts.prompt_of(2000) == (0 if one_pass else 1744)


def test_no_setting_of_a_method_is_one_of_a_command() -> None:
    known = {*BENCH_SETTINGS, *(name for suite in SUITES for name in suite_settings(suite))}
    for name, method in METHODS.items():
        own = {field.name for field in dataclasses.fields(method.Settings)}
        assert not own & known, name
