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

from tests.hf.refused import REFUSED, Refused, find

STOCK = "Stock_llama"
PASSED = "passed"
LISTED = "listed"
OTHER = "failed"


class Checks:
    """Chooses the tests, marks those in the list, counts."""

    def __init__(self, record: str | None, against: str | None) -> None:
        self.record = record
        self.required = None if against is None else json.loads(Path(against).read_text())
        self.counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        self.stock: list[str] = []
        self.used: set[Any] = set()
        self.in_parts: set[Any] = set()
        self.failing: set[Any] = set()
        self.broken: set[str] = set()
        self.note = ""

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        chosen = []
        left = []

        for item in items:
            stock = item.cls.__name__ == STOCK
            (chosen if self._wanted(item.name, stock) else left).append(item)

            # Whole tests in the list are marked; those listed in parts are settled part by part.
            entry = None if stock else find(item.cls.__name__, item.name)
            if entry is not None:
                self.used.add(entry)
                if not entry.parts:
                    item.add_marker(pytest.mark.xfail(reason=entry.reason, strict=True))

        items[:] = chosen
        config.hook.pytest_deselected(items=left)

        # Only a run of the whole suite can tell which entries name no test.
        whole = not config.getoption("keyword") and all("::" not in arg for arg in config.args)
        absent = any(getattr(item.cls, "absent", False) for item in items)
        unused = [e for e in REFUSED if e not in self.used and not (absent and e.generation)]
        if self.required is not None and whole and (stale := [e.test for e in unused]):
            raise pytest.UsageError(f"refused.py lists tests that do not exist: {', '.join(stale)}")

    def _wanted(self, name: str, stock: bool) -> bool:
        return stock if self.required is None else not stock and name in self.required

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> Iterator[None]:
        """Settle what a report means before anybody counts it."""
        _, cls, name = report.nodeid.rsplit("::", 2)

        entry = None if cls == STOCK or self.required is None else find(cls, name)

        # Only the report of a part (subTest) has a context.
        if hasattr(report, "context"):
            self._part(report, cls, name, entry)
        else:
            skipped = report.skipped and not hasattr(report, "wasxfail")

            if self.required is not None and skipped and (entry is None or entry.parts):
                report.outcome = "failed"
                report.longrepr = f"stock Llama passes this test, here it is skipped: {report.longrepr}"
            if entry is not None and entry.parts:
                self.in_parts.add(entry)
            self._count(report, cls, name)

        return (yield)

    def _part(self, report: pytest.TestReport, cls: str, name: str, entry: Refused | None) -> None:
        """Look at a part of a test (subTest); stock Llama skips some of them too."""
        # A worker of xdist has settled it already.
        if entry is not None and entry.parts and (report.failed or hasattr(report, "wasxfail")):
            report.outcome = "skipped"
            report.wasxfail = entry.reason
            self.failing.add(entry)
        elif report.failed:
            self.counts[cls][OTHER] += 1
            self.broken.add(name)

    def _count(self, report: pytest.TestReport, cls: str, name: str) -> None:
        if report.when != "call" and report.passed:
            return
        self.counts[cls][{"passed": PASSED, "skipped": LISTED}.get(report.outcome, OTHER)] += 1
        if cls == STOCK and report.passed and name not in self.broken:
            self.stock.append(name)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write what stock Llama passes; fail where parts that the list refuses all pass."""
        stale = {entry.test for entry in self.in_parts - self.failing}
        if stale and not session.testsfailed and not hasattr(session.config, "workerinput"):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            self.note = f"refused.py lists tests whose parts all pass: {', '.join(sorted(stale))}"
        if self.record and self.stock and not hasattr(session.config, "workerinput"):
            Path(self.record).write_text(json.dumps(sorted(self.stock), indent=1))
            session.exitstatus = pytest.ExitCode.OK  # what stock Llama fails here is required of nobody

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.note:
            terminalreporter.write_line(self.note)
        for cls, counts in sorted(self.counts.items()):
            skipped = "skipped" if cls == STOCK else LISTED
            told = f"{counts[PASSED]} passed, {counts[LISTED]} {skipped}, {counts[OTHER]} failed"
            terminalreporter.write_line(f"{cls}: {told}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", help="write the tests that stock Llama passes to this file")
    parser.addoption("--against", help="take the tests that this file names")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Checks(config.getoption("record"), config.getoption("against")))
