"""Evaluations that cannot say what they seem to say: refused, or said with how little they rest on (EV)."""

from __future__ import annotations

import shutil
import time

import pytest
import torch

from nsa_convert.errors import CheckFailedError, ConfigError
from nsa_convert.evaluation.report.verdict import task_rows, verdict
from nsa_convert.evaluation.suites import long, quick
from nsa_convert.evaluation.suites.lm_eval_tasks import refuse_broken_logits, run_tasks
from nsa_convert.evaluation.suites.long import run_long
from nsa_convert.evaluation.tasks.fitting import largest_fit
from nsa_convert.evaluation.tasks.needle import build_case
from nsa_convert.evaluation.tasks.recall import build_recall
from nsa_convert.evaluation.tasks.ruler import RULER_TASKS, build_ruler
from nsa_convert.evaluation.tasks.scoring import run_case
from tests.checkpoints import tree_hash
from tests.evaluation.test_running import case_of
from tests.evaluation.tiny import byte_tokenizer, random_ids, save, save_pair, tiny_dense
from tests.faults.runs import call, refused

SMALL = {"length": 80, "lengths": [700], "depths": [0.5], "task_lengths": [1024], "tasks": ["vt"]}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def no_loading(monkeypatch):
    for module in (quick, long):
        monkeypatch.setattr(module, "load_model", lambda *args: pytest.fail("a model was loaded"))


@pytest.mark.usefixtures("no_loading")
def test_ev01_lengths_beyond_the_positions(pair, tmp_path):
    out = tmp_path / "out"
    says = "length 2000 is beyond the model's 1024 positions"
    refused("eval", pair[1], "--set", "length=2000", "--out", out, code="EV01", says=says)
    words = ("eval", pair[1], "--suite", "long", "--out", out)
    says = ("lengths [2000] are beyond the model's 1024 positions", "beyond_positions=true")
    refused(*words, "--set", "lengths=2000", code="EV01", says=says)
    more = ("--set", "lengths=5000", "--set", "beyond_positions=true")
    refused(*words, *more, code="EV01", says="lengths [5000] are beyond")
    assert not out.exists()
    words = ("generate", pair[1], "--prompt", "x" * 1000, "--max-new-tokens", "100")
    refused(*words, code="EV01", says="the prompt has 1000 tokens; with 100 new ones that is beyond the 1024")


@pytest.mark.parametrize("task", [*RULER_TASKS, "recall", "needle"])
def test_ev02_a_prompt_that_cannot_fit(task):
    """Refused after a few tries, with the length it would need; RULER's own scripts look for ever."""
    tokenizer, calls = byte_tokenizer(), []

    class Counting:
        def __call__(self, *args, **kwargs):
            calls.append(args)
            return tokenizer(*args, **kwargs)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    begin = time.perf_counter()
    build = {
        "needle": lambda: build_case(Counting(), 60, 0.5),
        "recall": lambda: build_recall(Counting(), 60, 0),
    }.get(task, lambda: build_ruler(Counting(), task, 60, 0))
    with pytest.raises(ConfigError) as caught:
        build()
    assert (caught.value.code, caught.value.exit_status) == ("EV02", 3)
    assert "tokens" in caught.value.message
    assert len(calls) < 200
    assert time.perf_counter() - begin < 10


def test_ev02_units_that_add_no_token_end_too():
    sizes = []
    assert largest_fit(lambda n: sizes.append(n) or 7, 10) > 0
    assert len(sizes) < 100


def test_ev03_a_model_that_ends_at_once(tmp_path):
    """All logits are 0, so the first choice is always token 0, the end."""
    model, tokenizer = tiny_dense().float(), byte_tokenizer()
    model.model.norm.weight.data.zero_()
    silent = save(model, tmp_path / "silent")
    tokenizer.add_special_tokens({"eos_token": tokenizer.convert_ids_to_tokens(0)})
    tokenizer.save_pretrained(silent)
    values = run_long(silent, **SMALL).values
    assert [(row["score"], row["text"]) for row in values["tasks"]] == [(0, ""), (0, "")]
    (line,) = [line for line in values["warnings"] if "empty" in line and "dense" in line]
    assert line == "2 of 2 free answers of dense attention are empty; they score 0"


def broken(folder):
    """A model whose logits are NaN, saved past the check of its weights."""
    model = tiny_dense().float()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    return save(model, folder)


@pytest.mark.parametrize(
    "words",
    [("--set", "length=32"), ("--suite", "long", "--set", "lengths=700", "--set", "tasks=vt")],
    ids=["quick", "long"],
)
def test_ev04_nan_is_no_score(tmp_path, words):
    folder, out = broken(tmp_path / "broken"), tmp_path / "out"
    says = "logits are not finite"
    refused("eval", folder, *words, "--out", out, code="EV04", status=4, says=says)
    assert not (out / "report.json").exists()


def test_ev04_nan_while_generating():
    model = tiny_dense().float()
    calls = []

    def spoil(module, args, out):
        calls.append(out)
        return torch.full_like(out, torch.nan) if len(calls) > 3 else out

    model.lm_head.register_forward_hook(spoil)
    with pytest.raises(CheckFailedError, match="not finite") as caught:
        run_case(model, byte_tokenizer(), case_of(random_ids(4), gold=("never said",), max_new=6))
    assert caught.value.code == "EV04"


def test_ev04_nan_in_the_harness():
    model = tiny_dense().float()
    model.register_forward_hook(refuse_broken_logits)
    ids = torch.tensor([random_ids(9)])
    with torch.no_grad():
        model(ids)
        model.model.norm.weight.data[0] = torch.nan
        with pytest.raises(CheckFailedError, match="not finite in an lm-eval task"):
            model(ids)


def test_ev06_a_single_case_is_told_with_its_interval(pair):
    report = run_long(pair[1], **SMALL)
    rows = task_rows(report.values)
    assert rows
    assert all(row["sparse"]["n"] == 1 for row in rows)
    for row in rows:
        low, high = row["sparse"]["low"], row["sparse"]["high"]
        assert high - low > 0.7, "one case says next to nothing"
    text = verdict(report.values)
    assert "In 2 retrieval cases beyond the budget" in text
    assert "95 % interval" in text
    assert not set("✓✔☑") & set(text + report.headline())


@pytest.mark.usefixtures("no_loading")
def test_ev07_models_that_cannot_be_compared(pair, tmp_path):
    other = save(tiny_dense(vocab_size=300).float(), tmp_path / "other")
    says = ("know [256, 300] tokens: they cannot be compared", "give the dense checkpoint this model was")
    out = tmp_path / "out"
    refused("eval", pair[1], "--against", other, "--set", "length=80", "--out", out, code="EV07", says=says)
    same_size = shutil.copytree(pair[0], tmp_path / "same")
    table = (same_size / "tokenizer.json").read_text()
    (same_size / "tokenizer.json").write_text(table.replace('"a":', '"~~":', 1).replace('"b":', '"a":', 1))
    says = "read the text 'code' as different tokens"
    refused("eval", pair[1], "--against", same_size, "--set", "length=80", code="EV07", says=says)
    done = call("eval", pair[1], "--against", tmp_path / "nowhere", "--json")
    assert (done.code, done.json["code"]) == (3, "CF24")
    assert not out.exists()


@pytest.mark.parametrize("names", ["arc_easy,niah_single_1", "ruler_vt", "longcxt"])
def test_ev11_tasks_that_run_code_of_the_repository(pair, names):
    before = tree_hash(pair[1])
    with pytest.raises(ConfigError, match="lm-eval runs code of the model's repository for") as caught:
        run_tasks(pair[1], tasks=names)
    assert (caught.value.code, caught.value.exit_status) == ("EV11", 3)
    assert "--suite long" in caught.value.hint
    assert tree_hash(pair[1]) == before
