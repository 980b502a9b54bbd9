"""Recipes that cannot be meant: refused with the place and the reason, before a model is read (RC)."""

from __future__ import annotations

import time

import pytest
import yaml

from nsa_convert.cli.options import parse_settings
from nsa_convert.training.recipe.schema import SCHEMA, read_recipe
from tests.checkpoints import tree_hash
from tests.faults.runs import call, refused, write_tiny, write_yaml
from tests.training.recipes import NSA, SSA, recipe_values, stage

TOKEN = "hf_" + "a1B2" * 8


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch, tmp_path):
    """A recipe that is refused reads no weight and writes nothing."""
    load = "nsa_convert.training.run.stages.load_first"
    monkeypatch.setattr(load, lambda *_: pytest.fail("a model was loaded"))
    yield
    assert not (tmp_path / "run").exists()


def dry(path, *words, **expected):
    return refused("train", path, "--dry-run", *words, **expected)


def with_text(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "place", "excerpt"),
    [
        ("model: x\nout: [a, b\nstages: []\n", "recipe.yaml:3:7", "stages: []"),
        ("model: x\nstages:\n\t- name: a\n", "recipe.yaml:3:1", "- name: a"),
        (f"model: x\nhub_token: {TOKEN} : y\n", "recipe.yaml:2:", "[a token]"),
    ],
)
def test_rc01_syntax_errors_name_line_column_and_text(tmp_path, text, place, excerpt):
    done = dry(with_text(tmp_path, text), code="RC01", says=(place, excerpt))
    assert TOKEN not in done.out + done.err


def test_rc02_an_unknown_key_is_answered_with_the_nearest(tmp_path):
    values = recipe_values(tmp_path / "run", NSA, stage(seq_length=32), precison="bf16")
    path = write_yaml(tmp_path / "recipe.yaml", values)
    says = ("unknown key 'seq_length'; did you mean 'seq_len'", "'precison'; did you mean 'precision'")
    dry(path, code="RC08", says=says)


def test_rc03_numbers_with_an_exponent_are_numbers(tmp_path):
    path = write_tiny(tmp_path)
    text = path.read_text().replace("lr: 0.001", "lr: 1e-4").replace("tokens: 320", "tokens: 3.2e2")
    assert "lr: 1e-4" in text
    read = read_recipe(with_text(tmp_path, text))
    assert (read.stages[0].lr, read.stages[0].tokens) == (1e-4, 320)


def test_rc04_a_key_listed_twice_names_both_lines(tmp_path):
    text = write_tiny(tmp_path).read_text() + "seed: 1\nprecision: fp32\nseed: 2\n"
    lines = [i for i, line in enumerate(text.splitlines(), 1) if line.startswith("seed:")]
    says = f"key 'seed' is listed twice, in lines {lines[0]} and {lines[1]}"
    dry(with_text(tmp_path, text), code="RC01", says=says)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("no", 'false in YAML 1.1; write "no" or false'),
        ("On", 'true in YAML 1.1; write "On" or true'),
        ("010", '8 in YAML 1.1; write "010" or 8'),
        ("0x1F", '31 in YAML 1.1; write "0x1F" or 31'),
        ("1_000", '1000 in YAML 1.1; write "1_000" or 1000'),
        ("1:30", '90 in YAML 1.1; write "1:30" or 90'),
        ("2024-01-01", 'a date in YAML 1.1; write "2024-01-01"'),
        ("2024-13-99", 'a date in YAML 1.1; write "2024-13-99"'),
        ("<<", 'a special word in YAML 1.1; write "<<"'),
    ],
)
def test_rc05_words_that_yaml_would_turn_into_something_else_need_quotes(tmp_path, word, meant):
    text = write_tiny(tmp_path).read_text()
    for line in (f"revision: {word}", f"measure: {word}", f"{word}: 1", f"x: [a, {word}]"):
        path = with_text(tmp_path, f"{line}\n{text}")
        place = f"recipe.yaml:1:{line.index(word) + 1}"
        dry(path, code="RC05", says=(place, f"{word} is text in YAML 1.2 and {meant}"))
    for quoted in (f"'{word}'", f'"{word}"'):
        assert read_recipe(with_text(tmp_path, f"{text}revision: {quoted}\n")).revision == word


def test_rc05_what_is_written_can_be_read_again(tmp_path):
    """Whatever a text looks like; and numbers and switches do not become texts."""
    values = recipe_values(tmp_path / "run", NSA, stage(name="010"), revision="2024-01-01")
    recipe = read_recipe(with_text(tmp_path, yaml.safe_dump(values)))
    assert (recipe.stages[0].name, recipe.revision) == ("010", "2024-01-01")
    assert read_recipe(with_text(tmp_path, yaml.safe_dump(recipe.to_dict()))) == recipe
    path = with_text(tmp_path, yaml.safe_dump({**values, "measure": "no", "seed": "010", "revision": 8}))
    says = (
        "measure must be true or false, got 'no'",
        "seed must be a whole number, got '010'",
        "revision must be a text, got 8",
    )
    dry(path, code="RC08", says=says)


def test_rc05_the_command_line_and_cards_need_no_quotes(tmp_path):
    """No other program reads a --set, and ``license: no`` in somebody's card is none of our business."""
    assert parse_settings(["stages.0.name=no", "out=010"]) == {"stages.0.name": "no", "out": "010"}
    path = write_tiny(tmp_path)
    done = call("train", path, "--dry-run", "--set", "stages.0.name=010")
    assert done.code == 0, done.err


def test_rc06_tags_that_make_python_objects_are_refused(tmp_path):
    sentinel = tmp_path / "sentinel"
    text = f"model: !!python/object/apply:os.system ['touch {sentinel}']\nout: x\nstages: []\n"
    dry(with_text(tmp_path, text), code="RC01", says=("recipe.yaml:1:8", "python/object/apply"))
    assert not sentinel.exists()


def test_rc07_a_bomb_of_anchors_is_refused_at_once(tmp_path):
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    begin = time.perf_counter()
    dry(with_text(tmp_path, "\n".join(rows)), code="RC01", says="anchors and aliases are not used here")
    assert time.perf_counter() - begin < 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lr": float("nan"), "lr_new": -1.0}, ("lr must be a positive number, got nan", "lr_new must be")),
        ({"tokens": 0}, "tokens must be >= 1, got 0"),
        ({"tokens": -5}, "tokens must be >= 1, got -5"),
        ({"tokens": 63}, "a budget of 63 tokens is below one step of 64 tokens"),
        ({"warmup": 2.0}, "warmup must be between 0 and 1, got 2.0"),
        ({"batch_tokens": 0, "micro_batch": -1}, ("batch_tokens must be >= 1", "micro_batch must be >= 0")),
        ({"betas": [0.9, 1.0], "clip": -1.0}, ("betas must be two numbers", "clip must be >= 0")),
        ({"lr": "fast"}, "lr must be a number, got 'fast'"),
    ],
)
def test_rc08_numbers_out_of_range(tmp_path, changes, says):
    dry(write_tiny(tmp_path, NSA, stage(**changes)), code="RC08", says=says)


def test_rc09_lengths_that_do_not_fit_are_refused_and_none_is_rounded(tmp_path):
    sizes = {"tokens": 640, "batch_tokens": 128}
    path = write_tiny(tmp_path, NSA, stage(seq_len=128, **sizes))
    dry(path, code="RC09", says=("seq_len 128 is beyond the model's 64 positions", "set rope"))
    path = write_tiny(tmp_path, {**NSA, "block_size": 40}, stage(**sizes))
    dry(path, code="RC09", says="seq_len 32 is below a block of 40 tokens")
    path = write_tiny(tmp_path, NSA, stage(seq_len=33, tokens=660, batch_tokens=66))
    plan = call("train", path, "--dry-run", "--json")
    assert plan.code == 0, plan.err
    assert plan.json["stages"][0]["seq_len"] == 33  # no multiple of a block of 4: kernels take any length
    path = write_tiny(tmp_path, {**NSA, "num_blocks": 16}, stage())
    plan = call("train", path, "--dry-run")
    assert "rows of 32 tokens fit the visible budget of 64: nothing is hidden" in plan.err


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([5], "layers 5 do not exist: the model has layers 0-1"),
        ([1, 1], "layers are listed twice: [1, 1]"),
        ([1, -1], "listed twice"),
        ([], "layers is empty"),
        ("0-1", "layers must be a list of whole numbers, got '0-1'"),
    ],
)
def test_rc10_layers_that_are_not_there(tmp_path, layers, says):
    values = recipe_values(tmp_path / "run", NSA, stage())
    values["sparse_attention"]["rules"] = [{"method": "full", "layers": layers}]
    done = call("train", write_yaml(tmp_path / "recipe.yaml", values), "--dry-run", "--json")
    assert done.code == 3
    assert done.json["code"] in ("RC08", "CF22")
    assert says in done.json["message"]


def test_rc11_choices_that_contradict_each_other(tmp_path):
    path = write_tiny(tmp_path, {**SSA, "value_compressor": "linear"}, stage())
    dry(path, code="CF22", says="(ssa): unknown key 'value_compressor'; did you mean 'key_compressor'?")
    path = write_tiny(tmp_path, NSA, stage(lora={"rank": 2}))
    dry(path, code="RC08", says="lora has settings, but train is not lora")
    path = write_tiny(tmp_path, NSA, stage(kind="align", train="all", cross_entropy=1.0))
    dry(path, code="RC08", says=("align trains new or attention", "align has no next-token loss"))
    path = write_tiny(tmp_path, NSA, stage(losses={"alignment": 1.0}))
    dry(path, code="RC09", says="loss 'alignment' is none of the method's; it has output_error, score_kl")


def test_rc12_no_recipe_at_the_place(tmp_path):
    dry(tmp_path / "none.yaml", code="RC12", says="no such file")
    (tmp_path / "folder.yaml").mkdir()
    dry(tmp_path / "folder.yaml", code="RC12", says="no such file")
    path = tmp_path / "bytes.yaml"
    path.write_bytes(b"model: \xff\xfe\n")
    dry(path, code="RC12", says="bytes.yaml is not UTF-8 text")
    with path.open("wb") as file:
        file.truncate(100_000_000)
    dry(path, code="RC12", says="bytes.yaml is bigger than 10,000,000 bytes")
    path.write_text("- a\n- b\n")
    dry(path, code="RC01", says="must hold a mapping, got list")


def test_rc13_paths_start_at_the_recipe_and_are_shown_whole(tmp_path, monkeypatch):
    folder, elsewhere = tmp_path / "recipes", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "words.txt").write_text("some words " * 50)
    monkeypatch.chdir(elsewhere)
    data = [{"kind": "text", "path": "words.txt"}, {"kind": "recall"}]
    values = {**recipe_values(tmp_path, NSA, stage(data=data)), "out": "runs/a"}
    done = call("train", write_yaml(folder / "r.yaml", values), "--dry-run")
    assert done.code == 0, done.err
    assert f"reads 1 text {folder}/words.txt, 1 recall" in done.out
    assert f"-> {elsewhere}/runs/a" in done.out
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [{"hub_token": "whatever"}, {"WANDB_API_KEY": "0123456789"}, {"revision": TOKEN}],
    ids=lambda x: next(iter(x)),
)
def test_rc14_a_secret_is_refused_and_never_repeated(tmp_path, changes):
    ((key, secret),) = changes.items()
    path = write_tiny(tmp_path, NSA, stage(), **changes)
    done = dry(path, code="RC14", says=(key, "HF_TOKEN"))
    assert secret not in done.out + done.err
    values = recipe_values(tmp_path / "run", NSA, stage(data=[{"kind": "recall", "path": TOKEN}]))
    done = dry(write_yaml(path, values), code="RC14", says="stages[0].data[0].path")
    assert TOKEN not in done.out + done.err


def test_rc15_a_recipe_of_a_newer_version(tmp_path):
    path = write_tiny(tmp_path, NSA, stage(), schema=SCHEMA + 1)
    dry(path, code="RC08", says=(f"schema {SCHEMA + 1} is newer than this version", "update nsa-convert"))


def test_rc16_the_command_line_wins(tmp_path):
    path = write_tiny(tmp_path)
    before = tree_hash(tmp_path)
    words = ("--set", "stages.pretrain.tokens=128", "--set", "seed=7")
    done = call("train", path, "--dry-run", "--json", *words)
    assert (done.code, done.json["stages"][0]["steps"]) == (0, 2)
    assert tree_hash(tmp_path) == before
    says = "--set stages.align.tokens: there is no 'align'"
    dry(path, "--set", "stages.align.tokens=1", code="RC08", says=says)


@pytest.mark.parametrize(
    ("base", "code", "says"),
    [
        ("base/nsaa", "RC12", ("recipe.yaml: base: there is no recipe 'base/nsaa'", "mean 'base/nsa'?")),
        ("gone.yaml", "RC12", ("recipe.yaml: base: no such file", "gone.yaml")),
        ([1], "RC08", "base must be the name of a recipe, or a path from the folder of this one, got [1]"),
        (None, "RC08", "got None"),
        ("recipe.yaml", "RC08", ("recipes build on each other", "recipe.yaml -> ")),
        ("other.yaml", "RC08", ("other.yaml: recipes build on each other", "other.yaml -> ")),
        ("list.yaml", "RC01", "list.yaml must hold a mapping, got list"),
        (TOKEN, "RC12", "there is no recipe '[a token]'"),
    ],
)
def test_rc17_a_base_that_cannot_be_meant(tmp_path, base, code, says):
    write_yaml(tmp_path / "other.yaml", {"base": "recipe.yaml"})
    write_yaml(tmp_path / "list.yaml", [1])
    values = recipe_values(tmp_path / "run", NSA, stage(), base=base)
    dry(write_yaml(tmp_path / "recipe.yaml", values), code=code, says=says)


@pytest.mark.parametrize("place", ["base.yaml", "recipe.yaml"])
@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ([{"seq_len": 32}], "stages[0] has no name; stages of a recipe and its base are matched by name"),
        (["pretrain"], "stages[0] has no name"),
        ([stage(), stage()], "stages[1] is named pretrain again"),
    ],
)
def test_rc17_stages_that_cannot_be_matched(tmp_path, place, stages, says):
    write_yaml(tmp_path / "base.yaml", recipe_values(tmp_path / "run", NSA, stage()))
    values = {"base": "base.yaml", "stages": [{"name": "pretrain"}]}
    write_yaml(tmp_path / "recipe.yaml", values)
    values = yaml.safe_load((tmp_path / place).read_text())
    write_yaml(tmp_path / place, {**values, "stages": stages})
    dry(tmp_path / "recipe.yaml", code="RC08", says=f"{place}: {says}")


def test_rc17_what_a_recipe_on_a_base_says_is_read_as_strictly(tmp_path):
    base = recipe_values(tmp_path / "run", NSA, stage(), precison="bf16")
    write_yaml(tmp_path / "base.yaml", base)
    values = {"base": "base.yaml", "seeds": 1, "stages": [{"name": "pretrain", "seq_length": 64}]}
    says = ("unknown key 'seeds'; did you mean 'seed'", "'precison'", "'seq_length'; did you mean 'seq_len'")
    dry(write_yaml(tmp_path / "recipe.yaml", values), code="RC08", says=says)
    values = {"base": "base.yaml", "stages": [{"name": "pretrian", "tokens": 64}]}
    dry(write_yaml(tmp_path / "recipe.yaml", values), code="RC08", says="'kind' is missing")
    says = ("unknown key 'base'", "'model' is missing")
    dry("base/nsa", "--set", "base=tiny/nsa", code="RC08", says=says)
    dry("base/nsa", code="RC08", says=("nsa.yaml: 'model' is missing", "'out' is missing"))
