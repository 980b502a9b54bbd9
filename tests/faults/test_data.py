"""Training data that are damaged, too few, changed or hostile: named by file and line (DA)."""

from __future__ import annotations

import gzip
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from nsa_convert.errors import ConfigError
from nsa_convert.evaluation.tasks.contamination import seen_in_training
from nsa_convert.evaluation.tasks.text import default_texts, file_text
from nsa_convert.training.data.documents import Order
from nsa_convert.training.data.rows import PackedRows
from nsa_convert.training.data.sources import open_source
from nsa_convert.training.recipe.sections import Source
from nsa_convert.training.run.models import fresh_tokenizer
from nsa_convert.training.run.resume import Allow
from nsa_convert.training.run.runner import Interrupted
from tests.checkpoints import tree_hash
from tests.faults.runs import call, refused, train, write_tiny
from tests.models import NSA, SSA, tokens, trained_model
from tests.training.recipes import losses, recipe, same_weights, stage

WORDS = "some words of a text that is long enough for a row or two of it. "


def write_lines(path: Path, *rows: object) -> Path:
    """Write JSON lines; bytes are written as they are."""
    made = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(made) + b"\n")
    return path


def dry(tmp_path: Path, *data: dict, says: tuple[str, ...] | str, code: str = "RC09") -> None:
    """Check that a recipe with these data is refused before anything is written."""
    path = write_tiny(tmp_path, None, stage(data=list(data)))
    before = tree_hash(tmp_path)
    refused("train", path, "--dry-run", says=says, code=code)
    refused("train", path, says=says, code=code)
    assert tree_hash(tmp_path) == before


def jsonl(name: str = "a.jsonl", **keys: object) -> dict:
    return {"kind": "jsonl", "path": name, **keys}


def rows_of(tmp_path: Path, *data: dict) -> PackedRows:
    read = recipe(tmp_path / "run", None, stage(data=list(data)))
    return PackedRows(read.stages[0].data, fresh_tokenizer(read, tmp_path), 32, Order(), tmp_path)


def test_da01_empty_files(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.jsonl").write_text("\n\n  \n")
    (tmp_path / "folder").mkdir()
    data = [{"kind": "text", "path": "empty.txt"}, jsonl("blank.jsonl"), {"kind": "text", "path": "folder"}]
    says = (
        f"data text: 0 bytes in {tmp_path}/empty.txt",
        f"data jsonl: 0 rows in {tmp_path}/blank.jsonl",
        f"data text: no file at {tmp_path}/folder",
    )
    dry(tmp_path, *data, says=says)


def test_da02_a_line_that_was_cut_off(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"text": WORDS}, {"text": WORDS}, b'{"te')
    dry(
        tmp_path, jsonl(), says=(f"{path}:3 is not JSON", "1 of 3 documents cannot be used, 0 may be skipped")
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a\x00b"}', "holds a NUL byte"),
        (b'{"text": "\\ud800"}', "holds half a surrogate pair"),
        (b'{"text": "\xff\xfe"}', "is not UTF-8 text"),
    ],
)
def test_da03_bytes_that_are_no_text(tmp_path, line, reason):
    path = write_lines(tmp_path / "a.jsonl", {"text": WORDS}, line, {"text": WORDS})
    dry(tmp_path, jsonl(), says=(f"{path}:2", reason))
    plain = tmp_path / "a.txt"
    plain.write_bytes(b"one\ntwo\n\xff three\n")
    dry(tmp_path, {"kind": "text", "path": "a.txt"}, says=f"{plain}:3 is not UTF-8 text")
    recipe = write_tiny(tmp_path, None, stage(data=[jsonl(skip_bad=1)]))
    done = call("train", recipe, "--dry-run")
    assert done.code == 0, done.err
    assert "1 of 3 documents are left out" in done.err
    assert len(rows_of(tmp_path, jsonl(skip_bad=1)).documents[0].read(1)) == len(WORDS)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": 7}, "column 'text' is a int, not a text"),
        ({"text": None}, "column 'text' is null, not a text"),
        ({"texts": WORDS}, "has no column 'text'; did you mean 'texts'"),
        ({"text": ""}, "column 'text' is empty"),
        ([WORDS], "holds a list, not an object"),
    ],
)
def test_da04_rows_without_a_text(tmp_path, row, reason):
    path = write_lines(tmp_path / "a.jsonl", {"text": WORDS}, row, row)
    dry(tmp_path, jsonl(skip_bad=1), says=(f"{path}:2 {reason}", f"{path}:3", "2 of 3 documents cannot be"))
    documents = open_source(Source(**jsonl(skip_bad=2)), tmp_path)
    assert (documents.count, documents.read(0)) == (1, WORDS)
    assert "2 of 3 documents are left out" in documents.notes[0]


def test_da04_chats_without_messages(tmp_path):
    good = [{"role": "user", "content": "a"}]
    path = write_lines(tmp_path / "a.jsonl", {"messages": good}, {"messages": [{"content": "b"}]})
    chats = stage(kind="sft", data=[jsonl(column="messages")])
    says = f"{path}:2 column 'messages' is no list of messages with role and content"
    refused("train", write_tiny(tmp_path, None, chats), "--dry-run", says=says, code="RC09")


@pytest.mark.parametrize("size", [2_000_000, pytest.param(50_000_000, marks=pytest.mark.slow)])
def test_da05_very_long_lines(tmp_path, size):
    write_lines(tmp_path / "a.jsonl", {"text": "word " * (size // 5)}, {"text": WORDS})
    begin = time.perf_counter()
    rows = rows_of(tmp_path, jsonl())
    next(iter(rows))
    assert sorted(len(rows.documents[0].read(i)) for i in range(2)) == [len(WORDS), size]
    assert time.perf_counter() - begin < 30 * size / 2_000_000


def test_da06_too_little_text(tmp_path):
    write_lines(tmp_path / "many.jsonl", *({"text": f"short {i}"} for i in range(9)))  # each below a row
    train(tmp_path / "short", None, stage(data=[jsonl("many.jsonl")]), base=tmp_path)
    write_lines(tmp_path / "a.jsonl", {"text": "few words"}, {"text": "and more"})
    path = write_tiny(tmp_path, None, stage(data=[jsonl(weight=3), {"kind": "recall"}], batch_tokens=64))
    says = (
        f"data jsonl {tmp_path}/a.jsonl holds 19 tokens in 2 documents; one step of 64 tokens takes 48 of it"
    )
    refused("train", path, says=says, code="DA06")
    assert not (tmp_path / "run").exists()


def test_da07_damaged_archives_and_tables(tmp_path):
    datasets = pytest.importorskip("datasets")
    whole = gzip.compress(b"".join(json.dumps({"text": f"{WORDS} {i}"}).encode() + b"\n" for i in range(999)))
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    datasets.Dataset.from_dict({"text": [WORDS] * 99, "n": list(range(99))}).to_parquet(
        tmp_path / "a.parquet"
    )
    table = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(table[: len(table) // 2])
    data = [
        jsonl("a.jsonl.gz"),
        {"kind": "parquet", "path": "b.parquet"},
        {"kind": "parquet", "path": "a.parquet", "column": "txt"},
        {"kind": "parquet", "path": "a.parquet", "column": "n"},
    ]
    says = (
        f"{tmp_path}/a.jsonl.gz cannot be read",
        f"{tmp_path}/b.parquet cannot be read",
        "no column 'txt'; did you mean 'text'",
        "a.parquet row 1: column 'n' is a int, not a text",
    )
    dry(tmp_path, *data, says=says)


def test_da08_data_that_changed_in_place(tmp_path):
    path, out = tmp_path / "a.txt", tmp_path / "run"
    path.write_text(WORDS * 50)
    data = stage(data=[{"kind": "text", "path": "a.txt"}])

    def stop(line):
        if line.startswith("pretrain 2/"):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(out, None, data, say=stop, base=tmp_path)
    path.write_text(WORDS.replace("words", "lines") * 50)  # of the same length
    with pytest.raises(ConfigError, match="the training data changed since the checkpoint") as caught:
        train(out, None, data, resume=True, base=tmp_path)
    assert (caught.value.code, caught.value.exit_status) == ("DA08", 3)
    assert "--allow-data-change" in caught.value.hint
    said = []
    train(out, None, data, resume=True, base=tmp_path, say=said.append, allow=Allow(data_change=True))
    assert any("warning [DA08]" in line for line in said)
    assert [step for _, step, _ in losses(out)] == [1, 2, 3, 4, 5]


def test_da09_tokens_the_model_has_no_row_for(tmp_path, monkeypatch):
    tokenizer = fresh_tokenizer(recipe(tmp_path / "run", None), tmp_path)
    tokenizer.add_tokens(["<|one too many|>"])
    monkeypatch.setattr("nsa_convert.training.run.stages.fresh_tokenizer", lambda *_: tokenizer)
    says = "the tokenizer has token 257, the model has embeddings for 0 to 256"
    refused("train", write_tiny(tmp_path, None), says=says, code="DA09")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("settings", [NSA, SSA], ids=["nsa", "ssa"])
def test_da10_packed_documents_do_not_see_each_other(settings):
    model = trained_model("llama", settings)
    lengths = (70, 41, 59)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ids = tokens(1, sum(lengths))
    changed = ids.clone()
    changed[:, 70:111] = (changed[:, 70:111] + 7) % 128
    with torch.no_grad():
        before, after = (model(x, position_ids=positions).logits for x in (ids, changed))
    same = [torch.equal(x, y) for x, y in zip(before.split(lengths, 1), after.split(lengths, 1), strict=True)]
    assert same == [True, False, True]


def test_da11_a_stream_and_a_shuffle_are_resumed_without_loss_or_repeat(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    texts = [f"row {i}." for i in range(30)]
    table = datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset()
    write_lines(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    stream = {"kind": "hub", "path": "someone/something", "streaming": True}
    with monkeypatch.context() as patch:
        patch.setattr("nsa_convert.training.data.sources.load_table", lambda *_: (table, []))
        check_resume(tmp_path, stream)
    check_resume(tmp_path, jsonl())


def check_resume(tmp_path: Path, data: dict) -> None:
    rows = rows_of(tmp_path, data)
    stream = iter(rows)
    first, states = [], []
    for _ in range(20):  # more than one epoch
        first.append(next(stream)["input_ids"])
        states.append(json.loads(json.dumps(rows.state())))
    assert rows.lane(0).cursors[0].documents > 30
    for done in (1, 7, 13):
        again = rows_of(tmp_path, data)
        again.restore(states[done - 1])
        stream = iter(again)
        assert [next(stream)["input_ids"] for _ in range(20 - done)] == first[done:]
    text = rows.tokenizer.decode([i for row in first[:7] for i in row])
    counts = [text.count(f"row {i}.") for i in range(30)]
    assert counts != sorted(counts, reverse=True), "in stored order"
    assert 24 < sum(counts) <= 30
    assert max(counts) == 1


def test_da13_texts_that_are_both_trained_on_and_held_out(tmp_path):
    texts = [{"text": f"{WORDS}{i}"} for i in range(20)] + [{"text": f"{WORDS} {i % 3}"} for i in range(20)]
    write_lines(tmp_path / "a.jsonl", *texts)
    path = write_tiny(tmp_path, None, stage(data=[jsonl(hold_out=0.3)]))
    done = call("train", path, "--dry-run", "--json")
    assert done.code == 0, done.err
    (line,) = [line for line in done.json["warnings"] if "held-out" in line]
    shared = int(line.split(": ")[1].split(" ")[0])
    kept, held = (open_source(Source(**jsonl(hold_out=0.3)), tmp_path, held_out=x) for x in (False, True))
    squeezed = [{" ".join(one.read(i).split()) for i in range(one.count)} for one in (kept, held)]
    held_texts = [" ".join(held.read(i).split()) for i in range(held.count)]
    assert shared == sum(text in squeezed[0] for text in held_texts) > 0


def test_da13_what_cannot_be_held_out_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="size needs a source that can be counted"):
        Source(kind="hub", path="some/set", streaming=True, size=10)
    with pytest.raises(ConfigError, match="holds no document out"):
        open_source(Source(kind="python"), tmp_path, held_out=True)


def test_da13_size_takes_documents_with_and_without_a_held_out_part(tmp_path):
    write_lines(tmp_path / "a.jsonl", *({"text": f"{WORDS}{i}"} for i in range(20)))
    every, few, kept = (
        open_source(Source(**jsonl(**more)), tmp_path)
        for more in ({}, {"size": 3}, {"size": 3, "hold_out": 0.5})
    )
    assert [every.count, few.count, kept.count] == [20, 3, 3]
    assert [few.read(i) for i in range(3)] == [every.read(i) for i in range(3)]
    assert len({every.fingerprint(), few.fingerprint(), kept.fingerprint()}) == 3


def test_da13_evaluation_texts_in_the_training_data(tmp_path):
    import yaml

    (tmp_path / "book.txt").write_text(WORDS)
    texts = [*default_texts(), file_text(tmp_path / "book.txt")]
    assert seen_in_training(tmp_path, texts) == []
    rows = [{"kind": "python", "hold_out": 0.1}, {"kind": "recall"}, {"kind": "text", "path": "book.txt"}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"stages": [{"data": rows}]}))
    (line,) = seen_in_training(tmp_path, texts)
    assert line.startswith("2 of 3 evaluation texts (code, book) are in this model's training data")
    (tmp_path / "recipe.yaml").write_text("stages: {")
    assert seen_in_training(tmp_path, texts) == []


def test_da14_a_data_set_that_is_a_program(tmp_path):
    pytest.importorskip("datasets")
    sentinel, folder = tmp_path / "sentinel", tmp_path / "set"
    folder.mkdir()
    (folder / "set.py").write_text(f"import os\nos.mkdir({str(sentinel)!r})\n")
    dry(tmp_path, {"kind": "hub", "path": str(folder)}, says=("the data set is a program, which is not run",))
    assert not sentinel.exists()


def test_chats_resume_exactly(tmp_path):
    pytest.importorskip("trl")
    chat = [{"role": "user", "content": "say"}, {"role": "assistant", "content": WORDS}]
    write_lines(tmp_path / "a.jsonl", *({"messages": [*chat, chat[0], chat[1]]} for _ in range(40)))
    data = [jsonl(column="messages")]
    sft = stage("pretrain", kind="sft", seq_len=64, batch_tokens=64, tokens=64 * 4, data=data, save_every=1)

    def stop(line):
        if line.startswith("pretrain 2/"):
            raise KeyboardInterrupt

    train(tmp_path / "whole", None, sft, base=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", None, sft, base=tmp_path, say=stop)
    train(tmp_path / "run", None, sft, base=tmp_path, resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert same_weights(tmp_path / "run" / "pretrain", tmp_path / "whole" / "pretrain")
