"""A saved model loads where this package is not installed, and with it without trust_remote_code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nsa_convert.patch.remote_code import code_files
from tests.models import FAMILIES, VARIANTS, tokens, trained_model

ROOT = Path(__file__).parents[2]

BARE = """
import json, sys, torch
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "nsa_convert":
            raise ImportError("nsa_convert is not installed here")
sys.meta_path.insert(0, Block())
from transformers import AutoModel, AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    saved = torch.load(folder + "/expected.pt")
    with torch.no_grad():
        assert torch.equal(model(saved["ids"]).logits, saved["logits"]), folder
    assert torch.equal(model.generate(saved["ids"], max_new_tokens=4, do_sample=False), saved["generated"])
    assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__.endswith("Model")
    model.save_pretrained(folder + "-again")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = []
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp("models") / family
        model = trained_model(
            family, VARIANTS["nsa-learned-before-rope" if family == "llama" else "nsa"]
        ).float()
        model.save_pretrained(folder)
        ids = tokens(2, 90)
        with torch.no_grad():
            logits = model(ids).logits
            generated = model.generate(ids, max_new_tokens=4, do_sample=False)
        torch.save({"ids": ids, "logits": logits, "generated": generated}, folder / "expected.pt")
        folders.append(folder)
    return folders


def test_loads_without_the_package(saved: list[Path], tmp_path: Path) -> None:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", BARE, *map(str, saved)],
        capture_output=True,
        text=True,
        env=env,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for folder in saved:
        again = Path(f"{folder}-again")
        for name in code_files(json.loads((folder / "config.json").read_text())["model_type"]):
            assert (again / name).read_text() == (folder / name).read_text()
        auto_map = json.loads((again / "config.json").read_text())["auto_map"]
        assert auto_map == json.loads((folder / "config.json").read_text())["auto_map"]


def test_loads_with_the_package_and_no_flag(saved: list[Path], tmp_path: Path) -> None:
    for folder in saved:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert type(model).__module__ == "nsa_convert.patch.models"
        expected = torch.load(folder / "expected.pt")
        with torch.no_grad():
            assert torch.equal(model(expected["ids"]).logits, expected["logits"])
        model.save_pretrained(tmp_path / folder.name)
        for file in folder.glob("*.py"):
            assert (tmp_path / folder.name / file.name).read_text() == file.read_text()


def test_code_files_stand_alone() -> None:
    files = code_files("nsa_llama")
    assert {"configuration_nsa_llama.py", "modeling_nsa_llama.py"} <= files.keys()
    for name, text in files.items():
        compile(text, name, "exec")
        for line in text.splitlines():
            words = line.split()
            if words[:1] == ["from"] and words[1].startswith("."):
                assert f"{words[1][1:]}.py" in files, f"{name}: {line}"
            assert not line.strip().startswith(("from nsa_convert", "import nsa_convert")), f"{name}: {line}"


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
