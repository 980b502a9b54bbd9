import json
import re
import sys

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from nsa_convert.card import check_card, read_evaluations, write_card
from nsa_convert.card.render import _results as results_of
from nsa_convert.errors import CheckpointError, ConfigError, MachineError
from nsa_convert.evaluation.report.verdict import task_rows
from tests.checkpoints import edit_json
from tests.evaluation.samples import sample_report
from tests.publishable import converted, publishable


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return publishable(tmp_path_factory.mktemp("published"))


@pytest.fixture
def fresh(tmp_path):
    return converted(tmp_path)


def test_the_header_says_what_the_model_is(model):
    card = ModelCard.load(model / "README.md")
    assert check_card(str(card)) == []
    data = card.data
    assert (data.base_model, data.base_model_relation) == ("tiny/dense", "finetune")
    assert (data.license, data.library_name) == ("apache-2.0", "transformers")
    assert {"nsa", "custom_code", "sparse-attention"} <= set(data.tags)
    report = json.loads((model / "evaluation" / "report.json").read_text())
    values = {(r.dataset_name, r.metric_type): r.metric_value for r in data.eval_results}
    for text in report["texts"]:
        assert values[text["source"], "perplexity"] == pytest.approx(text["beyond"]["sparse_ppl"], abs=1e-5)
        assert values[text["source"], "kl_divergence"] == pytest.approx(text["beyond"]["kl_mean"], abs=1e-5)
    assert values["needle, forced at 500", "accuracy"] == report["needles"]["sparse"][0]["hit"]


def test_each_result_is_listed_once():
    """By huggingface_hub's own reader, which joins what has one type and config under one name."""
    report = sample_report()
    index = eval_results_to_model_index("tiny", results_of(report))
    _, read = model_index_to_eval_results(index)
    keys = [(result.unique_identifier, result.metric_type) for result in read]
    assert len(set(keys)) == len(keys)

    scored = {
        f"{row['task']} at {row['length']}": row["sparse"] for row in task_rows(report) if row["sparse"]
    }
    values = {result.dataset_name: result.metric_value for result in read if result.metric_type == "accuracy"}
    assert len(scored) > 4
    assert values == {name: round(cell["score"], 6) for name, cell in scored.items()}


def test_the_text_holds_source_numbers_and_recipe(model):
    text = (model / "README.md").read_text()
    report = json.loads((model / "conversion_report.json").read_text())
    (entry,) = report["source"]["files"].values()
    for part in (
        entry["sha256"],
        "0" * 40,
        f"{report['new_parameters']:,}",
        "bit-equal to the source",
        "trust_remote_code=True",
        "not at all",
        "block_size=8",
        "n=1",
        (model / "recipe.yaml").read_text().rstrip(),
        json.loads((model / "evaluation" / "report.json").read_text())["command"],
    ):
        assert part in text
    for plot in re.findall(r"\]\((evaluation/[^)]+)\)", text):
        assert (model / plot).is_file()
    assert "](evaluation/perplexity.png)" in text


def test_the_same_figures_are_in_eval_results(model):
    rows = yaml.safe_load((model / ".eval_results" / "nsa-convert.yaml").read_text())
    card = ModelCard.load(model / "README.md")
    assert [row["value"] for row in rows] == [r.metric_value for r in card.data.eval_results]


def test_nothing_of_this_machine_is_in_it(model, tmp_path):
    written = "".join(
        path.read_text() for path in model.rglob("*") if path.suffix in {".md", ".json", ".yaml", ".csv"}
    )
    assert str(model.parent) not in written
    assert "/home/" not in written


def test_without_an_evaluation_the_card_says_so(fresh):
    report = write_card(fresh)
    assert "no evaluation" in report.warnings[0]
    assert "has not been evaluated" in report.path.read_text()
    assert not (fresh / ".eval_results").exists()


def test_an_evaluation_of_other_files_is_left_out(model, tmp_path, fresh):
    (fresh / "evaluation").mkdir()
    (fresh / "evaluation" / "report.json").write_bytes((model / "evaluation" / "report.json").read_bytes())
    edit_json(fresh / "evaluation" / "report.json", model={"manifest_sha256": "0" * 64})
    report = write_card(fresh)
    assert any("other files" in line for line in report.warnings)
    assert report.evaluations == []


def test_training_is_told(fresh):
    training = {"schema": 1, "tokens": 12345, "stages": [{"name": "align", "tokens": 12345}]}
    (fresh / "training_report.json").write_text(json.dumps(training))
    text = write_card(fresh).path.read_text()
    assert "12,345 tokens: align" in text
    assert "bit-equal" not in text
    assert "not trained" not in text


@pytest.mark.parametrize(
    ("card", "given", "expected"),
    [
        ("---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\n---\n", None, ("other", "tiny")),
        ("---\nlicense: mit\n---\n", "apache-2.0", ("apache-2.0", None)),
        (None, "llama3.2", ("llama3.2", None)),
    ],
)
def test_the_licence_comes_from_the_source_or_the_user(tmp_path, card, given, expected):
    out = converted(tmp_path, card)
    data = ModelCard.load(write_card(out, license=given).path).data
    assert (data.license, data.get("license_name")) == expected


@pytest.mark.parametrize("card", [None, "# no header\n", "---\nlicense: [mit]\n---\n"])
def test_hb16_an_unknown_licence_is_asked_for(tmp_path, card):
    with pytest.raises(ConfigError, match="--license|licence of the source is not known") as caught:
        write_card(converted(tmp_path, card))
    assert caught.value.code == "HB16"


def test_hb15_a_card_that_is_not_valid_is_not_written(fresh):
    with pytest.raises(ConfigError, match="no Hub id") as caught:
        write_card(fresh, base_model="not an id")
    assert caught.value.code == "HB15"
    assert not (fresh / "README.md").exists()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("no header", "license"),
        ("---\nlicense: [\n---\n", "cannot be read"),
        ("---\nlicense: other\nlibrary_name: x\n---\n", "license_name"),
        ("---\nlicense: mit\nlibrary_name: x\nmodel-index: 3\n---\n", "cannot be read"),
    ],
)
def test_check_card_can_fail(text, problem):
    assert problem in " ".join(check_card(text))


def test_damaged_input(fresh, monkeypatch):
    (fresh / "evaluation").mkdir()
    (fresh / "evaluation" / "report.json").write_text('{"schema": 7}')
    with pytest.raises(CheckpointError, match="no report") as caught:
        read_evaluations(fresh)
    assert caught.value.code == "EV13"
    (fresh / "evaluation" / "report.json").unlink()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MachineError, match="jinja2"):
        write_card(fresh)


def test_a_folder_that_was_not_converted(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        write_card(tmp_path)
    assert caught.value.code == "SV17"
