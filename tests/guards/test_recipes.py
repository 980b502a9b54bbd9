"""Every recipe parses strictly, opens with its commands, fits its model, and has a twin for a CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nsa_convert.cli.training import known_recipes
from nsa_convert.config import AttentionGeometry
from nsa_convert.patch.plan import resolve_plan
from nsa_convert.training.losses import loss_problems
from nsa_convert.training.recipe import read_recipe

ROOT = Path(__file__).parents[2]
RECIPES = known_recipes()
MODELS = (
    "llama/3.2-1b", "llama/3.1-8b", "qwen3/0.6b", "qwen3/4b", "qwen3/8b", "qwen2/2.5-7b", "smollm2/135m"
)
GEOMETRIES = {  # of the models that recipes name: layers, hidden, query heads, key/value heads, head dim
    "meta-llama/Llama-3.2-1B": (16, 2048, 32, 8, 64),
    "meta-llama/Llama-3.1-8B": (32, 4096, 32, 8, 128),
    "Qwen/Qwen3-0.6B-Base": (28, 1024, 16, 8, 128),
    "Qwen/Qwen3-4B-Base": (36, 2560, 32, 8, 128),
    "Qwen/Qwen3-8B-Base": (36, 4096, 32, 8, 128),
    "Qwen/Qwen2.5-7B": (28, 3584, 28, 4, 128),
    "HuggingFaceTB/SmolLM2-135M": (30, 576, 9, 3, 64),
}


def sizes(model: object) -> tuple[int, AttentionGeometry] | None:
    """Return the layers and the geometry of a recipe's model; None for a model that another recipe makes."""
    if isinstance(model, str):
        if model not in GEOMETRIES:
            return None
        layers, hidden, heads, kv_heads, dim = GEOMETRIES[model]
    else:
        config = model.config
        layers, hidden = config["num_hidden_layers"], config["hidden_size"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        dim = config.get("head_dim", hidden // heads)
    return layers, AttentionGeometry(
        hidden_size=hidden, num_query_heads=heads, num_kv_heads=kv_heads, head_dim=dim
    )


@pytest.mark.parametrize("name", RECIPES)
def test_parses_and_fits_its_model(name: str) -> None:
    recipe = read_recipe(RECIPES[name])
    found = sizes(recipe.model)
    if recipe.plan is None or found is None:
        return
    methods = resolve_plan(recipe.plan, *found)
    for stage in recipe.stages:
        assert not loss_problems(stage, methods), stage.name


@pytest.mark.parametrize("name", RECIPES)
def test_opens_with_its_own_commands(name: str) -> None:
    head = "".join(line for line in RECIPES[name].read_text().splitlines(True) if line.startswith("#"))
    assert f"train {name}" in head
    assert "--dry-run" in head


def test_every_method_has_a_twin_for_a_cpu() -> None:
    named = {"nsa", "ssa", "infllm_v2", "dsa"}
    for model in MODELS:
        assert {n.removeprefix(f"{model}_") for n in RECIPES if n.startswith(f"{model}_")} == named
    assert {*named, "moba", "msa", "hybrid"} <= {n.removeprefix("tiny/") for n in RECIPES if n.startswith("tiny/")}


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in RECIPES if n.startswith("tiny/")])
def test_tiny_recipes_run_end_to_end(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nsa_convert.cli", "train", name, "--set", f"out={tmp_path / 'run'}"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "the trained model" in done.stdout + done.stderr
