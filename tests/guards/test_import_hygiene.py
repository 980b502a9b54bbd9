"""Importing the package is free of side effects, whatever else is imported before or after it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.marks import slow

ROOT = Path(__file__).parents[2]


def run_python(code: str) -> dict:
    """Run code in a fresh interpreter; it must bind ``out``, which comes back."""
    script = f"import json, sys\n{code}\nprint(json.dumps(out))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


LOADED = "out = [name for name in ('torch', 'transformers', 'triton', 'matplotlib') if name in sys.modules]"


MODULES = ["nsa_convert", "nsa_convert.cli", "nsa_convert.errors", "nsa_convert.config"]


@pytest.mark.parametrize("module", MODULES)
def test_import_loads_nothing_heavy(module):
    assert run_python(f"import {module}\n{LOADED}") == []


def test_inspect_imports_neither_the_compiler_nor_transformers():
    heavy = "('torch._dynamo', 'transformers', 'triton', 'sympy')"
    code = f"import nsa_convert.inspection\nout = [name for name in {heavy} if name in sys.modules]"
    assert run_python(code) == []


def test_heavy_import_would_be_seen():
    assert "torch" in run_python(f"import nsa_convert.patterns\n{LOADED}")


def test_import_configures_no_logging_and_no_warnings():
    state = "(list(map(repr, logging.root.handlers)), logging.root.level, len(warnings.filters))"
    code = f"import logging, warnings\nbefore = {state}\nimport nsa_convert\nout = [before == {state}]"
    assert run_python(code) == [True]


CLASSES = ["NSALlamaForCausalLM", "NSAMistralForCausalLM", "NSAQwen2ForCausalLM", "NSAQwen3ForCausalLM"]
MAKE_ONE_OF_EACH = """
from transformers import AutoConfig, AutoModelForCausalLM
sizes = dict(
    vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, sliding_window=None, sparse_attention={"default": {"method": "nsa"}},
)
out = []
for name in ("llama", "mistral", "qwen2", "qwen3"):
    config = AutoConfig.for_model(f"nsa_{name}", **sizes)
    out.append(type(AutoModelForCausalLM.from_config(config)).__name__)
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import nsa_convert",
        slow("from transformers import AutoModelForCausalLM\nimport nsa_convert"),
        slow("import nsa_convert, transformers"),
    ],
)
def test_model_types_are_registered_in_any_import_order(imports):
    assert run_python(f"{imports}\n{MAKE_ONE_OF_EACH}") == CLASSES


def test_model_types_are_unknown_without_the_package():
    with pytest.raises(AssertionError, match="Unrecognized model identifier: nsa_llama"):
        run_python(MAKE_ONE_OF_EACH)
