"""Streams: shuffled, dealt to stages and lanes, held out by a hash, and resumed without reading again."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nsa_convert.errors import ConfigError, HubError
from nsa_convert.notices import silent
from nsa_convert.training.data.documents import Order, iterate
from nsa_convert.training.data.rows import PackedRows
from nsa_convert.training.data.sources import open_source
from nsa_convert.training.data.streams import Stream, is_held_out
from nsa_convert.training.recipe.sections import Source
from nsa_convert.training.run.runner import train_recipe
from tests.published.bases import byte_tokenizer
from tests.training.recipes import ROOT, losses, recipe, same_weights, stage

datasets = pytest.importorskip("datasets")

DOCUMENTS = 4000
GROUP = 20
"""Rows of a row group."""
FILES = 4
LANES = 4
FIRST = Order()
STREAM = {"kind": "parquet", "path": "*.parquet", "streaming": True, "shuffle": 40}
SPLITS = hasattr(datasets.IterableDataset, "reshard")
"""Whether this version of datasets cuts Parquet files at their row groups."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder of Parquet files of row groups, as data sets of the Hub have them."""
    import pyarrow
    from pyarrow import parquet

    place = tmp_path_factory.mktemp("stream")
    each = DOCUMENTS // FILES
    for file in range(FILES):
        texts = [f"document {file * each + i} " + "x" * (i % 7) for i in range(each)]
        table = pyarrow.table({"text": texts, "other": list(range(each))})
        parquet.write_table(table, place / f"{file}.parquet", row_group_size=GROUP)
    return place


def rows_of(folder: Path, order: Order = FIRST, lanes: int = LANES, **changes: Any) -> PackedRows:
    source = Source(**{**STREAM, **changes})
    return PackedRows([source], byte_tokenizer(), 64, order, folder, lanes)


def numbers(rows: PackedRows, count: int) -> list[int]:
    """Return the numbers of the documents that rows begin, in order; a row may end inside of one."""
    stream = iter(rows)
    texts: dict[int, list[int]] = {}
    for _ in range(count):
        lane = rows.rows % rows.lanes
        texts.setdefault(lane, []).extend(next(stream)["input_ids"])
    text = "".join(rows.tokenizer.decode(ids) for ids in texts.values())
    parts = [part.split(" ")[1] for part in text.split("<|end|>")[:-1] if part.startswith("document ")]
    return [int(part) for part in parts if part.isdigit()]


def test_a_stream_is_shuffled_and_every_document_comes_once(folder):
    rows = rows_of(folder)
    found = numbers(rows, 400)
    assert len(found) > 1200
    assert max(Counter(found).values()) == 1
    assert found != sorted(found)
    # Neighbours of a lane come from one row group, in another order; row groups follow each other anyhow.
    groups = list(dict.fromkeys(number // GROUP for number in found))
    assert sum(abs(a - b) > 2 for a, b in zip(groups, groups[1:], strict=False)) > len(groups) / 2
    assert found[:GROUP] != sorted(found[:GROUP])


def test_seeds_and_stages_read_another_order_and_other_documents(folder):
    first = numbers(rows_of(folder, Order(seed=0, stage="a")), 100)
    assert numbers(rows_of(folder, Order(seed=0, stage="a")), 100) == first
    seed = numbers(rows_of(folder, Order(seed=1, stage="a")), 100)
    assert seed != first
    assert len(set(seed) & set(first)) < len(first) / 2
    # A stage begins where a later one, which reads half as much as the source has, will end.
    earlier = numbers(rows_of(folder, Order(seed=0, stage="b", starts=(0.5,))), 400)
    later = numbers(rows_of(folder, Order(seed=0, stage="a")), 400)
    assert min(len(earlier), len(later)) > 1200
    assert not set(earlier) & set(later)


def test_held_out_documents_of_a_stream_are_disjoint_from_training(folder):
    source = Source(**STREAM, hold_out=0.1)
    held = list(iterate(open_source(source, folder, held_out=True)))
    kept = list(iterate(open_source(source, folder)))
    assert len(held) + len(kept) == DOCUMENTS
    assert not set(held) & set(kept)
    assert 0.08 < len(held) / DOCUMENTS < 0.12
    assert all(is_held_out(text, 0.1) for text in held)
    # Whatever was held out of the stored order is not met in another one.
    out = {int(text.split(" ")[1]) for text in held}
    for order in (Order(), Order(seed=5, stage="b")):
        assert not out & set(numbers(rows_of(folder, order, hold_out=0.1), 400))
    # A part held out does not depend on the rest of the stream, and grows with its share.
    assert {text for text in kept + held if is_held_out(text, 0.05)} < set(held)


class Reads:
    """Counts the rows that the Parquet reader of datasets returns, and the documents taken out of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from datasets.packaged_modules.parquet.parquet import Parquet

        self.rows = self.documents = 0
        tables, rows = Parquet._generate_tables, Stream.rows

        def count_tables(*args: Any, **kwargs: Any):
            for key, table in tables(*args, **kwargs):
                self.rows += len(table)
                yield key, table

        def count_documents(*args: Any):
            for row in rows(*args):
                self.documents += 1
                yield row

        monkeypatch.setattr(Parquet, "_generate_tables", count_tables)
        monkeypatch.setattr(Stream, "rows", count_documents)

    def take(self) -> tuple[int, int]:
        found = self.rows, self.documents
        self.rows = self.documents = 0
        return found


@pytest.mark.parametrize("hold_out", [0.0, 0.2])
def test_a_resumed_stream_reads_almost_nothing_again(folder, monkeypatch, hold_out):
    reads = Reads(monkeypatch)
    rows = rows_of(folder, lanes=1, shuffle=10, hold_out=hold_out)
    stream = iter(rows)
    for _ in range(1150):
        next(stream)
    state = json.loads(json.dumps(rows.state()))
    before = reads.take()
    expected = [next(stream) for _ in range(20)]
    more = reads.take()
    again = rows_of(folder, lanes=1, shuffle=10, hold_out=hold_out)
    again.restore(state)
    stream = iter(again)
    assert [next(stream) for _ in range(20)] == expected
    after = reads.take()
    # A block and, where shards are row groups, a part of one; whole files where they are not.
    assert after[1] - more[1] <= before[1] / 100 + 16, (before, more, after)
    if SPLITS:
        assert after[0] - more[0] <= before[0] / 100 + 16, (before, more, after)


def test_a_place_in_every_epoch_is_found_again(folder):
    """Also one where the block has just been used up, or the shards of a lane."""
    few = {"path": "0.parquet", "shuffle": 8}
    rows = rows_of(folder, lanes=2, **few)
    stream = iter(rows)
    every, states = [], []
    for _ in range(400):
        every.append(next(stream))
        states.append(json.dumps(rows.state()))
    places = [json.loads(state)["lanes"][0]["cursors"][0]["at"] for state in states]
    assert {place["epoch"] for place in places} == {0, 1}
    for done in (*range(1, 20), *range(255, 275), 380):
        again = rows_of(folder, lanes=2, **few)
        again.restore(json.loads(states[done - 1]))
        stream = iter(again)
        assert [next(stream) for _ in range(6)] == every[done : done + 6]


def test_a_killed_run_on_a_stream_goes_on_with_the_same_rows(folder, tmp_path):
    data = [{**STREAM, "path": str(folder / "*.parquet"), "hold_out": 0.1}, {"kind": "recall", "pairs": 4}]
    stages = stage(data=data, save_every=1, tokens=64 * 4)

    def train(name: str, say: Any = silent, **options: Any) -> None:
        train_recipe(recipe(tmp_path / name, None, stages, workers=1), None, base=ROOT, say=say, **options)

    def kill(line: str) -> None:
        if line.startswith("pretrain 2/"):
            raise KeyboardInterrupt

    train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("run", kill)
    train("run", resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert same_weights(tmp_path / "run" / "pretrain", tmp_path / "whole" / "pretrain")
    # The place in the older order of documents cannot be found: that is said, and nothing else is read.
    (place,) = (tmp_path / "run" / "pretrain").glob("checkpoint-4/data_state.json")
    rows = rows_of(folder)
    state = {key: value for key, value in json.loads(place.read_text()).items() if key != "lanes"}
    with pytest.raises(ConfigError, match="written by an earlier version") as caught:
        rows.restore(state)
    assert caught.value.code == "DA08"


def test_a_stream_that_cannot_be_read_says_so(folder, monkeypatch):
    from datasets.packaged_modules.parquet.parquet import Parquet

    def fail(*_: Any, **__: Any):
        raise ConnectionError("the line is down")
        yield

    monkeypatch.setattr(Parquet, "_generate_tables", fail)
    for kind, error, code in (("parquet", ConfigError, "DA07"), ("hub", HubError, "HB10")):
        rows = rows_of(folder)
        rows.documents[0].name = f"{kind} *.parquet"
        with pytest.raises(error, match="cannot be read: .*the line is down") as caught:
            next(iter(rows))
        assert caught.value.code == code


def test_streams_without_a_document_say_so(folder, monkeypatch):
    monkeypatch.setattr("nsa_convert.training.data.lanes.MISSES_IN_CLASS", 2000)
    stream = iter(rows_of(folder, min_tokens=5000))
    with pytest.raises(ConfigError, match="holds no document of from 5000 to any number of tokens"):
        next(stream)
    with pytest.raises(ConfigError, match="size needs a source that can be counted"):
        Source(**STREAM, size=5)
    with pytest.raises(ConfigError, match="streaming is for jsonl, parquet, hub, not for python"):
        Source(kind="python", streaming=True)
