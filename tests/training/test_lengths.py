"""What teaches selection: classes of document lengths, recall over rows, the share beyond the budget."""

from __future__ import annotations

import dataclasses
import json
from itertools import islice
from pathlib import Path

import pytest

from nsa_convert.errors import ConfigError
from nsa_convert.evaluation.tasks.contamination import seen_in_training
from nsa_convert.evaluation.tasks.text import default_texts
from nsa_convert.training.data.documents import Order
from nsa_convert.training.data.rows import PackedRows, check_enough
from nsa_convert.training.data.sources import open_source, recall_text
from nsa_convert.training.recipe.schema import recipe_from_dict
from nsa_convert.training.recipe.sections import Source
from nsa_convert.training.run.forecast import forecast_recipe
from nsa_convert.training.run.lengths import Lengths, sample_lengths
from nsa_convert.training.run.models import read_start
from nsa_convert.training.run.stages import data_order
from tests.published.bases import byte_tokenizer
from tests.training.recipes import NSA, recipe_values, stage


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a folder with documents of 9, 99 and 399 bytes, an end token each: 10, 100 and 400 tokens."""
    rows = [{"text": str(i % 10) * (size - 1)} for i in range(30) for size in (10, 100, 400)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def rows_of(folder: Path, *data: dict, seq_len: int = 200, lanes: int = 1) -> PackedRows:
    sources = [Source(**{"kind": "jsonl", "path": "a.jsonl", **one}) for one in data]
    return PackedRows(sources, byte_tokenizer(), seq_len, Order(), folder, lanes)


def pieces(rows: PackedRows, count: int) -> list[int]:
    """Return the lengths of the documents' parts in rows."""
    found: list[int] = []
    for row in (row["position_ids"] for row in islice(iter(rows), count)):
        begins = [place for place, position in enumerate(row) if position == 0] + [len(row)]
        found += [end - begin for begin, end in zip(begins, begins[1:], strict=False)]
    return found


def test_classes_of_lengths_mix_by_tokens(folder):
    classes = [{"max_tokens": 10}, {"min_tokens": 11, "max_tokens": 100}, {"min_tokens": 101}]
    rows = rows_of(folder, *classes, lanes=2)
    found = list(islice(iter(rows), 60))
    both = [rows.lane(lane).cursors for lane in (0, 1)]
    for cursors in both:
        shares = [cursor.emitted / (30 * 200) for cursor in cursors]
        assert all(abs(share - 1 / 3) < 0.04 for share in shares)

    # Two of three documents are of another class; few are read of the longest, so both lanes count together.
    for one, other in zip(*both, strict=True):
        skipped = one.skipped + other.skipped
        assert 0.5 < skipped / (skipped + one.documents + other.documents) < 0.8
    assert len(found) == 60


def test_a_class_keeps_its_documents_alone(folder):
    assert set(pieces(rows_of(folder, {"max_tokens": 10}), 20)) == {10}
    assert max(pieces(rows_of(folder, {"min_tokens": 400}), 20)) == 200
    assert set(pieces(rows_of(folder, {"min_tokens": 100, "max_tokens": 100}), 20)) == {100}


def test_a_class_is_resumed_exactly(folder):
    data = [{"min_tokens": 100}, {"max_tokens": 10}]
    rows = rows_of(folder, *data, lanes=2)
    stream = iter(rows)
    first = [next(stream) for _ in range(9)]
    state = json.loads(json.dumps(rows.state()))
    expected = [next(stream) for _ in range(9)]
    again = rows_of(folder, *data, lanes=2)
    again.restore(state)
    assert list(islice(iter(again), 9)) == expected != first
    assert again.state() == rows.state()


def test_too_little_of_a_class_is_refused(folder):
    with pytest.raises(ConfigError, match="takes 500 of it") as caught:
        check_enough([Source(kind="jsonl", path="a.jsonl", min_tokens=401)], byte_tokenizer(), 500, folder)
    assert caught.value.code == "DA06"
    check_enough([Source(kind="jsonl", path="a.jsonl", max_tokens=10)], byte_tokenizer(), 300, folder)
    with pytest.raises(ConfigError, match="max_tokens 5 is below min_tokens 6"):
        Source(kind="python", min_tokens=6, max_tokens=5)
    with pytest.raises(ConfigError, match="filler is a number of characters from 0 for kind recall"):
        Source(kind="python", filler=5)


def test_the_share_beyond_the_budget_is_counted_in_documents_not_in_rows(folder):
    long = sample_lengths(rows_of(folder, {"min_tokens": 400}), 50, 20 * 200)
    assert long.beyond == 0.75
    short = sample_lengths(rows_of(folder, {"max_tokens": 10}), 50, 20 * 200)
    assert (short.beyond, short.tokens) == (0.0, (10.0,))
    assert short.passed[0] == pytest.approx(2 / 3, abs=0.2)
    assert "only 0% of the tokens are beyond the visible budget of 50" in short.warnings[0]
    assert not long.warnings
    middle = Lengths(budget=50, beyond=0.25, tokens=(1.0,), passed=(0.0,))
    assert not middle.warnings
    assert dataclasses.replace(middle, beyond=0.2499).warnings


def test_the_plan_says_it(folder):
    def lines(**source: int) -> tuple[str, tuple[str, ...]]:
        data = [{"kind": "jsonl", "path": "a.jsonl", **source}]
        recipe = recipe_from_dict(recipe_values(folder / "run", NSA, stage(seq_len=64, data=data)))
        plan = forecast_recipe(recipe, read_start(recipe, None), folder)
        return plan.to_text(), plan.warnings

    budget = 16
    text, warnings = lines(min_tokens=400)
    assert f"75% of the tokens are beyond the visible budget of {budget}" in text
    assert not any("beyond the visible budget" in line for line in warnings)
    text, warnings = lines(max_tokens=10)
    assert f"0% of the tokens are beyond the visible budget of {budget}" in text
    assert any("only 0% of the tokens are beyond" in line for line in warnings)


def test_recall_spans_as_far_as_it_is_asked_to(tmp_path):
    """What is told and what is asked stay; the text between them has every length up to the most."""
    spans = []
    for number in range(60):
        plain, long = recall_text(number, 8), recall_text(number, 8, 5000)
        told, asked = plain.strip().split(" get ")
        assert long.startswith(f"{told}\n")
        assert long.split("\nget ")[-1].strip() != ""
        keys = {pair[0]: pair for pair in told.split(" ")[1:]}
        words = long.rsplit("get ", 1)[1].split()
        assert all(keys[key] == pair for key, pair in zip(words[::2], words[1::2], strict=True))
        spans.append(len(long) - len(told) - len(asked) - len("\n\nget \n"))
    assert all(0 <= span <= 5000 for span in spans)
    assert min(spans) < 500 < 4500 < max(spans)
    assert recall_text(3, 8, 5000) == recall_text(3, 8, 5000) != recall_text(4, 8, 5000)
    fingerprints = {open_source(Source(kind="recall", filler=n), tmp_path).fingerprint() for n in (0, 1, 2)}
    assert len(fingerprints) == 3


def test_stages_of_a_recipe_read_other_documents_of_one_source(folder):
    """Both of countable sources and of generated ones; the last stage begins at the start."""
    data = [{"kind": "jsonl", "path": "a.jsonl", "weight": 3}, {"kind": "recall"}]
    more = {"seq_len": 64, "data": data, "tokens": 64 * 30}
    stages = [stage("one", **more), stage("two", **{**more, "tokens": 64 * 10})]
    recipe = recipe_from_dict(recipe_values(folder / "run", None, *stages))
    one, two = (data_order(recipe, index) for index in (0, 1))
    assert (one.starts, two.starts) == ((0.25, 0.25), (0.0, 0.0))
    source = open_source(recipe.stages[0].data[0], folder)
    read = {order.stage: source.open(order, 0, 0, 1) for order in (one, two)}
    count = source.count
    seen = {name: [reader._number(i) for i in range(count)] for name, reader in read.items()}
    assert seen["one"] == seen["two"][round(count / 4) :] + seen["two"][: round(count / 4)]
    assert sorted(seen["two"]) == list(range(count))
    again = {name: [reader._number(count + i) for i in range(count)] for name, reader in read.items()}
    assert again["one"] != again["two"]
    recall = open_source(recipe.stages[0].data[1], folder)
    made = {recall.open(order, 1, 0, 1).read() for order in (one, two, Order(seed=1, stage="two"))}
    assert len(made) == 3


def test_long_recall_is_trained_on_prose(tmp_path):
    import yaml

    for filler, names in ((0, 0), (100, 1)):
        stages = [{"data": [{"kind": "recall", "filler": filler}]}]
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"stages": stages}))
        assert len(seen_in_training(tmp_path, default_texts())) == names
