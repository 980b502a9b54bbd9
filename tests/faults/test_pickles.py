"""Pickled weights: refused, or read without running anything in them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import shard_paths
from tests.faults.checks import (
    INDEX,
    METHOD,
    converted,
    error_of,
    refused,
    run,
    snapshot,
    warned,
)


def only_pickles(source: Path, value: object) -> None:
    for path in [*shard_paths(source), source / INDEX]:
        path.unlink()
    torch.save(value, source / "pytorch_model.bin")


def test_ck31_pickles_alone(source):
    only_pickles(source, {})
    refused(source, "CK31", "pytorch_model.bin", "can run code", "save_pretrained")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in shard_paths(folder) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("parts", [1, 3])
def test_ck31_pickles_that_are_asked_for(source, parts):
    """The same tensors as from safetensors, tied ones and views of one block included."""
    tensors = tensors_of(source)
    block = torch.cat([tensors["model.norm.weight"], tensors["model.norm.weight"] + 1])
    state = {**tensors, "model.norm.weight": block[:32]}
    only_pickles(source, state)
    if parts > 1:
        (source / "pytorch_model.bin").unlink()
        names = [f"pytorch_model-0000{i + 1}-of-0000{parts}.bin" for i in range(parts)]
        places = {key: names[number % parts] for number, key in enumerate(state)}
        for name in names:
            torch.save({key: state[key] for key, place in places.items() if place == name}, source / name)
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    before = snapshot(source)
    dry = run("convert", source, source.parent / "out", *METHOD, "--allow-pickle", "--dry-run", "--json")
    assert dry.exit_code == 0, dry.stdout
    assert not (source.parent / "out").exists()
    out, report = converted(source, "--allow-pickle")
    assert (report["source"]["format"], report["placed"]) == ("pickle", "unpickled")
    assert json.loads(dry.stdout)["new_tensors"] == report["new_tensors"]
    found = tensors_of(out)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert snapshot(source) == before
    assert not list(out.rglob("*.bin"))
    run("revert", out, source.parent / "dense")
    assert tensors_of(source.parent / "dense").keys() == tensors.keys()


PICKLES = {
    "a number": (lambda tensors: {**tensors, "x": 3}, "CK32"),
    "a list": (lambda tensors: list(tensors.values()), "CK32"),
    "integers": (lambda tensors: {name: tensor.int() for name, tensor in tensors.items()}, "CK26"),
    "NaN": (lambda tensors: {name: tensor * float("nan") for name, tensor in tensors.items()}, "CK27"),
    "one is missing": (lambda tensors: dict(list(tensors.items())[1:]), "CK23"),
}


@pytest.mark.parametrize(("change", "code"), PICKLES.values(), ids=PICKLES)
def test_ck31_pickles_are_checked_like_safetensors(source, change, code):
    only_pickles(source, change(tensors_of(source)))
    refused(source, code, options=(*METHOD, "--allow-pickle"))


def test_ck31_index_of_pickles_may_not_lead_outside(source):
    only_pickles(source, {})
    (source / "pytorch_model.bin").rename(source.parent / "evil.bin")
    index = {"weight_map": {"a": "../evil.bin"}}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    refused(source, "CK20", options=(*METHOD, "--allow-pickle"))


def test_ck32_pickle_that_runs_code(source, tmp_path):
    sentinel = tmp_path / "sentinel"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {sentinel}",)

    only_pickles(source, {"x": Evil()})
    refused(source, "CK31")
    refused(source, "CK32", "pytorch_model.bin", options=(*METHOD, "--allow-pickle"))
    (source / "pytorch_model.bin").write_bytes(b"garbage")
    refused(source, "CK32", options=(*METHOD, "--allow-pickle"))
    torch.save({"x": Evil()}, source / "pytorch_model.bin")
    for command in (["generate", source, "--prompt", "a"], ["eval", source, "--out", tmp_path / "report"]):
        error_of(run(*command, "--json"), 3)
    assert not sentinel.exists()


def test_ck33_pickles_beside_safetensors(source):
    (source / "pytorch_model.bin").write_bytes(b"old")
    out = warned(source, "CK33")
    assert not (out / "pytorch_model.bin").exists()
