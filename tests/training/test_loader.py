"""Reading processes: the same rows however many read them, each document tokenised by one, exact resume."""

from __future__ import annotations

import json
import os
import signal
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_convert.errors import ConfigError, MachineError
from nsa_convert.training.data.documents import Order
from nsa_convert.training.data.lanes import Encoder, encode
from nsa_convert.training.data.loader import RowLoader, worker_count
from nsa_convert.training.data.rows import PackedRows, collate, lane_count
from nsa_convert.training.data.sources import Documents
from nsa_convert.training.recipe.sections import Source
from tests.published.bases import byte_tokenizer

STEP = 8
"""Rows of a step."""
DATA = [{"kind": "python", "weight": 2}, {"kind": "recall", "pairs": 4, "weight": 1}]


def rows_of(data: list[dict] = DATA, step: int = STEP, seq_len: int = 64) -> PackedRows:
    sources = [Source(**one) for one in data]
    return PackedRows(sources, byte_tokenizer(), seq_len, Order(stage="a"), Path(), step)


def plain(count: int) -> list[dict[str, Any]]:
    return list(islice(iter(rows_of()), count))


def taken(loader: RowLoader, batches: int) -> list[list[int]]:
    return [row for batch in islice(iter(loader), batches) for row in batch["input_ids"].tolist()]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_read_the_same_rows_in_the_same_order(workers):
    expected = collate(plain(4 * STEP))
    loader = RowLoader(rows_of(), 2, workers=workers)
    assert loader.workers == workers
    batches = list(islice(iter(loader), 4 * STEP // 2))
    for key, values in expected.items():
        assert torch.equal(torch.cat([batch[key] for batch in batches]), values)


@pytest.mark.parametrize("size", [1, 2])
def test_each_of_two_processes_tokenises_half_and_together_they_read_the_same_rows(monkeypatch, size):
    """Documents that two processes both tokenise would be counted twice."""
    counts: list[int] = []
    call = Encoder.__call__

    def count(self: Encoder, texts: Any) -> Any:
        counts[-1] += len(texts)
        return call(self, texts)

    monkeypatch.setattr(Encoder, "__call__", count)
    data = [{"kind": "recall", "pairs": 4}]
    counts.append(0)
    whole = [row["input_ids"] for row in islice(iter(rows_of(data)), 40 * STEP)]
    parts = []
    for process in range(2):
        counts.append(0)
        loader = RowLoader(rows_of(data), size, process=process, processes=2)
        parts.append(taken(loader, 40 * STEP // (2 * size)))
    one, *halves = counts
    assert sum(halves) == one
    assert all(0.45 < half / one < 0.55 for half in halves), counts
    places = [place for place in range(len(whole)) if place // size % 2 == 0]
    assert parts[0] == [whole[place] for place in places]
    assert parts[1] == [row for place, row in enumerate(whole) if place not in set(places)]


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (2, 1)])
def test_a_resume_goes_on_with_any_number_of_workers(before, after):
    """What was prepared ahead and not used is prepared again."""
    expected = [row["input_ids"] for row in plain(6 * STEP)]
    rows = rows_of()
    assert taken(RowLoader(rows, 2, workers=before), 3 * STEP // 2) == expected[: 3 * STEP]
    again = rows_of()
    again.restore(json.loads(json.dumps(rows.state())))
    assert again.rows == 3 * STEP
    assert taken(RowLoader(again, 2, workers=after), 3 * STEP // 2) == expected[3 * STEP :]


def test_lanes_divide_a_step_and_have_documents_each():
    some = [Documents(str, 5, []), Documents(str, None, [])]
    assert [lane_count(rows, some) for rows in (1, 4, 8, 12, 7)] == [1, 4, 4, 4, 1]
    assert lane_count(2048, some[1:]) == 256
    assert [lane_count(24, some[1:], most) for most in (1, 16, 24)] == [1, 12, 24]
    assert [worker_count(4, 8, size, processes) for size, processes in ((1, 1), (2, 1), (2, 2), (8, 1))] == [
        4,
        4,
        2,
        1,
    ]
    assert [worker_count(most, 8, 1, 8) for most in (0, 1, 9)] == [0, 1, 1]


def test_documents_tokenised_together_have_the_tokens_of_each_alone():
    texts = ["one text", "", "another é one", "a<|end|>b"]
    tokenizer = byte_tokenizer(bos=True)
    for one, text in zip(Encoder(tokenizer)(texts), texts, strict=True):
        ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] if text else []
        assert one.tolist() == encode(tokenizer, text) == ids
    with pytest.raises(ConfigError, match="a document is no text but NoneType"):
        encode(tokenizer, None)


def test_da12_a_reading_process_that_is_killed():
    """Another one takes its place once; then the run ends with what to do."""
    expected = [row["input_ids"] for row in plain(8 * STEP)]
    said: list[str] = []
    stream = iter(RowLoader(rows_of(), 1, workers=1, say=said.append))
    found = [next(stream)["input_ids"].tolist()[0] for _ in range(5)]
    kill_workers()
    found += [next(stream)["input_ids"].tolist()[0] for _ in range(STEP)]
    assert found == expected[: len(found)]
    assert len(said) == 1
    assert said[0].startswith("warning [DA12]")
    kill_workers()
    with pytest.raises(MachineError, match="died twice") as caught:
        list(islice(stream, 100))
    assert caught.value.code == "DA12"


def kill_workers() -> None:
    """Kill the reading processes of this one."""
    import multiprocessing

    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)
    time.sleep(0.5)


def test_an_error_of_a_reading_process_arrives_whole():
    data = [{"kind": "recall", "pairs": 4, "min_tokens": 5000}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nsa_convert.training.data.lanes.MISSES_IN_CLASS", 1500)
        stream = iter(RowLoader(rows_of(data), 1, workers=1))
        with pytest.raises(ConfigError, match="holds no document of from 5000") as caught:
            next(stream)
    assert caught.value.code == "DA01"
