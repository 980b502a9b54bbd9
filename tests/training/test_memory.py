"""The memory that a rehearsal foretells is the memory that a real step takes, for whatever can be trained."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from nsa_convert.kernels.common.custom_ops import is_opaque
from nsa_convert.methods.parts.registry import METHODS
from nsa_convert.patterns import SequenceLayout
from nsa_convert.training.losses import stage_losses
from nsa_convert.training.recipe.schema import Recipe, Stage, recipe_from_dict
from nsa_convert.training.recipe.sections import Machine
from nsa_convert.training.run import rehearsal
from nsa_convert.training.run.flops import PEAKS, flops_per_token
from nsa_convert.training.run.models import load_first, methods_of, prepare_model, read_start
from nsa_convert.training.run.needs import (
    SPARE,
    device_memory,
    disk_bytes,
    fit_problem,
    host_bytes,
    memory_advice,
    weights_of,
)
from nsa_convert.training.run.optimizer_states import FILE_BYTES
from nsa_convert.training.run.parallel import Parallel
from tests.models import VARIANTS

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
TRAINABLE = [name for name, method in METHODS.items() if method.spec.trainable]
TRAIN = get_args(get_type_hints(Stage)["train"])
LENGTH = 256


def recipe(method: str | None, **changes: Any) -> Recipe:
    kind = changes.pop("kind", "pretrain")
    more = {key: changes.pop(key) for key in ("precision", "fsdp", "context") if key in changes}
    row = {
        "name": "a",
        "kind": kind,
        "train": "all",
        "seq_len": LENGTH,
        "tokens": 8 * LENGTH,
        "batch_tokens": 2 * LENGTH,
        "data": [{"kind": "recall"}],
        **changes,
    }
    plan = {} if method is None else {"sparse_attention": {"default": VARIANTS[method]}}
    model = {"family": "llama", "vocab": 4096, "config": SIZES}
    return recipe_from_dict({"model": model, "out": "out", "stages": [row], **plan, **more})


def measured(read: Recipe) -> int:
    """Return the most bytes that a second micro-batch of a step has at once, weights and gradients apart."""
    stage, start = read.stages[0], read_start(read, None)
    model = prepare_model(load_first(read, start).train(), stage)
    methods = methods_of(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)

    losses = stage_losses(stage, methods, 0, 0)
    stream = "teacher" if losses.teacher else "sparse"
    mode = dataclasses.replace(losses.mode(0), stream=stream, teacher_kl=losses.teacher_kl)
    ids = torch.randint(0, 257, (stage.micro_batch, LENGTH))
    mixed = read.precision != "fp32"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed, cache_enabled=False):
            batch = {"input_ids": ids, "labels": ids}
            out = losses.run(model, batch, mode) if methods else model(**batch, use_cache=False)
        out.loss.backward()

    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


CASES = [
    (method, {"train": train, "checkpointing": checkpointing})
    for method in (None, *TRAINABLE)
    for train in TRAIN
    for checkpointing in (False, True)
    if not (method in (None, "streaming") and train == "new")
]
FAST = {(None, "all", True), ("nsa", "lora", False), ("ssa", "attention", True), ("dsa", "all", False)}


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        pytest.param(
            *case,
            id="-".join(map(str, (case[0], *case[1].values()))),
            marks=[] if (case[0], *case[1].values()) in FAST else pytest.mark.slow,
        )
        for case in CASES
    ]
    + [
        pytest.param("nsa", {"kind": "align", "train": "new"}, id="align"),
        pytest.param("ssa", {"teacher_kl": 1.0, "micro_batch": 2}, id="teacher_kl"),
        pytest.param("moba", {"precision": "bf16-mixed", "checkpointing": True}, id="mixed"),
    ],
)
def test_a_rehearsal_is_within_15_percent_of_a_real_step(method, changes):
    read = recipe(method, **changes)
    if read.stages[0].train == "new" and not methods_have_weights(read):
        pytest.skip("the method adds no weights")
    foretold = rehearsal.step_memory(read, read.stages[0], read_start(read, None), Parallel()).peak
    assert foretold == pytest.approx(measured(read), rel=0.15)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_of_different_kinds_are_added_up_by_kind(checkpointing, monkeypatch):
    """A few of each kind foretell what all take: three dense layers, a sliding one, sixteen of DSA."""
    rules = [{"layers": [0, 1, -1], "method": "full"}, {"layers": [7], **VARIANTS["streaming"]}]
    values = recipe("dsa", checkpointing=checkpointing).to_dict()
    values["sparse_attention"]["rules"] = rules
    values["model"]["config"]["num_hidden_layers"] = 20
    read = recipe_from_dict(values)

    depths = []
    whole = rehearsal._rehearse
    monkeypatch.setattr(rehearsal, "_rehearse", lambda *a: depths.append(len(a[-1])) or whole(*a))
    start = read_start(read, None)
    found = rehearsal.step_memory(read, read.stages[0], start, Parallel()).peak
    assert depths == [5, 6, 6]
    with rehearsal._no_values():
        wanted = whole(read, read.stages[0], start, Parallel(), 1, range(20))
    assert found == pytest.approx(wanted, rel=0.02)


def methods_have_weights(read: Recipe) -> bool:
    return any(list(method.parameters()) for method in read_start(read, None).methods())


def test_a_rehearsal_leaves_operators_as_they_were():
    read = recipe("moba")
    rehearsal.step_memory(read, read.stages[0], read_start(read, None), Parallel())
    q = torch.zeros(1, 2, 1, 4)
    assert not is_opaque(SequenceLayout(offset=0), q)


def test_what_divides_the_memory():
    """Checkpointing, context and FSDP2 take less; a longer row takes more."""
    weights = weights_of({"model.layers.0.a": 4_000_000, "model.embed_tokens": 1000}, 4_001_000, recipe(None))

    def need(parallel: Parallel = Parallel(), **changes: Any) -> int:  # noqa: B008
        read = recipe("moba", **changes)
        return device_memory(read, read.stages[0], read_start(read, None), weights, parallel)

    alone = need()
    assert need(checkpointing=True) < alone
    assert need(Parallel(processes=2, context=2)) < alone + 4 * weights.trained
    assert need(Parallel(processes=4, fsdp=4)) < alone
    assert need(Parallel(processes=2)) > alone
    assert need(seq_len=2 * LENGTH, tokens=8 * LENGTH) > alone


def test_disk_and_host_count_checkpoints_and_copies():
    read = recipe(None, save_every=1, keep=2)
    weights = weights_of({"model.layers.0.a": 1000, "lm_head": 10}, 1010, read)
    assert (weights.outer, weights.largest_layer, weights.number) == (10, 1000, 4)
    # The model, and three checkpoints while the third is written: weights and two moments.
    assert disk_bytes(read, 0, [weights], Parallel()) == 4 * 1010 * (1 + 3 * 3)
    few = dataclasses.replace(weights, trained=10)
    assert host_bytes(few, Parallel(processes=2)) == 2 * 4 * 1010
    assert host_bytes(few, Parallel(processes=2, fsdp=2)) == 4 * 1010
    # The moments are copied twice to write them, but never more than a file of them.
    assert host_bytes(weights, Parallel()) == 2 * 2 * 4 * 1010
    many = dataclasses.replace(weights, trained=10**12)
    assert host_bytes(many, Parallel()) == 2 * FILE_BYTES


@pytest.mark.parametrize(
    ("memory", "says"), [(7.1e10, None), (7.3e10, "less than 10% to spare"), (9e10, "does not fit")]
)
def test_a_machine_that_is_too_small_is_said(memory, says):
    stage = recipe(None).stages[0]
    problem = fit_problem(int(memory), stage, Machine(devices=8, memory=80), Parallel(), True)
    assert SPARE == 0.1
    assert (problem is None) if says is None else (says in problem and "context=2" in problem)


def test_advice_names_what_changes_the_run_least_first():
    stage = recipe(None, micro_batch=2).stages[0]
    keys = [line.split("=")[0].split(".")[-1].split()[-1] for line in memory_advice(stage, 2, shareable=True)]
    assert keys == ["checkpointing", "micro_batch", "context", "seq_len"]
    stage = recipe(None, checkpointing=True).stages[0]
    assert len(memory_advice(stage, 1, shareable=False)) == 1


def test_every_kind_of_gpu_that_a_recipe_can_name_has_a_peak():
    assert set(get_args(get_type_hints(Machine)["gpu"])) == set(PEAKS)


def test_flops_are_those_of_what_is_trained():
    def work(kind: str = "pretrain", train: str = "all", **changes: Any) -> float:
        read = recipe("nsa", kind=kind, train=train, **changes)
        model = prepare_model(load_first(read, read_start(read, None)), read.stages[0])
        return flops_per_token(model, read.stages[0])

    layers = 4 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 384)  # matrices of the dense layers
    head = 4096 * 128
    assert work() - work(train="new") == pytest.approx(2 * (layers + head))
    # The alignment stage goes forward alone through the dense weights, and has no logits.
    visible = read_start(recipe("nsa"), None).methods()[0].reach().decode_keys
    dense = 4 * 4 * 128 * LENGTH / 2
    assert work(train="new") - work("align", "new") == pytest.approx(2 * layers + 4 * head - dense)
    assert work(teacher_kl=1.0) - work() == pytest.approx(2 * (layers + head) + dense)
    assert visible < LENGTH
