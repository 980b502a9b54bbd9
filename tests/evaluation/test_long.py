import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nsa_convert.errors import ConfigError
from nsa_convert.evaluation.metrics import case_scores
from nsa_convert.evaluation.models import read_model_facts
from nsa_convert.evaluation.suites import long
from nsa_convert.evaluation.suites.finished_cells import CELLS
from nsa_convert.evaluation.suites.long import run_long
from nsa_convert.evaluation.suites.long_settings import TASKS, LongSettings
from tests.evaluation.tiny import BUDGET, save, save_pair, tiny_dense
from tests.models import NSA

ROOT = Path(__file__).parents[2]
SMALL = {
    "length": 80,
    "lengths": [700],
    "depths": [0.2, 0.8],
    "task_lengths": [1024],
    "tasks": ["vt", "recall"],
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def report(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    steps = []
    result = run_long(pair[1], out_dir=folder, progress=lambda *step: steps.append(step), **SMALL)
    return result.values, folder, steps


def test_everything_is_measured_with_both_kinds_of_attention(report, pair):
    values, _, steps = report
    assert (values["schema"], values["suite"], values["visible_budget"]) == (1, "long", BUDGET)
    assert [(len(rows), {r["length"] for r in rows}) for rows in values["needles"].values()] == [
        (2, {700})
    ] * 2
    kinds = {(row["task"], row["attention"], row["length"]) for row in values["tasks"]}
    assert kinds == {(t, a, 1024) for t in ("vt", "recall") for a in ("dense", "sparse")}
    assert all(row["spans"] == 16 for row in values["tasks"] if row["task"] == "recall")
    assert {(row["attention"], row["length"]) for row in values["speed"]} == {
        (a, n) for a in ("dense", "sparse") for n in (700, 1024)
    }
    assert [text["tokens"] for text in values["texts"]] == [80, 80]
    assert all(
        row["recall"] is not None for row in values["texts"][0]["layers"] if row["pattern"] == "selected"
    )
    assert values["cells"] == {"total": 2 + 2 * 2 + 2 * 2, "reused": 0}
    assert steps[-1][1] == steps[-1][2] == 8
    assert any("fewer than 3 prompts" in line for line in values["warnings"])


def test_files_hold_the_same_numbers(report):
    values, folder, _ = report
    assert json.loads((folder / "report.json").read_text()) == values
    assert {path.name for path in folder.iterdir()} == {*values["files"], CELLS}
    assert {"report.html", "needles.png", "speed.png", "cache.png"} <= set(values["files"])
    rows = list(csv.DictReader((folder / "tasks.csv").open()))
    assert [float(row["nll"]) for row in rows] == [row["nll"] for row in values["tasks"]]
    assert str(folder) not in (folder / "report.json").read_text()


def test_a_second_run_reads_the_cells_and_loads_nothing(report, pair, monkeypatch):
    values, folder, _ = report

    def refuse(*args):
        raise AssertionError("weights were loaded although every cell is there")

    monkeypatch.setattr(long, "load_model", refuse)
    again = run_long(pair[1], out_dir=folder, **SMALL).values
    assert again["cells"]["reused"] == again["cells"]["total"]
    assert [again[key] for key in ("texts", "needles", "tasks", "speed")] == [
        values[key] for key in ("texts", "needles", "tasks", "speed")
    ]


@pytest.mark.slow
def test_other_settings_are_other_cells(report, pair):
    _, folder, _ = report
    again = run_long(pair[1], out_dir=folder, **{**SMALL, "seed": 1}).values
    assert again["cells"]["reused"] == 0


def test_a_dense_checkpoint_gives_what_the_same_weights_give(report, pair):
    values, _, _ = report
    other = run_long(pair[1], against=pair[0], **SMALL).values
    assert "--against dense" in other["command"]
    for name in ("dense", "sparse"):
        a, b = ([row["nll"] for row in v["needles"][name]] for v in (values, other))
        assert a == pytest.approx(b, abs=1e-3)
    assert other["texts"][0]["all"]["kl_mean"] == pytest.approx(
        values["texts"][0]["all"]["kl_mean"], abs=1e-4
    )


@pytest.mark.slow
def test_ev09_killed_and_resumed_without_redoing_cells(pair, tmp_path):
    words = [
        sys.executable,
        "-m",
        "nsa_convert.cli",
        "eval",
        str(pair[1]),
        "--suite",
        "long",
        "--out",
        str(tmp_path),
    ]
    for key, value in {**SMALL, "tasks": ["vt", "recall", "fwe", "niah_multikey_3"], "samples": 2}.items():
        text = ",".join(map(str, value)) if isinstance(value, list) else value
        words += ["--set", f"{key}={text}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    path, deadline = tmp_path / CELLS, time.monotonic() + 100
    while time.monotonic() < deadline and process.poll() is None:
        if path.is_file() and path.read_bytes().count(b"\n") >= 4:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = path.read_bytes()
    assert 4 <= kept.count(b"\n") < 22, process.stderr.read().decode()
    done = subprocess.run(
        [*words, "--json"], env=env, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    cells = json.loads(done.stdout)["cells"]
    assert cells == {"total": 2 + 4 + 2 * 4 * 2, "reused": kept.count(b"\n")}
    assert path.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [2000]}, r"lengths \[2000\] are beyond the model's 1024 positions"),
        ({"lengths": [5000], "beyond_positions": True}, "beyond the model's 1024 positions"),
        ({"tasks": ["niah"]}, "there is no task 'niah'"),
        ({"sampels": 3}, "did you mean 'samples'"),
        (
            {"samples": 0, "haystack": "essays", "depths": "deep"},
            "depths must be a list of numbers.*haystack must be one of",
        ),
        ({"depths": [2]}, "between 0 and 1"),
        ({"task_lengths": [120]}, "tokens at least"),
    ],
)
def test_bad_requests_fail_before_anything_is_loaded(pair, monkeypatch, options, message):
    monkeypatch.setattr(long, "load_model", lambda *args: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=message) as caught:
        run_long(pair[1], **{**SMALL, **options})
    assert caught.value.exit_status == 3


def test_lengths_beyond_the_positions_are_measured_when_asked_for(pair):
    options = {**SMALL, "lengths": [1100], "depths": [0.5], "tasks": [], "beyond_positions": True}
    values = run_long(pair[1], **options, times=False).values
    assert values["speed"] == []
    assert any("beyond the 1024 positions" in line for line in values["warnings"])
    assert values["needles"]["sparse"][0]["tokens"] > 1024


def test_defaults_follow_the_budget_and_the_positions(tmp_path):
    folder = save_pair(tmp_path, {**NSA, "num_blocks": 8})[1]
    facts = read_model_facts(folder)  # a budget of 64 and 1024 positions
    quick, full = (LongSettings.read({}, suite, facts) for suite in ("long", "full"))
    assert (quick.lengths, quick.task_lengths, quick.samples) == ((128, 256, 512), (128, 256), 1)
    assert (full.lengths, full.task_lengths, full.samples) == (
        (128, 256, 512, 1024),
        (128, 256, 512, 1024),
        5,
    )
    assert quick.tasks == TASKS
    assert len(TASKS) == 12


@pytest.mark.parametrize(("load", "warned"), [(0.1, False), (1.2, False), (7.0, True)])
def test_ev10_a_busy_machine_is_named(monkeypatch, load, warned):
    monkeypatch.setattr(case_scores.os, "getloadavg", lambda: (0.0, load, 0.0))
    monkeypatch.setattr(case_scores.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(case_scores.torch, "get_num_threads", lambda: 1)
    assert bool(case_scores.busy_warnings()) is warned


@pytest.mark.slow
def test_questions_of_ones_own_are_a_task_and_their_place_is_not_told(pair, tmp_path):
    path = tmp_path / "mine.jsonl"
    row = {"question": "Which?", "context": "This one. " * 9, "answers": ["this one", "it"]}
    path.write_text(json.dumps(row) + "\n")
    options = {**SMALL, "tasks": [], "depths": [0.5], "qa_file": str(path)}
    values = run_long(pair[1], out_dir=tmp_path / "out", **options).values
    assert [(row["task"], row["attention"]) for row in values["tasks"]] == [("qa", "sparse"), ("qa", "dense")]
    assert "qa_file=mine.jsonl" in values["command"]
    assert str(tmp_path) not in json.dumps(values)


def test_a_dense_model_is_measured_too(tmp_path):
    dense = save(tiny_dense().float(), tmp_path / "dense")
    values = run_long(dense, **{**SMALL, "tasks": [], "depths": [0.5]}).values
    assert values["visible_budget"] is None
    a, b = (values["needles"][kind][0]["nll"] for kind in ("dense", "sparse"))
    assert a == b
