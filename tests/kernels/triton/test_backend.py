"""Which backend serves a call, and what it says when it cannot."""

from __future__ import annotations

import warnings

import pytest
import torch

pytest.importorskip("triton")

from nsa_convert.errors import BackendError
from nsa_convert.kernels import use_backend
from nsa_convert.kernels.common.backend import choose_backend
from nsa_convert.kernels.common.toolchain import Config, all_kernels, declare


def queries(dtype: torch.dtype = torch.float32, dim: int = 16) -> torch.Tensor:
    return torch.zeros(1, 2, 2, dim, dtype=dtype)


def test_cpu_tensors_run_on_torch_unless_asked() -> None:
    assert choose_backend(queries()) == "torch"
    with use_backend("triton"):
        assert choose_backend(queries()) == "triton"
    with use_backend("reference"):
        assert choose_backend(queries()) == "reference"


def test_without_the_interpreter_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with use_backend("triton"), pytest.raises(BackendError, match="cannot run on cpu") as caught:
        choose_backend(queries())
    assert "TRITON_INTERPRET=1" in caught.value.hint


@pytest.mark.parametrize(
    ("q", "value_dim", "reason"),
    [
        (queries(torch.float64), None, "no kernels for torch.float64"),
        (queries(dim=320), None, "head dims 320 and 320"),
        (queries(), 8, "head dims 16 and 8"),
    ],
)
def test_what_no_kernel_serves_runs_on_torch_and_is_said_once(q, value_dim, reason, monkeypatch) -> None:
    monkeypatch.setattr("nsa_convert.kernels.common.backend._told", set())
    with use_backend("triton"):
        with pytest.warns(UserWarning, match=reason):
            assert choose_backend(q, value_dim) == "torch"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert choose_backend(q, value_dim) == "torch"


def test_kernels_must_type_every_argument() -> None:
    with pytest.raises(ValueError, match=r"no type for \['y'\]"):

        @declare(types={"x": "*T"}, cases=({"N": 1},))
        def kernel(x, y, s_x, N): ...

    with pytest.raises(ValueError, match="no configuration for long rows"):

        @declare(types={"x": "*T"}, configs=(Config(max_row=512),), cases=({},))
        def short(x): ...


def test_the_table_names_each_kernel_once() -> None:
    names = [kernel.name for kernel in all_kernels()]
    assert len(names) == len(set(names))
