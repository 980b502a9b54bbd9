"""The pytest plugin of `make test-hf`: what stock Llama passes has to pass, or stands in refused.py.

A first run with ``--record`` writes which tests the stock class passes in this environment. A run
``--against`` that file takes those of the converted classes. Tests in the list are expected to fail,
strictly: an entry whose test passes, or that no test has, fails the run. A test that stock Llama passes
and that is skipped here is a failure too.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hf.refused import REFUSED, find

STOCK = "Stock_llama"
PASSED, LISTED, OTHER = "passed", "listed", "failed"


class Checks:
    """Chooses the tests, marks those in the list, counts."""

    def __init__(self, record: str | None, against: str | None) -> None:
        self.record, self.required = (
            record,
            None if against is None else json.loads(Path(against).read_text()),
        )
        self.counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        self.stock: list[str] = []
        self.used: set[Any] = set()

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        chosen, left = [], []
        for item in items:
            stock = item.cls.__name__ == STOCK
            (chosen if self._wanted(item.name, stock) else left).append(item)
            entry = None if stock else find(item.cls.__name__, item.name)
            if entry is not None:
                self.used.add(entry)
                item.add_marker(pytest.mark.xfail(reason=entry.reason, strict=True))
        items[:] = chosen
        config.hook.pytest_deselected(items=left)
        whole = not config.getoption("keyword") and all("::" not in arg for arg in config.args)
        if self.required is not None and whole and (stale := [e.test for e in REFUSED if e not in self.used]):
            raise pytest.UsageError(f"refused.py lists tests that do not exist: {', '.join(stale)}")

    def _wanted(self, name: str, stock: bool) -> bool:
        return stock if self.required is None else not stock and name in self.required

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
        report = yield
        skipped = report.skipped and not hasattr(report, "wasxfail") and not hasattr(report, "context")
        if self.required is not None and skipped and find(item.cls.__name__, item.name) is None:
            report.outcome = "failed"
            report.longrepr = f"stock Llama passes this test, here it is skipped: {report.longrepr}"
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if hasattr(report, "context") or (report.when != "call" and report.passed):
            return  # a part of a test (subTest), which the test itself sums up
        _, cls, name = report.nodeid.rsplit("::", 2)
        self.counts[cls][{"passed": PASSED, "skipped": LISTED}.get(report.outcome, OTHER)] += 1
        if cls == STOCK and report.passed:
            self.stock.append(name)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.record and self.stock and not hasattr(session.config, "workerinput"):
            Path(self.record).write_text(json.dumps(sorted(self.stock), indent=1))
            session.exitstatus = pytest.ExitCode.OK  # what stock Llama fails here is required of nobody

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for cls, counts in sorted(self.counts.items()):
            skipped = "skipped" if cls == STOCK else LISTED
            told = f"{counts[PASSED]} passed, {counts[LISTED]} {skipped}, {counts[OTHER]} failed"
            terminalreporter.write_line(f"{cls}: {told}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", help="write the tests that stock Llama passes to this file")
    parser.addoption("--against", help="take the tests that this file names")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Checks(config.getoption("record"), config.getoption("against")))
