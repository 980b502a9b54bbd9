"""What a push sends and leaves; tests/faults/test_hub.py has what goes wrong."""

import hashlib
import json
import shutil
import subprocess
import sys
import tomllib

import pytest
import torch
from click.testing import CliRunner

from nsa_convert.cli import main
from nsa_convert.errors import CheckFailedError, CheckpointError, ConfigError, UsageError
from nsa_convert.evaluation.models import load_model
from nsa_convert.loading import load_tokenizer
from nsa_convert.push import plan_push
from tests.checkpoints import edit_json
from tests.flat_code import make_flat
from tests.pushing import BLOB, REPO, ROOT, TOKEN, hub, model, original, outside, push

__all__ = ["hub", "model", "original"]

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
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)
ids = tokenizer("Sixty bytes of text, so that some keys are hidden, not more.", return_tensors="pt").input_ids
out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
assert "nsa_convert" not in sys.modules
print(type(model).__module__.split(".")[0], *out[0, ids.shape[1]:].tolist())
"""


def load_back(hub, folder, python=sys.executable):
    env = outside(hub, HF_HOME=str(folder), HF_MODULES_CACHE=str(folder / "modules"))
    command = [str(python), "-I", "-c", LOAD, REPO]
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=600, check=False, stdin=subprocess.DEVNULL
    )


@pytest.mark.slow
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
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=600)
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
        capture_output=True, text=True, check=True, timeout=600,
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


def test_a_folder_of_an_earlier_version_goes_with_its_own_code(model):
    flat = make_flat(model, "nsa_llama")
    plan = plan_push(model, REPO, allow_unevaluated=True)
    assert {file.name for file in plan.files if file.name.endswith(".py")} == set(flat)


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
