"""Triton kernels run on CPU tensors in the interpreter, unless GPU tests were asked for (``-m gpu``)."""

from __future__ import annotations

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # Counts only before triton is first imported, hence not a fixture.
    if config.getoption("markexpr") != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"
