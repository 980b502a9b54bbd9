"""Runs end to end: exact resume, what is written, what is logged; tests/faults has what goes wrong."""

from __future__ import annotations

import gzip
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nsa_convert.errors import ConfigError
from nsa_convert.loading import load_causal_model
from nsa_convert.training.losses import StageLosses
from nsa_convert.training.run.runner import Interrupted
from tests.training.recipes import losses, run, same_weights

SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of an uninterrupted run of each case; trained once."""
    done: dict[str, Path] = {}

    def get(case: str) -> Path:
        if case not in done:
            done[case] = tmp_path_factory.mktemp("whole") / case
            run(done[case], case)
        return done[case]

    return get


@pytest.mark.parametrize(
    ("case", "stop_at"),
    [
        ("nsa", "pretrain 3/"),
        ("nsa in bf16", "pretrain 3/"),
        ("ssa", "pretrain 2/"),
        pytest.param("nsa", "align 1/", marks=SLOW),
        pytest.param("dense", "pretrain 1/", marks=SLOW),
    ],
)
def test_resumed_losses_are_those_of_an_uninterrupted_run(whole, tmp_path, case, stop_at):
    out = tmp_path / "run"
    with pytest.raises(Interrupted) as stopped:
        run(out, case, stop_at)
    assert stopped.value.number == signal.SIGTERM
    before = losses(out)
    # The line is printed after the step; the signal ends the run after the next one.
    assert before[-1][:2] == (stop_at.split()[0], int(stop_at.split()[1][0]) + 1)
    assert len(before) < len(losses(whole(case)))
    run(out, case, resume=True)
    assert losses(out) == losses(whole(case))
    assert same_weights(out / "pretrain", whole(case) / "pretrain")


def test_the_trained_model_is_an_ordinary_converted_checkpoint(whole):
    folder = whole("nsa") / "pretrain" / "model"
    model = load_causal_model(folder, torch.float32)
    assert type(model).__name__ == "NSALlamaForCausalLM"
    assert (folder / "modeling_nsa_llama.py").is_file()
    assert (folder / "tokenizer.json").is_file()
    gates = model.model.layers[0].self_attn.sparse.gate.weight
    assert gates.abs().max() > 0, "the gates were trained"


def test_streams_gap_and_gates_are_logged(whole):
    rows = [json.loads(line) for line in (whole("ssa") / "log.jsonl").read_text().splitlines()]
    assert {key for row in rows for key in row} >= {"alignment", "tokens_per_second", "learning_rate"}
    assert any("cross_entropy_sparse" in row or "cross_entropy_full" in row for row in rows)
    assert all(0.9 < row["gate_output"] < 1.1 for row in rows)
    rows = [json.loads(line) for line in (whole("nsa") / "log.jsonl").read_text().splitlines()]
    assert {"gate_compressed", "gate_selected", "gate_window", "gate_least_open"} <= set(rows[-1])


def test_the_last_model_has_the_dtype_of_the_checkpoint(tmp_path):
    """The stages before it keep what was trained, so that the next one begins where they ended."""
    run(tmp_path / "dense", "dense", save_dtype="bfloat16")
    base = tmp_path / "dense" / "pretrain" / "model"
    assert saved_dtypes(base) == {torch.bfloat16}

    run(tmp_path / "run", "nsa", model=str(base), folder=base)
    assert saved_dtypes(tmp_path / "run" / "align" / "model") == {torch.float32}
    trained = tmp_path / "run" / "pretrain" / "model"
    assert saved_dtypes(trained) == {torch.bfloat16}
    assert json.loads((trained / "config.json").read_text())["dtype"] == "bfloat16"

    run(tmp_path / "wide", "nsa", model=str(base), folder=base, save_dtype="float32")
    wide = load_file(tmp_path / "wide" / "pretrain" / "model" / "model.safetensors")
    narrow = load_file(trained / "model.safetensors")
    assert all(torch.equal(narrow[name], x.bfloat16()) for name, x in wide.items())
    assert any(not torch.equal(narrow[name].float(), x) for name, x in wide.items())


def test_a_fresh_model_keeps_the_dtype_of_training(whole):
    assert saved_dtypes(whole("nsa") / "pretrain" / "model") == {torch.float32}
    assert saved_dtypes(whole("nsa in bf16") / "pretrain" / "model") == {torch.bfloat16}


def saved_dtypes(folder: Path) -> set[torch.dtype]:
    return {x.dtype for x in load_file(folder / "model.safetensors").values()}


def test_one_step_is_profiled_on_request(tmp_path):
    run(tmp_path / "run", "dense", profile=2)
    (trace,) = (tmp_path / "run" / "pretrain").glob("profile-*")
    assert trace.name == "profile-step-2-rank-0.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event["name"] for event in events]
    assert any("scaled_dot_product" in name for name in names)
    assert any("AdamW" in name for name in names)


def test_deepspeed_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="DeepSpeed brings an optimizer of its own"):
        run(tmp_path / "run", "dense")
    assert not (tmp_path / "run").exists()


def test_every_micro_batch_samples_other_queries(tmp_path, monkeypatch):
    """The loss that teaches the compressor sees a sample of them; one for a whole step would show it less."""
    drawn = []
    original = StageLosses.mode

    def mode(self: StageLosses, step: int, **options: Any) -> Any:
        drawn.append((step, options["draw"]))
        return original(self, step, **options)

    monkeypatch.setattr(StageLosses, "mode", mode)
    run(tmp_path / "run", "ssa")
    assert drawn == [(number // 2, number) for number in range(10)]
