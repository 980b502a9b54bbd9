"""The optimizer's state in files: written by some processes, read by others, without a change of a bit."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nsa_convert.errors import CheckpointError
from nsa_convert.training.run import optimizer_states
from nsa_convert.training.run.optimizer import MasterAdamW
from nsa_convert.training.run.optimizer_states import OPTIMIZER, bad_states, load_optimizer, save_optimizer
from tests.training.processes import launch


class Small(nn.Module):
    """Layers whose 7 rows and 1 row cannot be cut evenly, and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 1)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)))


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return Small().to(torch.bfloat16)


def trained() -> tuple[nn.Module, MasterAdamW]:
    model = small_model()
    optimizer = MasterAdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        x = torch.randn(4, 5).to(torch.bfloat16)
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def states(model: nn.Module, optimizer: MasterAdamW) -> dict[str, dict[str, Tensor]]:
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state}


def loaded(folder: Path) -> dict[str, dict[str, Tensor]]:
    model = small_model()
    optimizer = MasterAdamW(model.parameters(), lr=1e-2)
    load_optimizer(model, optimizer, folder)
    return states(model, optimizer)


def check_same(found: dict[str, dict[str, Tensor]], want: dict[str, dict[str, Tensor]]) -> None:
    assert found.keys() == want.keys()
    for name, row in want.items():
        assert found[name].keys() == row.keys() == {"step", "exp_avg", "exp_avg_sq", "master"}
        for key, value in row.items():
            torch.testing.assert_close(found[name][key], value, rtol=0, atol=0)


def test_a_state_is_read_as_it_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(optimizer_states, "FILE_BYTES", 500)
    model, optimizer = trained()
    save_optimizer(model, optimizer, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1, "no file holds the whole state"
    want = states(model, optimizer)
    assert "unused.weight" not in want
    check_same(loaded(tmp_path), want)


def test_two_processes_read_what_one_wrote_and_one_what_they_wrote(tmp_path):
    model, optimizer = trained()
    save_optimizer(model, optimizer, tmp_path / "one")
    launch(["-m", "tests.training.state_worker", str(tmp_path)], 2)
    parts = sorted((tmp_path / "two").glob("*.safetensors"))
    assert [path.name[:11] for path in parts] == ["shard-00001", "shard-00002"]
    check_same(loaded(tmp_path / "two"), states(model, optimizer))


def test_what_cannot_be_used_is_named(tmp_path):
    model, optimizer = trained()
    optimizer.state[model.norm.weight]["exp_avg"][3] = torch.nan
    save_optimizer(model, optimizer, tmp_path / OPTIMIZER)
    (file,) = (tmp_path / OPTIMIZER).iterdir()
    name = f"{OPTIMIZER}/{file.name}"
    assert list(bad_states(tmp_path)) == [(name, "norm.weight.exp_avg", True)]
    file.write_bytes(b"\0" * 100)
    assert list(bad_states(tmp_path)) == [(name, f"{name} cannot be read (SafetensorError)", False)]


def test_a_state_of_other_weights_is_refused(tmp_path):
    model, optimizer = trained()
    save_optimizer(model, optimizer, tmp_path)
    part = MasterAdamW(model.a.parameters())
    with pytest.raises(CheckpointError, match="which this stage does not train") as refused:
        load_optimizer(model, part, tmp_path)
    assert refused.value.code == "TR12"


def test_a_full_disk_is_the_error_it_is(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    model, optimizer = trained()
    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.FileSystem.create_stream", full)
    with pytest.raises(OSError, match="No space left"):
        save_optimizer(model, optimizer, tmp_path)
