"""What the table of sharings says runs trains what one process trains; what it refuses has its reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from nsa_convert.training.recipe.schema import recipe_from_dict
from nsa_convert.training.run.parallel import can_shard
from nsa_convert.training.run.runner import train_recipe
from tests.training.combinations import PROCESSES, SHARINGS, WORK, refusal, values
from tests.training.processes import launch
from tests.training.recipes import ROOT

pytestmark = pytest.mark.skipif(not can_shard(), reason="this transformers trains no models that are cut")
LIMITS = {"fp32": 1e-5, "bf16-mixed": 0.02, "bf16": 0.02}
"""Precision -> largest difference of a loss from that of one process: the order of sums, rounded."""


@pytest.mark.slow
@pytest.mark.parametrize("work", WORK)
def test_every_pair_that_runs_trains_what_one_process_trains(work, tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("trl")
    sharings = [name for name in SHARINGS if refusal(work, name) is None]
    jobs = [
        {"recipe": values(tmp_path / str(n), work, name), "stop_at": None, "resume": False}
        for n, name in enumerate(sharings)
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    launch(["-m", "tests.training.run_worker", str(tmp_path)], PROCESSES)

    alone = tmp_path / "alone"
    recipe = recipe_from_dict(values(alone, work, None))
    train_recipe(recipe, None, base=ROOT)
    limit, want = LIMITS[recipe.precision], losses_and_names(alone)
    name = recipe.stages[0].name
    for n, sharing in enumerate(sharings):
        found = losses_and_names(tmp_path / str(n))
        assert found == pytest.approx(want, abs=limit), sharing
        got, right = (
            load_file(place / name / "model/model.safetensors") for place in (tmp_path / str(n), alone)
        )
        assert got.keys() == right.keys()
        if recipe.precision == "fp32":
            assert max(float((got[key] - right[key]).abs().max()) for key in got) < limit, sharing


def losses_and_names(out: Path) -> dict[tuple[str, int], float]:
    """Return the loss of every step of a run, and each held-out loss."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    found = {(row["stage"], row["step"]): row["loss"] for row in rows if "loss" in row}
    return found | {("held out", row["step"]): row["eval_loss"] for row in rows if "eval_loss" in row}


def test_a_refused_pair_names_both():
    assert "tensor 2 and context 2 cannot be combined" in (
        refusal("a dense model", "`tensor`, `context`") or ""
    )
    assert "train: lora" in (refusal("`pretrain`, LoRA", "`tensor`") or "")
    assert refusal("`pretrain`, all weights", "`fsdp`, `context`") is None
