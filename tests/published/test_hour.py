"""The recipe of the run in docs/recovery.md that watches itself: evaluates, keeps the best, compares."""

from __future__ import annotations

import json

from nsa_convert.training.recipe.schema import read_recipe
from nsa_convert.training.run.runner import train_recipe
from tests.training.recipes import FRESH, ROOT

FILE = ROOT / "benchmarks" / "smollm2_hour.yaml"


def test_the_recipe_of_the_hour_shows_its_curve_and_keeps_the_best(tmp_path):
    """On a model of a few thousand weights and rows of 64 tokens; all else as it stands."""
    whole = read_recipe(FILE)
    changes = {"model": {**FRESH, "config": {**FRESH["config"], "max_position_embeddings": 128}}}
    changes |= {"out": str(tmp_path), "report_to": "none"}
    changes |= {"sparse_attention.default.compression_block": 4, "sparse_attention.default.block_size": 4}
    changes |= {"sparse_attention.default.compression_stride": 2, "sparse_attention.default.window_size": 4}
    for stage in whole.stages:
        rows = {"seq_len": 64, "tokens": 64 * stage.steps, "batch_tokens": 64}
        changes |= {f"stages.{stage.name}.{key}": value for key, value in rows.items()}

    short = read_recipe(FILE, changes)
    assert [stage.steps for stage in short.stages] == [stage.steps for stage in whole.stages]
    report = train_recipe(short, None, base=FILE.parent)

    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for stage in whole.stages:
        seen = [row["step"] for row in lines if row["stage"] == stage.name and "eval_loss" in row]
        assert seen == list(range(0, stage.steps + 1, stage.eval_every))

        # What is kept is the best of what was evaluated, the start among it.
        facts = report.stages[stage.name]
        best = min(facts["evaluations"], key=lambda row: row[f"eval_{stage.keep_best}"])
        assert facts["weights_of_step"] in (best["step"], stage.steps)
    assert "held out" in report.to_text()
