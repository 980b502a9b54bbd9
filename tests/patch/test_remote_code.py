"""A saved model loads where this package is not installed, and with it without trust_remote_code."""

from __future__ import annotations

import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nsa_convert import __version__
from nsa_convert.methods.parts.registry import METHODS, STRUCTURES
from nsa_convert.patch.remote_code import CODE_FILES, code_files
from tests.flat_code import make_flat
from tests.marks import slow, these_quick
from tests.models import DSA, EVERY, FAMILIES, MOBA, NSA, SSA, STREAMING, VARIANTS, tokens, trained_model

ROOT = Path(__file__).parents[2]

PREAMBLE = """
import json, sys, torch
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "nsa_convert":
            raise ImportError("nsa_convert is not installed here")
sys.meta_path.insert(0, Block())
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
"""
LOAD = """
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    saved = torch.load(folder + "/expected.pt")
    with torch.no_grad():
        assert torch.equal(model(saved["ids"]).logits, saved["logits"]), folder
    assert torch.equal(model.generate(saved["ids"], max_new_tokens=4, do_sample=False), saved["generated"])
    assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__.endswith("Model")
    model.save_pretrained(folder + "-again")
"""


def run_without_package(script: str, scratch: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Run a script that cannot import this package; copied code goes to ``scratch``."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules")}
    command = [sys.executable, "-c", PREAMBLE + script, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=env, cwd=scratch, stdin=subprocess.DEVNULL
    )


def saved_model(folder: Path, family: str, plan: dict) -> Path:
    """Save a tiny model, and what it computes."""
    model = trained_model(family, plan).float()
    model.save_pretrained(folder)
    ids = tokens(2, 90)
    with torch.no_grad():
        logits = model(ids).logits
        generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    torch.save({"ids": ids, "logits": logits, "generated": generated}, folder / "expected.pt")
    return folder


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base = tmp_path_factory.mktemp("models")
    plans = {family: "nsa-learned-before-rope" if family == "llama" else "nsa" for family in FAMILIES}
    return [saved_model(base / family, family, VARIANTS[name]) for family, name in plans.items()]


def test_loads_without_the_package(saved: list[Path], tmp_path: Path) -> None:
    done = run_without_package(LOAD, tmp_path, *saved)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder in saved:
        again = Path(f"{folder}-again")
        names = {path.name for path in again.glob("*.py")}
        assert names == set(code_files(config_of(folder)))
        for name in names:
            assert (again / name).read_text() == (folder / name).read_text()
        assert config_of(again)["auto_map"] == config_of(folder)["auto_map"]


def test_loads_with_the_package_and_no_flag(saved: list[Path], tmp_path: Path) -> None:
    for folder in saved:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert type(model).__module__ == "nsa_convert.patch.models"
        expected = torch.load(folder / "expected.pt")
        with torch.no_grad():
            assert torch.equal(model(expected["ids"]).logits, expected["logits"])
        names = model.config.auto_map
        model.config.auto_map = {auto: f"somebody/model--{name}" for auto, name in names.items()}
        model.save_pretrained(tmp_path / folder.name)
        assert config_of(tmp_path / folder.name)["auto_map"] == names
        for file in folder.glob("*.py"):
            assert (tmp_path / folder.name / file.name).read_text() == file.read_text()


def test_a_folder_of_an_earlier_version_loads(saved: list[Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved[0], tmp_path / "flat")
    make_flat(folder, "nsa_llama")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = torch.load(folder / "expected.pt")
    with torch.no_grad():
        assert torch.equal(model(expected["ids"]).logits, expected["logits"])
    done = run_without_package(LOAD, tmp_path, folder)
    assert done.returncode == 0, done.stderr[-3000:]


OTHER_PLAN = """
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("rules", [[], slow([{**NSA, "layers": [0], "heads": [1]}])])
def test_a_plan_that_the_code_was_not_written_for_is_refused(
    saved: list[Path], tmp_path: Path, rules: list
) -> None:
    config = config_of(saved[0])
    if rules:
        config["sparse_attention"]["rules"] = [{**config["sparse_attention"]["default"], **rules[0]}]
    else:
        config["sparse_attention"]["default"] = MOBA
    shutil.copytree(saved[0], tmp_path / "edited")
    (tmp_path / "edited" / "config.json").write_text(json.dumps(config))
    done = run_without_package(OTHER_PLAN, tmp_path, tmp_path / "edited")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"asked for (nsa), not '{'hybrid' if rules else 'moba'}': install nsa_convert" in done.stdout


TOKENIZER = """
folder, modules = sys.argv[1], sys.argv[2]
for given in ({}, {"trust_remote_code": False}):
    tokenizer = AutoTokenizer.from_pretrained(folder, **given)
    print(type(tokenizer).__name__, tokenizer("<5> <6> <7>").input_ids)
import os
assert not [name for name in sys.modules if name.startswith("transformers_modules.")]
assert not any(name.endswith(".py") and "nsa" in name for _, _, names in os.walk(modules) for name in names)
trusting = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
assert type(trusting) is type(tokenizer)
assert trusting._tokenizer.to_str() == tokenizer._tokenizer.to_str()
"""


@pytest.mark.parametrize("named", [True, slow(False)])
def test_the_tokenizer_needs_no_code(saved: list[Path], tmp_path: Path, named: bool) -> None:
    """Where nobody can be asked, transformers takes the missing flag for a no; with False it never asks."""
    folder = shutil.copytree(saved[0], tmp_path / "folder")
    vocabulary = {f"<{i}>": i for i in range(128)}
    part = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<0>"}
    parts = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": part,
    }
    (folder / "tokenizer.json").write_text(json.dumps(parts))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} if named else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    done = run_without_package(TOKENIZER, tmp_path, folder, tmp_path / "modules")
    assert done.returncode == 0, done.stderr[-3000:]
    here = AutoTokenizer.from_pretrained(folder)
    assert here("<5> <6> <7>").input_ids == [5, 6, 7]
    without, refused = done.stdout.splitlines()[-2:]
    assert refused == f"{type(here).__name__} [5, 6, 7]"
    assert without.endswith(refused)  # behind the question, which nobody answered


# One plan for each method, and hybrids: each part of a plan has to find the code it needs.
PLANS = {settings["method"]: settings for settings in EVERY.values() if "rules" not in settings}
PLANS |= {
    "full": {"method": "full"},
    "hybrid": VARIANTS["hybrid"],
    "phases": {
        **EVERY["xattention"],
        "rules": [{**EVERY["streaming-evict"], "phase": "decode"}],
    },
    "layers": {**SSA, "rules": [{**STREAMING, "layers": [0]}, {**DSA, "layers": [1], "index_key": "shared"}]},
}


EVERYTHING = "every method"
"""A plan that names every method, so that every name that two modules share is in one copy."""
PLANS[EVERYTHING] = {
    "method": "full",
    "rules": [
        {**plan, "layers": [layer], "heads": [0]}
        for layer, (name, plan) in enumerate(PLANS.items())
        if name in METHODS
    ]
    + [{"method": "full", "phase": "decode"}],
}


@functools.cache
def files_of(plan: str) -> dict[str, str]:
    """Return the code files of a plan for Llama."""
    default = dict(PLANS[plan])
    rules = default.pop("rules", [])
    return code_files({"model_type": "nsa_llama", "sparse_attention": {"default": default, "rules": rules}})


def import_copy(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import code files as the modules of a package; names of the installed one are not to be found."""
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(folder.parent))
    return importlib.import_module(f"{folder.name}.{name}")


@pytest.mark.parametrize(
    "plan",
    these_quick((plan for plan in PLANS if plan != EVERYTHING), ["nsa", "infllm", "phases", "layers"]),
)
def test_the_copy_computes_what_the_package_does(
    plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained_model("llama", PLANS[plan])
    folder = tmp_path / f"copy_{list(PLANS).index(plan)}"
    folder.mkdir()
    for name, text in files_of(plan).items():
        (folder / name).write_text(text)
    code = import_copy(folder, "modeling_nsa_llama", monkeypatch)
    config = code.NSALlamaConfig.from_dict(model.config.to_dict())
    other = code.NSALlamaForCausalLM(config).to(torch.float64).eval()
    other.load_state_dict(model.state_dict())
    ids = tokens(2, 60)
    with torch.no_grad():
        for given in (
            {"use_cache": False},
            {"attention_mask": (ids > 0).long().index_fill(1, torch.arange(3), 0)},
        ):
            assert torch.equal(other(ids, **given).logits, model(ids, **given).logits)
        made = {"max_new_tokens": 5, "do_sample": False}
        assert torch.equal(other.generate(ids, **made), model.generate(ids, **made))

    ids = ids[:, :48]
    losses = [m.train()(ids, labels=ids, use_cache=False).loss for m in (model, other)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    grads = [dict(m.named_parameters()) for m in (model, other)]
    for name, parameter in grads[0].items():
        mine, theirs = parameter.grad, grads[1][name].grad
        assert (mine is None) == (theirs is None), name
        assert mine is None or torch.equal(mine, theirs), name


def test_every_method_and_structure_has_a_plan_here() -> None:
    assert {*METHODS, *STRUCTURES} <= PLANS.keys()


def test_three_files_stand_alone(tmp_path: Path) -> None:
    for place, plan in enumerate(PLANS):
        files = files_of(plan)
        print(f"{plan}: {len(files)} files, {sum(text.count(chr(10)) for text in files.values())} lines")
        assert list(files) == [f"{kind}_nsa_llama.py" for kind in CODE_FILES]
        (tmp_path / str(place)).mkdir()
        for name, text in files.items():
            (tmp_path / str(place) / name).write_text(text)
            assert f"Written by nsa_convert {__version__}" in text
            for line in text.splitlines():
                assert not line.strip().startswith(("from nsa_convert", "import nsa_convert")), line
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F,E9,PLE", str(tmp_path)]
    done = subprocess.run(ruff, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


FROM_CONFIG = """
from tests.models import SSA, trained_model
model = trained_model("qwen3", SSA)
from transformers import AutoModelForCausalLM
assert type(AutoModelForCausalLM.from_config(model.config)) is type(model)
"""


@pytest.mark.slow
def test_reload_from_the_config_of_a_patched_model() -> None:
    # In a new process: another test may have made the Auto classes know the models already.
    done = subprocess.run([sys.executable, "-c", FROM_CONFIG], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
