import csv
import io
import json
import shutil
import sys

import pytest
import torch
from rich.console import Console

from nsa_convert.errors import CheckFailedError, CheckpointError, ConfigError, MachineError
from nsa_convert.evaluation.metrics.perplexity import read_out, token_nll
from nsa_convert.evaluation.models import load_model, read_model_facts
from nsa_convert.evaluation.suites import quick
from nsa_convert.evaluation.suites.quick import run_quick
from tests.evaluation.tiny import BUDGET, byte_tokenizer, save, save_pair, tiny_dense
from tests.models import NSA


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def no_loading(monkeypatch):
    def refuse(*args):
        raise AssertionError("weights were loaded before the input was checked")

    monkeypatch.setattr(quick, "load_model", refuse)


def render(tables):
    console = Console(width=80, record=True, file=io.StringIO())
    for table in tables:
        console.print(table)
    return console.export_text()


def test_report_says_how_far_the_model_is_from_the_dense_one(pair, capsys):
    dense, sparse = pair
    steps = []
    report = run_quick(sparse, needle_lengths="500", needle_depths=[0.2, 0.8], say=steps.append)
    assert capsys.readouterr().out == ""
    assert report.visible_budget == BUDGET
    assert [(text.text.name, text.tokens) for text in report.texts] == [
        ("code", 4 * BUDGET),
        ("prose", 4 * BUDGET),
    ]
    assert report.warnings == ()
    for text in report.texts:
        assert [row["context"] for row in text.bucket_rows()] == ["1-16", "17-32", "33-64", "65-127"]
        within, beyond = text.bucket_rows()[:2], text.bucket_rows()[2:]
        assert all(row["kl_max"] < 1e-5 and row["top1"] == 1 for row in within)
        assert all(row["kl_mean"] > 1e-3 for row in beyond)
        ids = byte_tokenizer()(text.text.text)["input_ids"][: text.tokens]
        nll = token_nll(read_out(load_model(dense), ids), ids)
        assert text.divergence.dense_nll.tolist() == pytest.approx(nll.tolist(), abs=1e-3)
    assert len(report.texts[0].layers) == 3 * 2
    assert set(report.needles) == {"dense", "sparse"}
    assert f"visible budget {BUDGET} tokens" in report.headline()
    assert any("dense" in step for step in steps)
    shown = render(report.tables())
    assert f"visible budget {BUDGET}" in shown
    assert "65-127" in shown
    assert "captured" in shown


def test_files_hold_the_same_numbers(pair, tmp_path):
    report = run_quick(pair[1], out_dir=tmp_path / "new", needle_lengths=[500], needle_depths=[0.5])
    names = {path.name for path in report.files}
    assert (
        names
        == {path.name for path in (tmp_path / "new").iterdir()}
        == {
            "report.json",
            "buckets.csv",
            "positions.csv",
            "layers.csv",
            "needles.csv",
            "perplexity.png",
            "kl.png",
            "layers.png",
            "gates.png",
            "needles.png",
            "report.html",
        }
    )
    saved = json.loads((tmp_path / "new" / "report.json").read_text())
    assert saved == json.loads(json.dumps(report.to_dict()))
    assert (saved["schema"], saved["ok"], saved["visible_budget"]) == (1, True, BUDGET)
    rows = list(csv.DictReader((tmp_path / "new" / "buckets.csv").open()))
    assert [float(row["kl_mean"]) for row in rows if row["text"] == "prose"] == [
        bucket["kl_mean"] for bucket in saved["texts"][1]["buckets"]
    ]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in report.files if path.suffix == ".png")


def test_two_runs_are_equal(pair):
    first, second = (run_quick(pair[1], length=100).to_dict() for _ in range(2))
    assert first["texts"] == second["texts"]


def test_the_dense_checkpoint_gives_what_the_same_weights_give(pair):
    alone, against = run_quick(pair[1], length=100), run_quick(pair[1], against=pair[0], length=100)
    assert "over the weights of the evaluated model" in alone.against["attention"]
    assert against.against["name"] == pair[0].name
    assert "--against dense" in against.command
    for one, other in zip(alone.texts, against.texts, strict=True):
        assert one.divergence.kl.tolist() == pytest.approx(other.divergence.kl.tolist(), abs=1e-4)


def test_another_dense_model_is_really_read(pair, tmp_path):
    other = save(tiny_dense(seed=1).float(), tmp_path / "other")
    report = run_quick(pair[1], against=other, length=64)
    assert report.texts[0].bucket_rows()[0]["kl_mean"] > 0.01


@pytest.mark.parametrize("length", [16, BUDGET, BUDGET + 1])
def test_text_within_the_budget_is_called_no_evidence(pair, length):
    report = run_quick(pair[1], length=length)
    assert len(report.warnings) == 2
    assert "no sparsity exercised" in report.warnings[0]
    assert f"visible budget of {BUDGET}" in report.warnings[0]
    assert report.texts[0].divergence.summary()["kl_max"] < 1e-5


def test_a_short_file_is_read_to_its_end_and_said_so(pair, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("Sixty bytes of text, so that some keys are hidden, not more.")
    report = run_quick(pair[1], text_file=text)
    assert report.texts[0].tokens == 60
    assert report.warnings == (f"short: the text ends after 60 of {4 * BUDGET} tokens",)


def test_a_dense_model_has_nothing_sparse(pair):
    report = run_quick(pair[0], length=64)
    assert report.visible_budget is None
    assert "no layer of this model is sparse" in report.warnings[0]
    assert report.texts[0].divergence.summary()["kl_max"] == 0
    assert "no layer is sparse" in render(report.tables())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 2000}, "length 2000 is beyond the model's 1024 positions"),
        ({"length": 3}, "at least 16 tokens"),
        ({"needle_lengths": [4096]}, "beyond the model's 1024 positions"),
        ({"needle_lengths": [100]}, "a needle prompt needs [0-9]+ tokens"),
        ({"needle_lenghts": [500]}, "did you mean 'needle_lengths'"),
        (
            {"needle_lengths": "many", "dtype": "int8", "num_queries": "few"},
            r"dtype must be one of.*num_queries must be a whole number.*needle_lengths must be a list",
        ),
        ({"needle_depths": [1.5]}, "between 0 and 1"),
        ({"text_file": "missing.txt"}, "cannot read"),
    ],
)
@pytest.mark.usefixtures("no_loading")
def test_bad_requests_fail_before_anything_is_loaded(pair, options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        run_quick(pair[1], **options)
    assert caught.value.exit_status == 3
    assert caught.value.hint != "give shorter lengths"  # it may be too short


@pytest.mark.parametrize(
    ("content", "length", "message"),
    [
        (b"too short", None, "text too short: .* has 9 tokens, at least 16"),
        (b"x" * 40, 64, "text too short: .* has 40 tokens, 64 were asked for"),
        (b"\xff\xfe\x00", None, "not UTF-8"),
        (b"  \n", None, "is empty"),
    ],
)
@pytest.mark.usefixtures("no_loading")
def test_bad_text_files(pair, tmp_path, content, length, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        run_quick(pair[1], text_file=path, length=length)


@pytest.mark.usefixtures("no_loading")
def test_folders_that_hold_no_model(pair, tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        run_quick(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        run_quick(tmp_path)
    (tmp_path / "config.json").write_text((pair[1] / "config.json").read_text())
    with pytest.raises(CheckpointError, match="has no weights"):
        run_quick(tmp_path)
    shutil.copy(pair[1] / "model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        run_quick(tmp_path)


@pytest.mark.usefixtures("no_loading")
def test_a_reference_with_other_tokens_is_refused(pair, tmp_path):
    other = save(tiny_dense(vocab_size=300).float(), tmp_path / "other")
    with pytest.raises(ConfigError, match="cannot be compared"):
        run_quick(pair[1], against=other)


@pytest.mark.usefixtures("no_loading")
def test_plots_without_matplotlib_name_the_pip_line(pair, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MachineError) as caught:
        run_quick(pair[1], out_dir=tmp_path)
    assert caught.value.hint == "pip install matplotlib jinja2"


def test_a_broken_model_fails_the_check(tmp_path):
    model = tiny_dense().float()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    broken = save(model, tmp_path / "broken")
    with pytest.raises(CheckFailedError, match="not finite") as caught:
        run_quick(broken, length=32)
    assert caught.value.exit_status == 4


def test_every_layer_full_is_reported_as_not_sparse(tmp_path):
    _, sparse = save_pair(tmp_path, {"method": "full"})
    report = run_quick(sparse, length=64)
    assert report.visible_budget is None
    assert report.texts[0].layers == ()


def test_budget_of_a_mixed_plan_is_that_of_its_tightest_layer(tmp_path):
    _, sparse = save_pair(tmp_path)
    config = json.loads((sparse / "config.json").read_text())
    config["sparse_attention"]["rules"] = [
        {"layers": [0], "method": "full"},
        {"layers": [1], **NSA, "num_blocks": 3},
    ]
    (sparse / "config.json").write_text(json.dumps(config))
    assert read_model_facts(sparse).visible_budget == 3 * NSA["block_size"]
