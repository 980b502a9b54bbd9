"""Triton kernels run on CPU tensors in the interpreter, unless GPU tests were asked for (``-m gpu``)."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import pytest

from tests.faults.summary import report_line
from tests.published import summary

# torch's compiler imports setuptools, which insists that its own distutils is found first. Late in a process
# of a long run it found the interpreter's (seen once, in two tests), so it comes before everything here.
with contextlib.suppress(ImportError):
    import setuptools  # noqa: F401


def pytest_configure(config: pytest.Config) -> None:
    # Counts only before triton is first imported, hence not a fixture.
    if config.getoption("markexpr") != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for line in (report_line(terminalreporter.stats), summary.report_line(terminalreporter.stats)):
        if line is not None:
            terminalreporter.write_line(line)
