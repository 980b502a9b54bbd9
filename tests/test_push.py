import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import huggingface_hub
import pytest
import torch
from click.testing import CliRunner

from nsa_convert.cli import main
from nsa_convert.errors import CheckFailedError, CheckpointError, ConfigError, HubError, UsageError
from nsa_convert.evaluation.models import load_model
from nsa_convert.patch.loading import load_tokenizer
from nsa_convert.push import plan_push, push_plan
from tests.checkpoints import edit_json
from tests.fake_hub import Fault, fake_hub
from tests.published import publishable

ROOT = Path(__file__).parents[1]
REPO = "tester/tiny"
TOKEN = "hf_" + "a1B2" * 8
COMMIT = r"POST .*/commit/"
BLOB = r"PUT /_lfs/"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return publishable(tmp_path_factory.mktemp("published"))


@pytest.fixture
def model(original, tmp_path):
    return shutil.copytree(original, tmp_path / "tiny-nsa")


@pytest.fixture
def hub(monkeypatch):
    with fake_hub() as server:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        yield server


def push(model, **options):
    told, waits = [], []
    report = push_plan(plan_push(model, REPO, **options), tell=told.append, wait=waits.append)
    return report, told, waits


def outside(hub, **more):
    """Return the environment of a process that talks to the hub and keeps its caches to itself."""
    env = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "PYTHONPATH")}
    return {**env, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, **more}


LOAD = """
import importlib.util, sys, torch
if importlib.util.find_spec("nsa_convert"):
    class Hide:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "nsa_convert":
                raise ModuleNotFoundError(name)
    sys.meta_path.insert(0, Hide())
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = tokenizer("Sixty bytes of text, so that some keys are hidden, not more.", return_tensors="pt").input_ids
out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
assert "nsa_convert" not in sys.modules
print(type(model).__module__.split(".")[0], *out[0, ids.shape[1]:].tolist())
"""


PUSH = """
import sys
from nsa_convert.push import plan_push, push_plan
push_plan(plan_push(sys.argv[1], sys.argv[2]))
"""


def load_back(hub, folder, python=sys.executable):
    env = outside(hub, HF_HOME=str(folder), HF_MODULES_CACHE=str(folder / "modules"))
    command = [str(python), "-I", "-c", LOAD, REPO]
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL
    )


def test_a_pushed_model_loads_elsewhere_and_generates_the_same(model, hub, tmp_path):
    report, _, _ = push(model)
    assert (hub.commits(REPO), report.private, hub.private[REPO]) == (1, True, True)
    assert report.commit == hub.sha(REPO)
    done = load_back(hub, tmp_path / "cache")
    assert done.returncode == 0, done.stderr[-2000:]
    module, *tokens = done.stdout.splitlines()[-1].split()
    assert module == "transformers_modules"
    assert [int(token) for token in tokens] == generated_here(model)


def generated_here(model):
    text = "Sixty bytes of text, so that some keys are hidden, not more."
    ids = load_tokenizer(model)(text, return_tensors="pt").input_ids
    with torch.no_grad():
        out = load_model(model).generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="session")
def oldest_transformers(tmp_path_factory):
    """Return a Python with the oldest transformers that pyproject.toml allows, and else what runs here."""
    folder = tmp_path_factory.mktemp("oldest")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=120)
    bounds = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (least,) = [line.partition(">=")[2] for line in bounds if line.startswith("transformers>=")]
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "-q", f"transformers=={least}.0"]
    done = subprocess.run(install, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        pytest.skip(f"transformers {least}.0 cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
    (place,) = folder.glob("lib/python*/site-packages")
    here = [path for path in sys.path if path.endswith("site-packages")]
    (place / "zz_here.pth").write_text("\n".join(here) + "\n")
    return python, least


@pytest.mark.slow
def test_a_pushed_model_loads_on_the_oldest_transformers(model, hub, tmp_path, oldest_transformers):
    python, least = oldest_transformers
    version = subprocess.run(
        [str(python), "-c", "import transformers; print(transformers.__version__)"],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert version.stdout.startswith(least)
    push(model)
    done = load_back(hub, tmp_path / "cache", python)
    assert done.returncode == 0, done.stderr[-2000:]
    module, *tokens = done.stdout.splitlines()[-1].split()
    assert module == "transformers_modules"
    assert [int(token) for token in tokens] == generated_here(model)


def test_what_arrives_is_what_lay_there_and_the_card_names_the_repository(model, hub):
    push(model)
    remote = hub.files(REPO)
    manifest = json.loads((model / "nsa_manifest.json").read_text())["files"]
    for name, entry in manifest.items():
        assert hashlib.sha256(remote[name]).hexdigest() == entry["sha256"]
    more = {"evaluation/report.json", "evaluation/perplexity.png", ".eval_results/nsa-convert.yaml"}
    assert more <= set(remote)
    assert f'from_pretrained("{REPO}", trust_remote_code=True)' in remote["README.md"].decode()
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert not any(TOKEN.encode() in data for data in remote.values())


def test_pushing_again_changes_nothing_and_sends_nothing(model, hub):
    push(model)
    sent = hub.count(BLOB)
    push(model)
    assert (hub.commits(REPO), hub.count(BLOB)) == (1, sent)


def test_old_weights_and_code_go_in_the_same_commit_and_other_files_stay(model, hub):
    push(model)
    hub.files(REPO).update(
        {"model-old.safetensors": b"x", "nsa_old.py": b"x", "notes.txt": b"mine", "pictures/a.bin": b"x"}
    )
    (model / "evaluation" / "report.html").write_text("<p>new</p>")
    report, _, _ = push(model)
    assert report.removed == ["model-old.safetensors", "nsa_old.py"]
    assert hub.commits(REPO) == 2
    assert {"notes.txt", "pictures/a.bin"} <= set(hub.files(REPO))
    assert "model-old.safetensors" not in hub.files(REPO)


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


def test_the_token_of_the_environment_is_found_whatever_it_looks_like(model, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-secret-of-another-form")
    (model / "README.md").write_text((model / "README.md").read_text() + "a-secret-of-another-form")
    with pytest.raises(ConfigError, match="access token"):
        plan_push(model, REPO)


def test_hb21_no_evaluation_of_these_files(model):
    edit_json(model / "evaluation" / "report.json", model={"manifest_sha256": "1" * 64})
    with pytest.raises(CheckFailedError, match="of other files") as caught:
        plan_push(model, REPO)
    assert (caught.value.code, caught.value.exit_status) == ("HB21", 4)
    assert "--allow-unevaluated" in caught.value.hint
    shutil.rmtree(model / "evaluation")
    with pytest.raises(CheckFailedError, match="there is no evaluation"):
        plan_push(model, REPO)
    assert "published all the same" in plan_push(model, REPO, allow_unevaluated=True).warnings[0]


def test_bad_places_and_folders(model, tmp_path):
    with pytest.raises(UsageError, match="no repository name"):
        plan_push(model, "not-a-repo")
    (model / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        plan_push(model, REPO)
    (model / "README.md").unlink()
    with pytest.raises((ConfigError, CheckpointError)):
        plan_push(model, REPO)


@pytest.mark.parametrize(
    ("fault", "code", "tries"),
    [
        (Fault(COMMIT, 401, 9), "HB01", 1),
        (Fault(COMMIT, 403, 9), "HB02", 1),
        (Fault(r"POST .*/preupload/", 404, 9), "HB03", 1),
        (Fault(COMMIT, 409, 9), "HB05", 1),
        (Fault(COMMIT, 412, 9), "HB05", 1),
        (Fault(BLOB, 413, 9), "HB09", 1),
        (Fault(COMMIT, 418, 9), "HB04", 1),
        (Fault(COMMIT, 429, 9, {"Retry-After": "7"}), "HB06", 4),
        (Fault(COMMIT, 500, 9), "HB07", 4),
        (Fault(COMMIT, 0, 9), "HB10", 4),
        (Fault("POST /api/repos/create", 401, 9), "HB01", 1),
    ],
    ids=lambda value: f"{value.where[:9]}-{value.status}" if isinstance(value, Fault) else str(value),
)
def test_a_lasting_fault_is_explained_and_nothing_is_published(model, hub, fault, code, tries):
    hub.faults.append(fault)
    waits = []
    with pytest.raises(HubError) as caught:
        push_plan(plan_push(model, REPO), wait=waits.append)
    assert (caught.value.code, caught.value.exit_status) == (code, 6)
    assert caught.value.hint
    assert TOKEN not in str(caught.value)
    assert len(waits) == tries - 1
    assert all(wait == 7 for wait in waits if code == "HB06")
    assert hub.commits(REPO) == 0
    assert set(hub.repos.get(REPO, [{}])[-1]) <= {".gitattributes"}


@pytest.mark.parametrize(
    "fault",
    [
        Fault(COMMIT, 500),
        Fault(COMMIT, 429, 2, {"Retry-After": "3"}),
        Fault(COMMIT, 0),
        Fault(COMMIT, 500, after=True),
        Fault(COMMIT, 0, after=True),
        Fault(BLOB, 503, 2),
        Fault(BLOB, 0),
        Fault("GET /api/models/", 502),
    ],
    ids=lambda fault: f"{fault.where[:9]}-{fault.status}-{fault.after}",
)
def test_a_passing_fault_ends_in_one_whole_commit(model, hub, fault):
    hub.faults.append(fault)
    report, _, _ = push(model)
    assert hub.commits(REPO) == 1
    assert report.commit == hub.sha(REPO)
    assert set(hub.files(REPO)) == {file.name for file in plan_push(model, REPO).files} | {".gitattributes"}


def test_a_silent_hub_is_given_up(model, hub, monkeypatch):
    monkeypatch.setattr("nsa_convert.push.SILENCE", 0.5)
    hub.faults.append(Fault(COMMIT, -1, 1))
    report, told, _ = push(model)
    assert hub.commits(REPO) == 1
    assert any("broke" in line for line in told)


def test_hb17_a_damaged_arrival_does_not_load(model, hub):
    hub.corrupt = "model-sparse.safetensors"
    with pytest.raises(HubError, match="arrived damaged") as caught:
        push(model)
    assert caught.value.code == "HB17"
    assert "config.json" not in hub.files(REPO)


def test_hb15_the_hub_refuses_the_card(model, hub):
    card = model / "README.md"
    card.write_text(card.read_text().replace("license: apache-2.0", "license: made-up"))
    with pytest.raises(ConfigError, match="must be one of") as caught:
        push(model)
    assert caught.value.code == "HB15"
    assert hub.commits(REPO) == 0


def test_hb01_no_token(model, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(HubError, match="no token"):
        push(model)
    assert hub.log == []


def test_hb12_offline(model, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="OFFLINE") as caught:
        push(model)
    assert caught.value.code == "HB12"


def command(model, hub, *words):
    return [sys.executable, "-m", "nsa_convert.cli", "push", str(model), REPO, *words], {
        **outside(hub), "PYTHONPATH": str(ROOT),
    }


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


def test_hb19_hb20_the_command(model, hub, tmp_path):
    words, env = command(model, hub, "--json")
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120, check=False)
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


def test_dry_run_lists_and_sends_nothing(model, hub):
    result = CliRunner().invoke(main, ["push", str(model), REPO, "--public", "--dry-run"])
    assert result.exit_code == 0, result.stderr
    assert "README.md" in result.stdout
    assert "PUBLIC" in result.stdout
    assert hub.log == []


def test_card_command(model):
    result = CliRunner().invoke(main, ["card", str(model), "--json", "--name", "Other"])
    assert result.exit_code == 0, result.stderr
    assert len(json.loads(result.stdout)["evaluations"]) == 1
    assert "# Other" in (model / "README.md").read_text()
