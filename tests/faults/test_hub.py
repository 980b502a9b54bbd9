"""A Hub that refuses, fails, hangs or lies, and folders that hold what must not be published (HB)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
from click.testing import CliRunner

from nsa_convert.cli import main
from nsa_convert.errors import CheckpointError, ConfigError, HubError
from nsa_convert.hub import resolve_model
from nsa_convert.push import plan_push, push_plan
from tests.checkpoints import write_dense
from tests.fake_hub import Fault
from tests.faults.runs import call, write_tiny
from tests.pushing import BLOB, COMMIT, REPO, ROOT, TOKEN, hub, model, original, outside, push
from tests.training.recipes import NSA, stage

__all__ = ["hub", "model", "original"]

PUSH = """
import sys
from nsa_convert.push import plan_push, push_plan
push_plan(plan_push(sys.argv[1], sys.argv[2]))
"""


def gives_up(model, hub, fault: Fault, code: str, *, tries: int = 1, says: str = "", status: int = 6) -> list:
    """Push against a lasting fault: it is explained, nothing is published; return the pauses."""
    hub.faults.append(fault)
    waits: list[float] = []
    with pytest.raises(HubError) as caught:
        push_plan(plan_push(model, REPO), wait=waits.append)
    assert (caught.value.code, caught.value.exit_status) == (code, status)
    assert says in f"{caught.value.message} {caught.value.hint}"
    assert caught.value.hint
    assert TOKEN not in str(caught.value)
    assert len(waits) == tries - 1
    assert hub.commits(REPO) == 0
    assert set(hub.repos.get(REPO, [{}])[-1]) <= {".gitattributes"}
    return waits


def succeeds(model, hub, fault: Fault) -> None:
    """Push against a passing fault: one whole commit."""
    hub.faults.append(fault)
    report, _, _ = push(model)
    assert hub.commits(REPO) == 1
    assert report.commit == hub.sha(REPO)
    assert set(hub.files(REPO)) == {file.name for file in plan_push(model, REPO).files} | {".gitattributes"}


@pytest.mark.parametrize("where", [COMMIT, "POST /api/repos/create"])
def test_hb01_the_token_is_refused(model, hub, where):
    gives_up(model, hub, Fault(where, 401, 9), "HB01", says="`hf auth login`")


def test_hb01_no_token(model, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(HubError, match="no token"):
        push(model)
    assert hub.log == []


def test_hb02_the_token_may_not_write(model, hub):
    gives_up(model, hub, Fault(COMMIT, 403, 9), "HB02", says="the token may not write there")


def test_hb03_no_such_place(model, hub):
    gives_up(model, hub, Fault(r"POST .*/preupload/", 404, 9), "HB03", says="check OWNER/NAME")
    with pytest.raises(HubError, match="the Hub does not know nobody/nothing") as caught:
        resolve_model("nobody/nothing")
    assert (caught.value.code, caught.value.exit_status) == ("HB03", 6)


@pytest.mark.parametrize("status", [409, 418])
def test_hb04_an_answer_that_cannot_be_understood(model, hub, status):
    where = "POST /api/repos/create" if status == 409 else COMMIT
    gives_up(model, hub, Fault(where, status, 9), "HB04", says="")


@pytest.mark.parametrize("status", [409, 412])
def test_hb05_the_repository_moved_meanwhile(model, hub, status):
    gives_up(model, hub, Fault(COMMIT, status, 9), "HB05", says="run the push again")


def test_hb06_the_hub_asks_to_wait(model, hub):
    waits = gives_up(model, hub, Fault(COMMIT, 429, 9, {"Retry-After": "7"}), "HB06", tries=4)
    assert waits == [7, 7, 7]
    hub.faults.clear()
    succeeds(model, hub, Fault(COMMIT, 429, 2, {"Retry-After": "3"}))


def test_hb06_no_pause_is_longer_than_a_minute(model, hub):
    waits = gives_up(model, hub, Fault(COMMIT, 429, 9, {"Retry-After": "86400"}), "HB06", tries=4)
    assert waits == [60, 60, 60]


def test_hb07_the_hub_fails_for_good(model, hub):
    gives_up(model, hub, Fault(COMMIT, 500, 9), "HB07", tries=4, says="nothing was published")


@pytest.mark.parametrize(
    "fault",
    [Fault(COMMIT, 500), Fault(COMMIT, 500, after=True), Fault("GET /api/models/", 502)],
    ids=["before", "after", "reading"],
)
def test_hb07_the_hub_fails_once(model, hub, fault):
    succeeds(model, hub, fault)


def test_hb08_a_blob_is_sent_again(model, hub):
    succeeds(model, hub, Fault(BLOB, 503, 2))


def test_hb09_a_file_is_too_large(model, hub):
    gives_up(model, hub, Fault(BLOB, 413, 9), "HB09", says="save the model in smaller shards")


@pytest.mark.parametrize(
    "fault",
    [Fault(COMMIT, 0), Fault(COMMIT, 0, after=True), Fault(BLOB, 0)],
    ids=["commit", "answer", "blob"],
)
def test_hb10_the_connection_breaks_once(model, hub, fault):
    succeeds(model, hub, fault)


def test_hb10_the_connection_breaks_for_good(model, hub):
    gives_up(model, hub, Fault(COMMIT, 0, 9), "HB10", tries=4, says="what was uploaded is not sent again")


def test_hb10_a_silent_hub_is_given_up(model, hub, monkeypatch):
    monkeypatch.setattr("nsa_convert.push.SILENCE", 0.5)
    hub.faults.append(Fault(COMMIT, -1, 1))
    report, told, _ = push(model)
    assert hub.commits(REPO) == 1
    assert any("broke" in line for line in told)


@pytest.mark.slow
def test_hb11_killed_midway_and_pushed_again(model, hub):
    words = [sys.executable, "-c", PUSH, str(model), REPO]
    env = outside(hub, PYTHONPATH=str(ROOT))
    hub.on_blob = lambda count: time.sleep(20 if count == 1 else 0)
    process = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 90
    while not hub.blobs and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    hub.on_blob = None
    assert hub.blobs, process.stderr.read().decode()
    assert hub.commits(REPO) == 0
    first = hub.count(BLOB)
    push(model)
    assert hub.commits(REPO) == 1
    assert hub.count(BLOB) - first < len(hub.blobs)


def test_hb12_offline(model, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="OFFLINE") as caught:
        push(model)
    assert caught.value.code == "HB12"


def test_hb13_only_named_files_go(model, hub):
    for name in (".env", "training_args.bin", "optimizer.pt", "wandb/run.log", "step-5/model.safetensors"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("secret")
    (model / "evaluation" / "cells").mkdir()
    (model / "evaluation" / "cells" / "1.tmp").write_text("half")
    plan = plan_push(model, REPO)
    names = {file.name for file in plan.files}
    assert {".env", "training_args.bin", "wandb/run.log", "evaluation/cells/1.tmp"} <= set(plan.left_out)
    assert names & set(plan.left_out) == set()
    assert "left out: .env" in plan.to_text()


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("README.md", f"\nmy token is {TOKEN}\n", "access token"),
        ("evaluation/buckets.csv", "/home" + "/someone/model\n", "path of this machine"),
        ("tokenizer_config.json", f'{{"x": "{TOKEN}"}}', "access token"),
    ],
)
def test_hb13_tokens_and_local_paths_stop_the_push(model, name, text, complaint):
    with (model / name).open("a") as file:
        file.write(text)
    with pytest.raises(ConfigError, match=complaint) as caught:
        plan_push(model, REPO)
    assert caught.value.code == "HB13"
    assert TOKEN not in caught.value.message


def test_hb13_the_token_of_the_environment_is_found_whatever_it_looks_like(model, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-secret-of-another-form")
    (model / "README.md").write_text((model / "README.md").read_text() + "a-secret-of-another-form")
    with pytest.raises(ConfigError, match="access token"):
        plan_push(model, REPO)


def test_hb13_a_token_in_the_header_of_a_weight_file(model):
    from safetensors.torch import load_file, save_file

    path = model / "model-sparse.safetensors"
    save_file(load_file(path), path, metadata={"note": TOKEN})
    with pytest.raises(ConfigError, match=r"model-sparse\.safetensors holds what looks like an access token"):
        plan_push(model, REPO)


def test_hb14_private_unless_public_and_said_before(model, hub):
    for words, kind in (((), "private"), (("--public",), "PUBLIC")):
        done = call("push", model, REPO, "--dry-run", *words)
        assert (done.code, f"to {REPO} ({kind} if it is created)" in done.out) == (0, True)
    assert hub.log == []
    seen = []
    hub.on_blob = lambda count: seen.append(hub.private[REPO])
    report, _, _ = push(model)
    assert (report.private, set(seen)) == (True, {True})
    hub.repos.clear()
    hub.private.clear()
    report, _, _ = push(model, private=False)
    assert (report.private, hub.private[REPO]) == (False, False)


def test_hb15_the_hub_refuses_the_card(model, hub):
    card = model / "README.md"
    card.write_text(card.read_text().replace("license: apache-2.0", "license: made-up"))
    with pytest.raises(ConfigError, match="must be one of") as caught:
        push(model)
    assert caught.value.code == "HB15"
    assert hub.commits(REPO) == 0


def test_hb17_a_damaged_arrival_does_not_load(model, hub):
    hub.corrupt = "model-sparse.safetensors"
    with pytest.raises(HubError, match="arrived damaged") as caught:
        push(model)
    assert caught.value.code == "HB17"
    assert "config.json" not in hub.files(REPO)


@pytest.fixture
def base(hub, tmp_path, monkeypatch):
    """A dense model at the Hub, and caches of this test's own."""
    folder = write_dense(tmp_path / "dense", shards=False)
    hub.repos["tester/base"] = [{p.name: p.read_bytes() for p in folder.iterdir()}]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    address = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return "tester/base"


def test_hb17_a_download_that_is_not_what_the_hub_declared(hub, base, tmp_path):
    hub.damaged_download = "model.safetensors"
    with pytest.raises(CheckpointError, match=r"not what the Hub declared: model\.safetensors") as caught:
        resolve_model(base)
    assert (caught.value.code, caught.value.exit_status) == ("HB22", 3)
    hub.damaged_download = None
    found = resolve_model(base)
    data = hub.files(base)["model.safetensors"]
    assert (found.path / "model.safetensors").read_bytes() == data
    resolve_model(base)
    assert (tmp_path / "cache" / "nsa_convert" / "checked_blobs.json").is_file()


def test_hb18_the_commit_is_pinned_and_recorded(hub, base, tmp_path):
    first = hub.sha(base)
    assert resolve_model(base).revision == first
    moved = {**hub.files(base), "README.md": b"moved"}
    hub.repos[base].append(moved)
    words = ("--method", "nsa", "--set", "num_blocks=4")
    done = call("convert", base, tmp_path / "old", "--revision", first, *words, "--json")
    assert done.code == 0, done.err + done.out
    assert done.json["source"]["revision"] == first
    assert (tmp_path / "old" / "source" / "README.md").exists() is False
    done = call("convert", base, tmp_path / "new", *words, "--json")
    assert done.json["source"]["revision"] == hub.sha(base) != first


@pytest.mark.slow
def test_hb19_hb20_the_command(model, hub, tmp_path):
    words, env = command(model, hub, "--json")
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    values = json.loads(done.stdout)
    assert (values["repo"], values["private"], values["removed"]) == (REPO, True, [])
    assert TOKEN not in done.stdout + done.stderr
    with (model / "model-sparse.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    result = CliRunner().invoke(main, ["push", str(model), REPO, "--allow-unevaluated"])
    assert result.exit_code == 4
    assert "HB20" in result.stderr
    assert "--allow-unverified" in result.stderr
    assert hub.commits(REPO) == 1


def test_hb19_a_token_reaches_no_file_and_no_line(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    path = write_tiny(tmp_path, NSA, stage(tokens=128, save_every=1, keep=9))
    done = call("train", path)
    assert done.code == 0, done.err
    for words in (("card", model), ("push", model, REPO, "--dry-run"), ("doctor",), ("inspect", model)):
        more = call(*words)
        assert more.code == 0, more.err
        assert TOKEN not in more.out + more.err
    written = [p for folder in (tmp_path / "run", model) for p in folder.rglob("*") if p.is_file()]
    assert len(written) > 30
    assert [p for p in written if TOKEN.encode() in p.read_bytes()] == []
    assert TOKEN not in done.out + done.err
    assert TOKEN.encode() not in Path("/proc/self/cmdline").read_bytes()


@pytest.mark.parametrize("word", ["--json", "--resume"])
def test_hb19_an_error_with_a_token_in_it_is_printed_without(tmp_path, monkeypatch, word):
    """Whatever a library puts into its message, the token is taken out of what is shown and kept."""

    def leak(*args, **kwargs):
        raise RuntimeError(f"401 for Authorization: Bearer {TOKEN}")

    monkeypatch.setattr("nsa_convert.training.recipe.schema.read_recipe", leak)
    done = call("train", write_tiny(tmp_path), word)
    assert done.code == 1
    assert TOKEN not in done.out + done.err
    assert "Bearer [a token]" in done.out + done.err
    report = next(word for word in (done.out + done.err).replace('"', " ").split() if word.endswith(".txt"))
    assert TOKEN not in Path(report).read_text()
    os.unlink(report)


def command(model, hub, *words):
    return [sys.executable, "-m", "nsa_convert.cli", "push", str(model), REPO, *words], {
        **outside(hub),
        "PYTHONPATH": str(ROOT),
    }
