"""The suite ``compare`` on a tiny model: figures, equal budgets, resuming, plans, and bad requests."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from nsa_convert.cli import main
from nsa_convert.config import AttentionGeometry, LayerRule
from nsa_convert.evaluation.metrics.density import PairCounter
from nsa_convert.evaluation.metrics.mass import LayerMass
from nsa_convert.evaluation.metrics.perplexity import perplexity, read_out, token_nll
from nsa_convert.evaluation.models import load_model, patched_in
from nsa_convert.evaluation.report.compare_tables import comparison_verdict
from nsa_convert.evaluation.report.plots import plots_of
from nsa_convert.evaluation.suites import compare
from nsa_convert.evaluation.suites.compare import mass_of, run_compare
from nsa_convert.evaluation.suites.compare_plans import beside_dense
from nsa_convert.evaluation.suites.compare_settings import COMPARED, CompareSettings, budget_at, budget_label
from nsa_convert.evaluation.suites.finished_cells import CELLS
from nsa_convert.heads.profile import HeadProfile, density_of
from nsa_convert.methods.parts.base import AttentionInputs, observe
from nsa_convert.methods.parts.registry import METHODS, build_method
from nsa_convert.patterns import SequenceLayout
from tests.evaluation.tiny import byte_tokenizer, save, save_pair, tiny_dense
from tests.models import plan

LENGTH, PROMPT, BUDGET = 600, 450, 256
METHODS_RUN = "streaming,quest,xattention,phases"
WORDS = [
    "--suite", "compare", "--set", f"methods={METHODS_RUN}", "--set", f"budgets={BUDGET}", "--set",
    f"lengths={LENGTH}", "--set", "needle_lengths=700", "--set", "depths=0.5", "--set", "texts=prose",
]  # fmt: skip
GEOMETRY = AttentionGeometry(hidden_size=64, num_query_heads=4, num_kv_heads=2, head_dim=16)


DENSITY = {"prompt": 1.0, "steps": 1.0}


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["eval", *(str(word) for word in words)])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first layer dense, half of the heads of the second, the rest at the budget."""
    path = tmp_path_factory.mktemp("plans") / "mix.yaml"
    rules = [{"method": "full", "layers": [0]}, {"method": "full", "layers": [1], "heads": [0]}]
    path.write_text(json.dumps({"sparse_attention": {"default": {"method": "streaming"}, "rules": rules}}))
    return path


@pytest.fixture(scope="module")
def report(pair: tuple[Path, Path], mix: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    out = tmp_path_factory.mktemp("report")
    done = run(pair[0], *WORDS, "--plan", f"mix={mix}", "--out", out, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout), out


def row_of(report: dict, name: str, length: int) -> dict:
    return next(row for row in report["rows"] if (row["name"], row["length"]) == (name, length))


@pytest.mark.slow
def test_every_row_has_what_was_asked_for(report: tuple[dict, Path]) -> None:
    values, _ = report
    names = ["dense", *METHODS_RUN.split(","), "mix"]
    assert [(row["name"], row["length"]) for row in values["rows"]] == [
        (n, k) for k in (600, 700) for n in names
    ]
    for row in values["rows"]:
        assert (
            (list(row["texts"]), len(row["needles"])) == (["prose"], 0) if row["length"] == 600 else ([], 1)
        )
    assert [row_of(values, name, 600)["causal"] for name in names] == [True, True, True, False, False, True]
    assert [row_of(values, name, 600)["texts"]["prose"]["ppl"] is None for name in names] == [
        False, False, True, True, True, False,
    ]  # fmt: skip
    assert {row["visible"] for row in values["rows"] if row["kind"] != "dense"} == {BUDGET}
    assert row_of(values, "mix", 600)["plan"]["default"] == {
        "method": "streaming", "num_sinks": 4, "window_size": BUDGET - 4,
    }  # fmt: skip
    assert "--plan mix=mix.yaml" in values["command"]
    assert values["settings"]["budgets"] == [BUDGET]


def test_densities_are_those_of_the_masks(report: tuple[dict, Path]) -> None:
    values, _ = report
    density = {row["name"]: row["texts"]["prose"]["density"] for row in values["rows"] if row["texts"]}
    assert density["dense"] == {"prompt": 1, "steps": 1}
    # BUDGET keys a query, from the one behind them on; the steps come after 450 .. 599 tokens.
    pairs = sum(min(t, BUDGET) for t in range(1, PROMPT + 1)) / (PROMPT * (PROMPT + 1) / 2)
    steps = (LENGTH - PROMPT) * BUDGET / sum(range(PROMPT + 1, LENGTH + 1))
    assert density["streaming"] == pytest.approx({"prompt": pairs, "steps": steps}, rel=1e-3)
    assert density["quest"] == pytest.approx({"prompt": 1, "steps": steps}, rel=0.1)
    assert 0.5 < density["xattention"]["prompt"] < 1 == density["xattention"]["steps"]
    assert density["phases"]["prompt"] == density["xattention"]["prompt"]
    half = {key: (3 + 3 * density["streaming"][key]) / 6 for key in ("prompt", "steps")}
    assert density["mix"] == pytest.approx(half, rel=1e-3)  # 3 of 6 heads are dense


def test_perplexities_are_those_of_single_readings(
    pair: tuple[Path, Path], report: tuple[dict, Path]
) -> None:
    values, _ = report
    ids = byte_tokenizer()(prose())["input_ids"][:LENGTH]
    model = load_model(pair[0])
    dense = token_nll(read_out(model, ids), ids)
    found = row_of(values, "dense", LENGTH)["texts"]["prose"]
    assert found["ppl"] == pytest.approx(perplexity(dense), rel=1e-3)
    assert found["ppl_after"] == pytest.approx(perplexity(dense[PROMPT - 1 :]), rel=1e-3)
    settings = {"method": "streaming", "num_sinks": 4, "window_size": BUDGET - 4}
    with patched_in(model, plan(settings)):
        sparse = token_nll(read_out(model, ids), ids)
    found = row_of(values, "streaming", LENGTH)["texts"]["prose"]
    assert found["ppl"] == pytest.approx(perplexity(sparse), rel=1e-3)
    assert found["ratio"] == pytest.approx(perplexity(sparse[BUDGET:]) / perplexity(dense[BUDGET:]), rel=1e-3)
    assert found["ratio_after"] == pytest.approx(
        perplexity(sparse[PROMPT - 1 :]) / perplexity(dense[PROMPT - 1 :]), rel=1e-3
    )
    assert found["kl"] > 0 == row_of(values, "dense", LENGTH)["texts"]["prose"]["kl"]


def prose() -> str:
    return compare.prose_text().text


def test_files_and_page(report: tuple[dict, Path]) -> None:
    values, out = report
    assert {path.name for path in out.iterdir()} == {*values["files"], CELLS}
    assert {"report.json", "report.html", "compare.csv", "compare.png"} == set(values["files"])
    rows = list(csv.DictReader((out / "compare.csv").open()))
    assert [row["name"] for row in rows] == [row["name"] for row in values["rows"]]
    streaming = next(row for row in rows if row["name"] == "streaming")
    found = row_of(values, "streaming", LENGTH)["texts"]["prose"]
    assert float(streaming["prose_kl_after"]) == found["kl_after"]
    assert json.loads(streaming["plan"]) == row_of(values, "streaming", LENGTH)["plan"]
    assert streaming["torch"] == torch.__version__
    assert [plot.name for plot in plots_of(values)] == ["compare"]
    page = (out / "report.html").read_text()
    assert all(name in page for name in (*METHODS_RUN.split(","), "mix", "prose, 600 tokens"))
    assert str(out) not in page


def test_evicting_caches_are_smaller(report: tuple[dict, Path]) -> None:
    size = {r["name"]: r["needles"][0]["cache_bytes"] for r in report[0]["rows"] if r["length"] == 700}
    assert size["streaming"] < 0.5 * size["dense"] <= 0.5 * size["quest"]


@pytest.mark.slow
def test_a_killed_run_goes_on(
    pair: tuple[Path, Path],
    mix: Path,
    report: tuple[dict, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = (pair[0], *WORDS, "--plan", f"mix={mix}", "--out", tmp_path, "--json")
    whole = (report[1] / CELLS).read_bytes().splitlines(keepends=True)
    (tmp_path / CELLS).write_bytes(b"".join(whole[:7]) + whole[7][:40])  # cut off while it was written
    finished = json.loads(run(*words, "--set", "finished=true").stdout)
    assert 0 < len(finished["rows"]) < len(report[0]["rows"])
    assert all(row in report[0]["rows"] for row in finished["rows"])
    again = json.loads(run(*words).stdout)
    lines = (tmp_path / CELLS).read_bytes().splitlines(keepends=True)
    assert (lines[:7], len(lines)) == (whole[:7], len(whole))  # a finished cell was not measured again
    assert [without_times(row) for row in again["rows"]] == [without_times(row) for row in report[0]["rows"]]
    monkeypatch.setattr(compare, "load_model", lambda *args: pytest.fail("measured again"))
    third = json.loads(run(*words).stdout)
    assert third["rows"] == again["rows"]


def without_times(row: dict) -> dict:
    cells = [*row["texts"].values(), *row["needles"]]
    return {**row, "texts": [*row["texts"]], "needles": [{**cell, "seconds": 0} for cell in cells]}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("budget", [256, 512, 2048])
def test_a_budget_is_the_budget(name: str, budget: int) -> None:
    meaning = METHODS[name].Settings
    if hasattr(meaning, "at_share"):
        build_method(LayerRule(method=name, settings=meaning.at_share(0.5, 4096)), GEOMETRY, 0)
        return
    method = build_method(LayerRule(method=name, settings=meaning.at_budget(budget)), GEOMETRY, 0)
    if name == "infllm":  # beyond its window positions differ; what it reads is the budget
        s = method.settings
        assert s.num_sinks + s.window_size + s.num_blocks * s.block_size == budget
    else:
        assert method.reach().visible_budget == budget


def test_every_method_has_a_budget() -> None:
    """Exactly one of two: so many keys, or a share of the pairs that is searched for."""
    meanings = {name: method.Settings for name, method in METHODS.items()}
    both = {n: [hasattr(s, "at_budget"), hasattr(s, "at_share")].count(True) for n, s in meanings.items()}
    assert both == dict.fromkeys(meanings, 1)


def test_shares_of_a_length_and_equal_densities() -> None:
    assert [budget_at(0.25, n) for n in (2048, 4096, 8192)] == [512, 1024, 2048]
    assert [budget_label(x) for x in (0.25, 0.125, 0.1, 512.0)] == ["25%", "12.5%", "10%", "512"]
    assert beside_dense(512, 2048, 0.0) == 512
    less = beside_dense(512, 2048, 14 / 90)
    whole = 14 / 90 + 76 / 90 * density_of(less, 2048)
    assert whole == pytest.approx(density_of(512, 2048), abs=0.04)
    assert less == 384


def test_a_prompt_read_in_two_parts_counts_once() -> None:
    """Tri-shape: a band for the first 44 tokens, everything for the last 20; then a step that sees all."""
    geometry = AttentionGeometry(hidden_size=8, num_query_heads=1, num_kv_heads=1, head_dim=8)
    settings = {"num_sinks": 0, "window_size": 16, "num_last": 20}
    layer, counter = (
        build_method(LayerRule(method="tri_shape", settings=settings), geometry, 0),
        PairCounter(),
    )
    with observe(counter.add):
        for new, offset in ((64, 0), (4, 64)):
            q, k = torch.randn(1, new, 1, 8), torch.randn(1, new + offset, 1, 8)
            layout = SequenceLayout(offset=offset)
            layer(AttentionInputs(q=q, k=k, v=k, hidden=q[..., 0], pooled={}, layout=layout, scale=1.0))
    pairs = sum(min(t, 16) for t in range(1, 45)) + sum(range(45, 65))
    assert counter.densities() == pytest.approx({"prompt": pairs / 2080, "steps": 1.0})


def test_mass_is_that_of_the_heads_that_hide_keys() -> None:
    def row(pattern: str, captured: float, oracle: float | None, count: int = 1, **more: object) -> LayerMass:
        parts = {"layer": 0, "budget": 8, "density": 0.5, "gates": None, **more}
        return LayerMass(
            pattern=pattern, captured=captured, captured_by_head=(captured,) * count, oracle=oracle, **parts
        )  # fmt: skip

    gates = {"compressed": 0.0, "selected": 1.0, "window": 0.0}
    nsa = [row("selected", 0.8, 0.9, gates=gates), row("window", 0.6, None, gates=gates)]
    assert mass_of(nsa) == pytest.approx({"captured": 0.8, "oracle": 0.9})
    disjoint = [row("selected", 0.5, 0.9), row("vertical", 0.25, 0.4)]  # one softmax
    assert mass_of(disjoint) == {"captured": 0.75, "oracle": None}
    parts = [row("selected", 0.9, 1.0, 2, heads=(0, 1)), row("window", 0.3, None, heads=(2,))]
    assert mass_of(parts) == {"captured": pytest.approx(0.7), "oracle": None}
    assert mass_of([]) == {"captured": None, "oracle": None}


def test_a_head_profile_is_a_plan(pair: tuple[Path, Path], tmp_path: Path) -> None:
    heads = load_model(pair[0]).config.num_key_value_heads
    scores = torch.arange(3.0 * heads).view(3, heads)
    meta = {"kind": "duo", "rule": {"method": "streaming", "num_sinks": 4, "window_size": 60}}
    HeadProfile(scores=scores, meta=meta).save(tmp_path / "duo.safetensors")
    words = ("--suite", "compare", "--set", "methods=[]", "--set", "budgets=256,384", "--set", "lengths=300")
    words += ("--set", "needle_lengths=[]", "--set", "texts=code", "--json")
    done = run(pair[0], *words, "--plan", f"duo={tmp_path / 'duo.safetensors'}@0.34")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["rows"]
    assert [(row["name"], row["budget"], row["visible"]) for row in rows] == [
        ("dense", "", None),
        ("duo", "own", 64),
    ]
    assert rows[1]["plan"]["rules"] == [{"method": "full", "layers": [2]}]
    assert "--plan duo=duo.safetensors@0.34" in json.loads(done.stdout)["command"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "methods=nsa,xatention"], "unknown method 'xatention'; did you mean 'xattention'?"),
        (["--set", "budgets=64"], "nsa at a budget of 64 tokens: "),
        (["--set", "budgets=300"], "a budget of 300 tokens is no multiple of 64"),
        (["--set", "budgets=0"], "budgets must be numbers of tokens"),
        (["--set", "budgets=.inf"], "budgets must be numbers of tokens"),
        (["--set", "budgets=512.5"], "budgets must be numbers of tokens"),
        (["--set", "lengths=-1"], "lengths must be at least 16 tokens"),
        (["--set", "lengths=long"], "lengths must be a list of whole numbers, got 'long'"),
        (["--set", "budgets=[]"], "budgets must be numbers of tokens"),
        (["--set", "needle_lengths=2000"], "needle_lengths [2000] are beyond the model's 1024 positions"),
        (["--set", "lengths=2000"], "lengths [2000] are beyond"),
        (["--set", "lenghts=200"], "did you mean 'lengths'"),
        (["--set", "lengths=[]"], "there is nothing to measure"),
        (["--set", "texts=poems"], "there is no text 'poems'"),
        (["--set", "depths=2"], "depths must be between 0 and 1"),
        (["--set", "equal=budget"], "equal must be one of visible, density"),
        (["--set", "finished=1"], "finished must be true or false"),
        (["--method", "nsa"], "leave out --method and --against"),
        (["--plan", "mix"], "--plan takes NAME=FILE"),
        (["--plan", "mix=nowhere.yaml"], "no such file"),
        (["--plan", "nsa=MIX"], "the name 'nsa' stands twice"),
        (["--plan", "bad=BAD"], "bad at a budget of 256 tokens: "),
        (["--plan", "bad=TEXT"], "no key 'sparse_attention'"),
        (["--plan", "duo=nowhere.safetensors@0.5"], "cannot read head profile"),
        (["--plan", "duo=nowhere.safetensors@half"], "FILE@SHARE with a number"),
    ],
)
def test_bad_requests(
    pair: tuple[Path, Path],
    mix: Path,
    tmp_path: Path,
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compare, "load_model", lambda *args: pytest.fail("a model was loaded"))
    rules = [{"method": "full", "layers": [7]}]
    bad = {"sparse_attention": {"default": {"method": "nsa"}, "rules": rules}}
    (tmp_path / "bad.yaml").write_text(json.dumps(bad))
    (tmp_path / "text.yaml").write_text("method: nsa")
    files = {"MIX": mix, "BAD": tmp_path / "bad.yaml", "TEXT": tmp_path / "text.yaml"}
    for name, path in files.items():
        words = [word.replace(f"={name}", f"={path}") for word in words]
    out = tmp_path / "out"
    base = ["--suite", "compare", "--set", "budgets=256", "--set", "lengths=300", "--out", out]
    result = run(pair[0], *base, *words)
    assert result.exit_code in (2, 3), result.output
    assert message in result.stderr
    assert not out.exists()


def test_a_converted_model_is_refused(pair: tuple[Path, Path]) -> None:
    result = run(pair[1], *WORDS)
    assert result.exit_code == 3
    assert "methods are compared on a dense model" in result.stderr
    assert "--plan belongs to --suite compare" in run(pair[0], "--plan", "a=b").stderr


@pytest.mark.parametrize(
    ("hits", "told"),
    [
        ({0.1: True}, "no needle of dense is lost"),
        ({0.1: True, 0.5: False}, "no needle of dense is lost"),
        ({0.1: False, 0.5: True}, "needles are lost by nsa"),
        ({}, "no needle of dense is lost"),
    ],
    ids=["not all asked yet", "dense loses it too", "another one found", "none asked yet"],
)
def test_a_needle_is_lost_where_dense_finds_that_one(hits: dict[float, bool], told: str) -> None:
    def row(kind: str, found: dict[float, bool]) -> dict:
        needles = [
            {"depth": depth, "hit": hit, "nll": 0.0, "cache_bytes": 1, "density": DENSITY, "seconds": 0.0}
            for depth, hit in found.items()
        ]
        names = {"kind": kind, "name": kind, "length": 100, "budget": "64"}
        return {**names, "texts": {}, "needles": needles}

    rows = [row("dense", {0.1: True, 0.5: False, 0.9: True}), row("nsa", hits)]
    assert told in comparison_verdict({"rows": rows})


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tiny_dense().float(), tmp_path / "dense")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    report = run_compare(folder, methods="ssa", budgets=256, lengths=300, needle_lengths=[], texts="code")
    assert [row["name"] for row in report.values["rows"]] == ["dense", "ssa"]
    assert "ssa is closest to dense" in report.headline()
    assert len(report.tables()) == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_settings_by_default() -> None:
    chosen = CompareSettings.read({})
    assert chosen.methods == COMPARED
    assert (chosen.budgets, chosen.lengths, chosen.needle_lengths) == ((0.25,), (2048,), (2048,))
    assert CompareSettings.read({"lengths": "300,300"}).all_lengths() == [300]
