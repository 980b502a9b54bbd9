"""Every case has a test or a reason."""

from __future__ import annotations

from types import SimpleNamespace

from tests.faults.cases import CASES, ELSEWHERE, NOT_APPLICABLE
from tests.faults.summary import all_tests, cases_of, report_line

AREAS = {
    "CK": 40, "CF": 24, "TK": 7, "RC": 17, "DA": 14, "TR": 22,
    "SV": 14, "HB": 20, "KN": 20, "CL": 16, "EV": 11,
}  # fmt: skip


def test_no_case_was_dropped():
    assert list(CASES) == [f"{area}{i:02}" for area, count in AREAS.items() for i in range(1, count + 1)]


def test_every_case_has_a_test_or_a_reason():
    named = {case for _, name in all_tests() for case in cases_of(name)}
    assert sorted(CASES.keys() - named - ELSEWHERE.keys() - NOT_APPLICABLE.keys()) == []
    assert sorted(named & NOT_APPLICABLE.keys()) == []
    assert (ELSEWHERE.keys() | NOT_APPLICABLE.keys()) <= CASES.keys()


def test_tests_elsewhere_exist():
    known = {f"{path}::{name}" for path, name in all_tests()}
    assert sorted(set(ELSEWHERE.values()) - known) == []


def test_reasons_are_sentences():
    assert [case for case, reason in NOT_APPLICABLE.items() if len(reason.split()) < 5] == []


def test_ids_are_read_from_names():
    assert cases_of("test_ck33_ck34_harmless_leftovers") == {"CK33", "CK34"}
    assert cases_of("test_cf05") == {"CF05"}
    assert cases_of("test_ck99_none") == set()
    assert cases_of("test_stack01_is_no_case") == set()


def test_line_at_the_end():
    def report(name, duration=1.0):
        return SimpleNamespace(nodeid=f"tests/x.py::{name}", duration=duration)

    outcomes = {
        "passed": [report("test_ck01_a[b]"), report("test_ck01_ck02_a"), report("test_other")],
        "failed": [report("test_ck02_b")],
        "skipped": [report("test_ck19_c"), report("test_ck01_d")],
    }
    line = report_line(outcomes)
    assert line == "1 of 205 fault cases passed; 1 failed: CK02; 1 skipped: CK19 (5 s)"
    assert report_line({"passed": [report("test_other")]}) is None
