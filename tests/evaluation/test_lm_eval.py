import importlib.util
import json
import sys

import pytest
from click.testing import CliRunner

from nsa_convert.cli import main
from nsa_convert.errors import CheckpointError, ConfigError, MachineError
from nsa_convert.evaluation.report.html import render_html
from nsa_convert.evaluation.report.verdict import verdict
from nsa_convert.evaluation.suites.lm_eval_tasks import benchmark_rows, register_adapter, run_tasks
from tests.checkpoints import edit_json
from tests.evaluation.samples import sample_report
from tests.evaluation.tiny import save_pair

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (an optional extra)"
)
RESULT = {
    "results": {"t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": "N/A", "word_perplexity,none": 7.25}},
    "n-samples": {"t": {"original": 9, "effective": 8}},
}
TASK = """
task: tiny_{kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {output}
{more}
metadata: {{version: 1}}
"""
CHOICE = """doc_to_text: "{{question}}"
doc_to_choice: ["{{a}}", "{{b}}"]
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"""
ROLLING = """doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: byte_perplexity}]"""
GENERATE = """doc_to_text: "{{question}}"
doc_to_target: "{{a}}"
generation_kwargs: {max_gen_toks: 4, do_sample: false, until: ["zzz"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folders = save_pair(tmp_path_factory.mktemp("pair"))
    for folder in folders:
        edit_json(folder / "tokenizer_config.json", eos_token="Ā")  # what ByteLevel writes for byte 0
    return folders


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"question": "Twice as long as the visible budget is this question, number " + str(i) * (5 + 7 * i),
         "a": "yes", "b": "no", "label": i % 2}
        for i in range(6)
    ]  # fmt: skip
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = {"choice": ("multiple_choice", CHOICE), "rolling": ("loglikelihood_rolling", ROLLING)}
    kinds["generate"] = ("generate_until", GENERATE)
    for kind, (output, more) in kinds.items():
        (folder / f"{kind}.yaml").write_text(TASK.format(kind=kind, data=data, output=output, more=more))
    return folder


def test_rows_put_both_kinds_of_attention_side_by_side():
    dense = {"results": {"t": {"acc,none": 1.0, "word_perplexity,none": 7.0}}}
    first, second = benchmark_rows({"sparse": RESULT, "dense": dense})
    values = [first[key] for key in ("task", "metric", "n", "dense", "sparse")]
    assert values == ["t", "acc", 8, 1, 0.5]
    assert (first["low"], first["high"]) == pytest.approx((0.2152, 0.7848), abs=1e-4)
    assert (second["metric"], second["sparse"], second["low"]) == ("word_perplexity", 7.25, None)
    report = {**sample_report(), "benchmarks": [first, second]}
    assert "0.5 on t (acc) where dense attention has 1" in verdict(report)
    assert "0.215 to 0.785" in render_html(report)
    alone = {**report, "benchmarks": benchmark_rows({"sparse": RESULT, "dense": {"results": {"t": {}}}})}
    assert "0.5 on t (acc) where dense attention has -" in verdict(alone)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({}, "RC10"),
        ({"tasks": "arc_easy", "limits": 3}, "CF13"),
        ({"tasks": "arc_easy,niah_single_1"}, "EV11"),
        ({"tasks": ["ruler_vt"]}, "EV11"),
    ],
)
def test_bad_requests(pair, options, code):
    with pytest.raises(ConfigError) as caught:
        run_tasks(pair[1], **options)
    assert caught.value.code == code


def test_without_lm_eval_the_pip_line_is_named(pair, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    register_adapter.cache_clear()
    with pytest.raises(MachineError, match="lm-eval") as caught:
        run_tasks(pair[1], tasks="arc_easy")
    assert caught.value.hint == "pip install lm-eval"


@needs_lm_eval
def test_the_harness_runs_local_tasks_with_both(pair, tasks, tmp_path):
    words = ["eval", str(pair[1]), "--suite", "tasks"]
    words += ["--set", "tasks=tiny_choice,tiny_rolling,tiny_generate"]
    words += ["--set", f"include_path={tasks}", "--out", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.stderr
    values = json.loads(result.stdout[result.stdout.index('{"schema"') :])
    rows = {(row["task"], row["metric"]): row for row in values["benchmarks"]}
    assert set(rows) >= {
        ("tiny_choice", "acc"),
        ("tiny_rolling", "byte_perplexity"),
        ("tiny_generate", "exact_match"),
    }
    rolling = rows["tiny_rolling", "byte_perplexity"]
    assert rolling["dense"] != rolling["sparse"]
    assert rows["tiny_choice", "acc"]["n"] == 6
    assert str(tasks) not in (tmp_path / "out" / "report.json").read_text()
    assert (tmp_path / "out" / "benchmarks.csv").is_file()


@needs_lm_eval
def test_ev05_a_batch_of_six_says_what_one_says(pair, tasks):
    names = "tiny_choice,tiny_rolling,tiny_generate"
    one, six = (
        run_tasks(pair[1], tasks=names, include_path=str(tasks), batch_size=size).values["benchmarks"]
        for size in (1, 6)
    )
    for a, b in zip(one, six, strict=True):
        assert a["sparse"] == pytest.approx(b["sparse"], rel=1e-4)


@needs_lm_eval
def test_a_tokenizer_without_an_end_is_refused(tmp_path, tasks):
    with pytest.raises(CheckpointError, match="end token"):
        run_tasks(save_pair(tmp_path)[1], tasks="tiny_choice", include_path=str(tasks))


@needs_lm_eval
def test_ev14_an_unknown_task(pair, tasks):
    with pytest.raises(ConfigError, match="does not know the task nope") as caught:
        run_tasks(pair[1], tasks="nope", include_path=str(tasks))
    assert caught.value.code == "EV14"
