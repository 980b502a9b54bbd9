"""Recipes trained by two processes: the losses and weights of one, exact resume, and what is refused."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from nsa_convert.errors import ConfigError
from nsa_convert.loading import load_causal_model
from nsa_convert.training.recipe.schema import recipe_from_dict
from nsa_convert.training.run.forecast import forecast_recipe
from nsa_convert.training.run.parallel import Parallel, can_shard, planned
from nsa_convert.training.run.runner import train_recipe
from tests.models import DSA, MOBA, tokens
from tests.training.processes import SHARDED, free_port, launch
from tests.training.recipes import ALIGN, FRESH, NSA, ROOT, SSA, losses, recipe_values, same_weights, stage
from tests.training.test_held_out import evaluated

SLOW = pytest.mark.slow
MODEL = {
    **FRESH,
    "vocab": 258,
    "config": {**FRESH["config"], "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
}
LORA = stage(train="lora", lora={"rank": 2, "alpha": 4.0, "targets": ["q_proj", "o_proj", "down_proj"]})
STAGES = {
    "nsa": (NSA, (ALIGN, stage())),
    "ssa": (SSA, (stage(checkpointing=True, losses={"alignment": 10.0, "score_kl": 1.0}, teacher_kl=0.5),)),
    "lora": (NSA, (LORA,)),
}
"""Name -> method and stages; each is trained by one process too."""
RUNS = {
    "rows nsa": ("nsa", {}),
    "context nsa": ("nsa", {"context": 2}),
    "tensor nsa": ("nsa", {"tensor": 2}),
    "fsdp nsa": ("nsa", {"fsdp": 2}),
    "context ssa": ("ssa", {"context": 2}),
    "tensor ssa": ("ssa", {"tensor": 2}),
    "fsdp and context ssa": ("ssa", {"fsdp": 2, "context": 2}),
    "fsdp lora": ("lora", {"fsdp": 2}),
    "context lora": ("lora", {"context": 2}),
}
RUNS = {name: run for name, run in RUNS.items() if can_shard() or run[1].keys() <= {"context"}}
RESUMED = ("rows nsa", "context ssa", "tensor nsa", "fsdp nsa", "fsdp and context ssa", "fsdp lora")
LIMIT = 1e-5
MEASURED_ON_FEW = {"eval_captured", "eval_oracle"}
"""Figures of the first rows of each process."""


def values(out: Path, case: str, **keys: Any) -> dict[str, Any]:
    method, stages = STAGES[case]
    return recipe_values(out, method, *copy.deepcopy(stages), model=copy.deepcopy(MODEL), **keys)


def job(out: Path, name: str, stop_at: int | None = None, resume: bool = False) -> dict[str, Any]:
    case, keys = RUNS[name]
    return {"recipe": values(out / name, case, **keys), "stop_at": stop_at, "resume": resume}


def train_together(folder: Path, jobs: list[dict[str, Any]], processes: int = 2) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    launch(["-m", "tests.training.run_worker", str(folder)], processes, torchrun=processes > 1)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Return the folder of a run in one process; trained once."""
    done: dict[str, Path] = {}

    def get(case: str) -> Path:
        if case not in done:
            done[case] = tmp_path_factory.mktemp("one") / case
            train_recipe(recipe_from_dict(values(done[case], case)), None, base=ROOT)
        return done[case]

    return get


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Return the folder of the runs that two processes train, one launch for all."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("two")
    train_together(folder, [job(folder, name) for name in RUNS])
    return folder


@SLOW
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_what_one_trains(name, one, two):
    case = RUNS[name][0]
    out = two / name
    found, want = losses(out), losses(one(case))
    assert [row[:2] for row in found] == [row[:2] for row in want]
    assert max(abs(x[2] - y[2]) for x, y in zip(found, want, strict=True)) < LIMIT
    assert len({row[2] for row in want}) == len(want)
    a, b = (load_file(folder / "pretrain" / "model" / "model.safetensors") for folder in (out, one(case)))
    assert a.keys() == b.keys()
    assert max((a[key] - b[key]).abs().max().item() for key in a) < LIMIT
    model = load_causal_model(out / "pretrain" / "model", torch.float32).eval()
    with torch.no_grad():
        assert model(tokens(1, 40)).logits.isfinite().all()


@SLOW
@pytest.mark.parametrize("name", [name for name in RESUMED if name in RUNS])
def test_a_stopped_run_goes_on_bit_for_bit(name, two, tmp_path):
    whole = two / name
    train_together(tmp_path / "a", [job(tmp_path, name, stop_at=2)])
    assert len(losses(tmp_path / name)) < len(losses(whole))
    train_together(tmp_path / "b", [job(tmp_path, name, resume=True)])
    assert losses(tmp_path / name) == losses(whole)
    assert same_weights(tmp_path / name / "pretrain", whole / "pretrain")


@SLOW
@SHARDED
def test_float32_masters_of_cut_bfloat16_weights_are_saved_and_loaded(tmp_path):
    """The optimizer's state is gathered and cut again; rounded to the weights' dtype the run would differ."""
    keys = {"fsdp": 2, "precision": "bf16", "save_dtype": "bfloat16"}

    def runs(name: str, stop_at: int | None = None, resume: bool = False) -> dict[str, Any]:
        return {"recipe": values(tmp_path / name, "nsa", **keys), "stop_at": stop_at, "resume": resume}

    train_together(tmp_path / "a", [runs("whole"), runs("stopped", stop_at=2)])
    assert len(losses(tmp_path / "stopped")) < len(losses(tmp_path / "whole"))
    train_together(tmp_path / "b", [runs("stopped", resume=True)])
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert same_weights(tmp_path / "stopped" / "pretrain", tmp_path / "whole" / "pretrain")

    saved = load_file(tmp_path / "whole" / "pretrain" / "model" / "model.safetensors")
    assert {x.dtype for x in saved.values()} == {torch.bfloat16}


@SLOW
@SHARDED
def test_copies_of_shared_weights_train_what_one_process_trains(one, tmp_path):
    """Four processes, two of which share the weights, and two copies; one run shares rows too."""
    runs = {"copies": ("nsa", {"fsdp": 2}), "rows": ("ssa", {"fsdp": 2, "context": 2})}
    part = {"batch_tokens": 128, "tokens": 128 * 5}

    def recipe(name: str, case: str, keys: dict[str, int]) -> dict[str, Any]:
        made = values(tmp_path / name, case, **keys)
        for row in made["stages"]:
            row |= part
        return made

    jobs = [{"recipe": recipe(name, *run), "stop_at": None, "resume": False} for name, run in runs.items()]
    train_together(tmp_path / "jobs", jobs, processes=4)
    for name, (case, _) in runs.items():
        alone = tmp_path / f"{name} alone"
        train_recipe(recipe_from_dict(recipe(alone.name, case, {})), None, base=ROOT)
        pairs = list(zip(losses(tmp_path / name), losses(alone), strict=True))
        assert max(abs(x[2] - y[2]) for x, y in pairs) < LIMIT, name
        a, b = (load_file(place / "pretrain/model/model.safetensors") for place in (tmp_path / name, alone))
        assert max((a[key] - b[key]).abs().max().item() for key in a) < LIMIT, name


@SLOW
@SHARDED
def test_weights_sent_in_bfloat16_train_nearly_the_same(tmp_path):
    sent = {"precision": "bf16-mixed", "fsdp": 2}
    runs = {"wide": sent, "half": {**sent, "fsdp_send": "bfloat16"}}
    jobs = [
        {"recipe": values(tmp_path / name, "nsa", **keys), "stop_at": None, "resume": False}
        for name, keys in runs.items()
    ]
    train_together(tmp_path / "jobs", jobs)
    wide, half = (losses(tmp_path / name) for name in runs)
    assert wide != half
    assert max(abs(x[2] - y[2]) for x, y in zip(wide, half, strict=True)) < 0.02


def test_weights_are_sent_in_bfloat16_where_that_is_what_is_computed_in(tmp_path):
    for keys in ({"precision": "fp32", "fsdp": 2}, {"precision": "bf16-mixed"}):
        with pytest.raises(
            ConfigError, match="fsdp_send bfloat16 goes with precision bf16-mixed and fsdp above 1"
        ):
            recipe_from_dict(values(tmp_path, "nsa", fsdp_send="bfloat16", **keys))


@SLOW
def test_processes_evaluate_what_one_evaluates(tmp_path):
    """Each reads other rows, or a part of every row; nothing waits for ever."""
    data = [{"kind": "reference", "hold_out": 0.1}, {"kind": "recall", "pairs": 4}]
    part = stage(data=data, eval_every=2, eval_rows=4)
    keys = {"data": {}, "context": {"context": 2}} | ({"fsdp": {"fsdp": 2}} if can_shard() else {})

    def recipe(name: str) -> dict[str, Any]:
        return recipe_values(tmp_path / name, NSA, part, model=copy.deepcopy(MODEL), **keys.get(name, {}))

    train_recipe(recipe_from_dict(recipe("one")), None, base=ROOT)
    jobs = [{"recipe": recipe(name), "stop_at": None, "resume": False} for name in keys]
    train_together(tmp_path / "jobs", jobs)
    want = evaluated(tmp_path / "one")
    assert [row["step"] for row in want] == [0, 2, 4, 5]
    for name in keys:
        found = evaluated(tmp_path / name)
        assert len(found) == len(want), name
        for row, right in zip(found, want, strict=True):
            # Processes that share a row measure no mass.
            figures = row.keys() if name == "context" else right.keys()
            assert {"eval_loss", "eval_dense_loss", "eval_kl", "eval_score_kl"} <= figures
            for figure in figures - MEASURED_ON_FEW:
                assert row[figure] == pytest.approx(right[figure], abs=LIMIT), (name, figure)


@SLOW
@SHARDED
def test_a_cut_model_ends_with_its_best_weights(tmp_path):
    """At such a rate every step makes the model worse, so the first evaluation is the best."""
    pytest.importorskip("peft")
    data = [{"kind": "reference", "hold_out": 0.1}, {"kind": "recall", "pairs": 4}]
    worse = {"lr": 3.0, "tokens": 64 * 20, "data": data, "eval_every": 1, "eval_rows": 4}
    worse |= {"keep_best": "loss", "patience": 1, "keep": 1}
    parts = {"all": stage(**worse), "lora": {**LORA, **worse}}
    jobs = []
    for name, part in parts.items():
        recipe = recipe_values(tmp_path / name, NSA, part, model=copy.deepcopy(MODEL), fsdp=2, alarms="warn")
        jobs.append({"recipe": recipe, "stop_at": None, "resume": False})
    train_together(tmp_path / "jobs", jobs)

    for name, file in (("all", "model/model.safetensors"), ("lora", "adapter/adapter_model.safetensors")):
        place = tmp_path / name / "pretrain"
        report = json.loads((place / "model" / "stage.json").read_text())
        best, end = report["weights_of_step"], report["steps"]
        assert best < end
        model, kept, last = (
            load_file(path)
            for path in (place / file, *(place / f"checkpoint-{n}" / Path(file).name for n in (best, end)))
        )
        assert model.keys() == kept.keys()
        assert all(torch.equal(model[key], kept[key]) for key in model), name
        assert any(not torch.equal(model[key], last[key]) for key in model), name


@SLOW
@SHARDED
def test_an_adapter_of_a_cut_model_belongs_to_the_whole_one(two):
    from peft import PeftModel

    out = two / "fsdp lora"
    base = load_causal_model(out / "start", torch.float32)
    adapted = PeftModel.from_pretrained(base, out / "pretrain" / "adapter").eval()
    merged = load_causal_model(out / "pretrain" / "model", torch.float32).eval()
    with torch.no_grad():
        want = adapted(tokens(2, 40)).logits
        torch.testing.assert_close(merged(tokens(2, 40)).logits, want, rtol=1e-5, atol=1e-5)


@SLOW
def test_the_command_line_trains_with_two_processes(tmp_path, one):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(values(tmp_path / "run", "nsa")))
    start = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    words = ["-m", "nsa_convert.cli", "train", str(path), "--set", "context=2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *start, *words]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the trained model" in done.stdout
    pairs = zip(losses(tmp_path / "run"), losses(one("nsa")), strict=True)
    assert max(abs(x[2] - y[2]) for x, y in pairs) < LIMIT


def check(tmp_path: Path, parallel: Parallel | None = None, method: dict | None = NSA, **changes: Any) -> str:
    """Return why a recipe is refused."""
    stages = changes.pop("stages", (stage(),))
    recipe = recipe_from_dict(recipe_values(tmp_path, method, *stages, model=copy.deepcopy(MODEL), **changes))
    from nsa_convert.training.run.models import read_start

    with pytest.raises(ConfigError) as refused:
        forecast_recipe(recipe, read_start(recipe, None), ROOT, parallel=parallel or planned(recipe))
    assert refused.value.code == "RC09"
    return refused.value.message


@pytest.mark.parametrize(
    ("parallel", "says"),
    [
        ({"processes": 1, "context": 2}, "context 2 takes a multiple of 2 processes"),
        ({"processes": 3, "tensor": 2}, "tensor 2 takes 2 processes"),
        ({"processes": 4, "tensor": 2, "fsdp": 2}, "tensor 2 takes 2 processes and fsdp 1 (got fsdp 2)"),
        ({"processes": 4, "fsdp": 3}, "fsdp 3 does not divide the 4 processes; start it with torchrun"),
        ({"processes": 1, "fsdp": 8}, "fsdp 8 does not divide the 1 processes; start it with torchrun"),
        ({"processes": 4, "fsdp": 2, "tensor": 2, "context": 2}, "cannot be combined"),
    ],
)
def test_sizes_that_do_not_fit_the_processes_are_refused(parallel, says, tmp_path):
    assert says in check(tmp_path, Parallel(**parallel))


@pytest.mark.parametrize(
    ("method", "stages", "keys", "says"),
    [
        (DSA, (stage(),), {"tensor": 2}, "infllm_v2, streaming, full, not dsa"),
        ({**MOBA, "key_conv": 3}, (stage(),), {"tensor": 2}, "tensor parallel needs key_conv 0"),
        (NSA, (stage(),), {"tensor": 4}, "tensor parallel of 4 processes has to divide the 2 key"),
        ({**NSA, "branch_kv": "independent"}, (stage(),), {"tensor": 2}, "branch_kv shared"),
        ({**MOBA, "key_conv": 3}, (stage(),), {"context": 2}, "key_conv of moba needs tokens of other"),
        ({"method": "streaming"}, (stage(),), {"context": 2}, "not streaming"),
        (None, (stage(),), {"context": 2}, "context needs a sparse model"),
        (
            DSA,
            (stage(seq_len=33, batch_tokens=66, tokens=330),),
            {"context": 2},
            "seq_len 33 is not a multiple",
        ),
        (NSA, (stage(micro_batch=2),), {"context": 2}, "micro_batch must be 1, got 2"),
        (NSA, (LORA,), {"tensor": 2}, "tensor cannot be combined with train: lora"),
        (NSA, (stage(),), {"fsdp": 8}, "a step of 2 rows cannot be shared by 8"),
        (NSA, (stage(),), {"fsdp": 8}, "fsdp 8 has to divide the 258 rows of tied embeddings"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_name(method, stages, keys, says, tmp_path):
    if not can_shard() and "context" not in keys:
        says = "need transformers 5.19 or newer"
    assert says in check(tmp_path, method=method, stages=stages, **keys)


def test_a_dry_run_shows_how_the_processes_share_the_work(tmp_path):
    from click.testing import CliRunner

    from nsa_convert.cli import main

    path = tmp_path / "r.yaml"
    path.write_text(
        yaml.safe_dump(recipe_values(tmp_path / "run", NSA, model=copy.deepcopy(MODEL), context=2))
    )
    done = CliRunner().invoke(main, ["train", str(path), "--dry-run"], catch_exceptions=False)
    assert "2 processes; a row by 2 (context)" in done.output
    done = CliRunner().invoke(main, ["train", str(path), "--dry-run", "--json"], catch_exceptions=False)
    assert json.loads(done.output)["parallel"] == {"processes": 2, "fsdp": 1, "tensor": 1, "context": 2}
