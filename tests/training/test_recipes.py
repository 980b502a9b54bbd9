"""Every recipe parses strictly and plans; data positions and mixtures are exact."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import transformers
from click.testing import CliRunner

from nsa_convert.cli import main
from nsa_convert.cli.training import recipes
from nsa_convert.errors import ConfigError, UsageError
from nsa_convert.methods.parts.registry import METHODS
from nsa_convert.training.data.documents import Order
from nsa_convert.training.data.rows import PackedRows, collate
from nsa_convert.training.recipe.library import known_recipes
from nsa_convert.training.recipe.schema import Recipe, read_recipe, recipe_from_dict
from nsa_convert.training.recipe.sections import FreshModel
from nsa_convert.training.run.forecast import forecast_recipe
from nsa_convert.training.run.models import fresh_tokenizer, read_start
from nsa_convert.training.run.parallel import can_shard, planned
from nsa_convert.training.run.stages import data_order
from tests.published.bases import BASES
from tests.training.recipes import NSA, recipe, recipe_values, stage

ROOT = Path(__file__).parents[2]
ALL = known_recipes()
TINY = [name for name in ALL if name.startswith("tiny/")]


def write_config(folder: Path, model: str) -> Path:
    """Write what config.json of a base model says; a plan needs no weight."""
    base = BASES[model]
    transformers.AutoConfig.for_model(base.family, **base.config()).save_pretrained(folder)
    return folder


def test_there_is_a_recipe_for_every_promised_pair():
    models = (
        "llama/3.2-1b",
        "llama/3.1-8b",
        "qwen3/0.6b",
        "qwen3/4b",
        "qwen3/8b",
        "qwen2/2.5-7b",
        "smollm2/135m",
    )
    methods = ("nsa", "ssa", "infllm_v2", "dsa")
    assert {f"{model}_{method}" for model in models for method in methods} <= set(ALL)
    tiny = (*methods, "moba", "msa", "hybrid", "extend", "lora", "dense")
    assert {f"tiny/{name}" for name in tiny} <= set(TINY)


@pytest.mark.parametrize("name", ALL)
def test_recipe_parses_and_says_how_to_run_it(name):
    text = ALL[name].read_text()
    first, *rest = text.splitlines()
    assert first.startswith("# ")
    assert any(line == f"#   nsa-convert train {name}" or f"train {name}" in line for line in rest)
    read = read_recipe(ALL[name])
    assert recipe_from_dict(read.to_dict()) == read


@pytest.mark.parametrize("name", [name for name in ALL if name.split("/")[0] not in ("tiny", "recovery")])
def test_big_recipes_plan(name, tmp_path, monkeypatch):
    monkeypatch.setattr("nsa_convert.training.run.forecast.source_notes", lambda *_, **__: [])
    monkeypatch.setattr("nsa_convert.training.run.forecast.stage_lengths", lambda *_: None)
    read = read_recipe(ALL[name])
    if planned(read).sharded and not can_shard():
        pytest.skip("this transformers trains no models that are cut")
    start = read_start(read, write_config(tmp_path, read.model))
    plan = forecast_recipe(read, start, ROOT, parallel=planned(read))
    assert all(stage.steps >= 100 for stage in plan.stages)
    assert not any("fit the visible budget" in line for line in plan.warnings)
    assert plan.parameters > 1e8


PRECISIONS = get_args(get_type_hints(Recipe)["precision"])
TRAINED = [name for name, method in METHODS.items() if method.spec.trainable and f"tiny/{name}" in ALL]


QUICK = {("dsa", "bf16"), ("nsa", "bf16-mixed")}


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param(name, kind, marks=() if (name, kind) in QUICK else pytest.mark.slow)
        for name in TRAINED
        for kind in PRECISIONS
    ],
)
def test_every_trainable_method_trains_in_every_precision(name, precision, tmp_path):
    """As a user types it, shortened to one step of each stage."""
    read = read_recipe(ALL[f"tiny/{name}"])
    words = ["train", f"tiny/{name}", "--set", f"precision={precision}", "--set", f"out={tmp_path / 'run'}"]
    for one in read.stages:
        words += ["--set", f"stages.{one.name}.tokens={one.batch_tokens}"]
        words += ["--set", f"stages.{one.name}.log_every=1"]
    done = CliRunner().invoke(main, [*words, "--set", "report_to=none"])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    # A line is of training, or of an evaluation.
    values = [row["loss"] if "loss" in row else row["eval_loss"] for row in rows]
    assert all(math.isfinite(value) for value in values)


def test_every_trainable_method_has_a_tiny_recipe():
    assert {name for name, method in METHODS.items() if method.spec.trainable} <= set(TRAINED)


def test_recipes_are_listed_and_shown():
    run = CliRunner()
    assert "tiny/nsa" in run.invoke(recipes, []).output
    assert run.invoke(recipes, ["show", "tiny/nsa"]).output == ALL["tiny/nsa"].read_text()
    assert run.invoke(recipes, ["copy", "tiny/nsa"]).exit_code == 2
    assert isinstance(run.invoke(recipes, ["show"]).exception, UsageError)
    wrong = run.invoke(recipes, ["show", "tiny/extnd"]).exception
    assert "did you mean 'tiny/extend'" in str(wrong)


def rows_of(values, seq_len=32, seed=0):
    read = recipe_from_dict(values)
    assert isinstance(read.model, FreshModel)
    return PackedRows(read.stages[0].data, fresh_tokenizer(read, ROOT), seq_len, Order(seed=seed), ROOT)


def test_a_position_is_found_again_and_shares_are_exact(tmp_path):
    data = [{"kind": "recall", "pairs": 4, "weight": 3}, {"kind": "reference", "weight": 1}]
    values = recipe_values(tmp_path, None, stage(data=data))
    rows = rows_of(values)
    stream = iter(rows)
    first = [next(stream) for _ in range(40)]
    shares = [cursor.emitted for cursor in rows.lane(0).cursors]
    assert abs(shares[0] / sum(shares) - 0.75) < 0.02
    other = rows_of(values)
    stream = iter(other)
    assert [next(stream) for _ in range(17)] == first[:17]
    state = json.loads(json.dumps(other.state()))
    again = rows_of(values)
    again.restore(state)
    stream = iter(again)
    assert [next(stream) for _ in range(23)] == first[17:]
    prose = recipe_values(tmp_path, None, stage(data=data[1:]))
    assert next(iter(rows_of(prose, seed=1))) != next(iter(rows_of(prose, seed=0)))


def test_the_order_follows_the_name_of_a_stage_not_its_number(tmp_path):
    align = stage("align", kind="align", train="new")
    long = recipe_from_dict(recipe_values(tmp_path, NSA, align, stage()))
    short = recipe_from_dict(recipe_values(tmp_path, None, stage()))
    assert data_order(long, 1) == data_order(short, 0) != data_order(long, 0)


def test_rows_hold_whole_pieces_and_first_tokens_have_no_label(tmp_path):
    stream = iter(rows_of(recipe_values(tmp_path, None)))
    batch = collate([next(stream) for _ in range(6)])
    assert batch["input_ids"].shape == (6, 32)
    begins = batch["position_ids"] == 0
    assert bool(begins[:, 0].all())
    assert bool((batch["labels"][begins] == -100).all())
    assert bool((batch["labels"][~begins] == batch["input_ids"][~begins]).all())


def test_a_fresh_model_whose_first_stage_is_chats_has_a_tokenizer():
    """Learned on what the turns say."""
    recipe = read_recipe(ALL["tiny/sft"])
    tokenizer = fresh_tokenizer(recipe, ALL["tiny/sft"].parent)
    text = json.loads(ALL["tiny/sft"].with_name("chats.jsonl").read_text().splitlines()[0])["messages"][0]
    assert 257 < len(tokenizer) <= recipe.model.vocab
    assert len(tokenizer(text["content"])["input_ids"]) < len(text["content"].encode())


def test_text_files_of_every_kind(tmp_path):
    datasets = pytest.importorskip("datasets")
    texts = [f"document {i} " * 9 for i in range(6)]
    datasets.Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"body": texts}).to_json(tmp_path / "a.jsonl")
    (tmp_path / "books").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "books" / f"{i}.txt").write_text(text)
    for data in (
        {"kind": "parquet", "path": "a.parquet"},
        {"kind": "jsonl", "path": "a.jsonl", "column": "body"},
        {"kind": "text", "path": "books"},
        {"kind": "text", "path": "books/*.txt", "hold_out": 0.3},
    ):
        read = recipe(tmp_path / "run", None, stage(data=[data]))
        rows = PackedRows(read.stages[0].data, fresh_tokenizer(read, tmp_path), 32, Order(), tmp_path)
        stream = iter(rows)
        text = rows.tokenizer.decode([i for _ in range(20) for i in next(stream)["input_ids"]])
        found = {i for i in range(6) if f"document {i}" in text}
        assert len(found) == (4 if "hold_out" in data else 6)
    (tmp_path / "books" / "0.txt").write_text("changed")
    changed = PackedRows(read.stages[0].data, rows.tokenizer, 32, Order(), tmp_path)
    with pytest.raises(ConfigError, match="training data changed"):
        changed.restore(rows.state())
