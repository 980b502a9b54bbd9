"""The counting of benchmarks/union.py on lists whose unions are known."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.union import Shape, count, independent, summary, table_rows, union_means


def drifting(length: int, size: int, step: int) -> torch.Tensor:
    """Lists of ``size`` neighbouring blocks that move on by one every ``step`` queries."""
    return (torch.arange(length)[:, None] // step + torch.arange(size))[None]


def test_unions_of_drifting_lists() -> None:
    means = union_means(drifting(256, 8, 16))
    assert [means[w] for w in (1, 4, 8, 16)] == [8, 8, 8, 8]
    assert means[32] == 9
    assert means[64] == 11


@pytest.mark.parametrize(("group", "width"), [(3, 42), (4, 32), (8, 16), (16, 8)])
def test_bytes_and_rows(group: int, width: int) -> None:
    counts = count(drifting(64 * 42, 8, 64), group, shape=Shape(rows=128))
    assert (counts.rows, counts.width) == (128, width)
    # Lists change every 64 queries: inside 40 of the 64 tiles of 42 queries, between all others.
    union = 8 if group > 3 else 8 + 40 / 64
    assert counts.union == pytest.approx(union, abs=0.01)
    assert counts.bytes_ratio == pytest.approx(union / (8 * width), rel=0.01)
    assert counts.matrix_ratio == pytest.approx(128 * union / (16 * 8 * width), rel=0.01)
    assert counts.rows_per_useful == pytest.approx(counts.matrix_ratio * 16 / group)


def test_halves_skip_what_the_other_lists() -> None:
    """Lists change every 16 queries by one block of eight: between the halves of 32 queries, G = 4."""
    lists = drifting(64 * 32, 8, 16)
    whole, halves = (count(lists, 4, shape=Shape(rows=128, halves=n)) for n in (1, 2))
    assert (whole.union, halves.union) == (9, 9)
    assert halves.bytes_ratio == whole.bytes_ratio == 9 / (8 * 32)
    assert whole.matrix_ratio == 128 * 9 / (16 * 8 * 32)
    assert halves.matrix_ratio == (128 * 7 + 64 * 2) / (16 * 8 * 32)
    assert count(lists, 4).halves == 2  # they cost less
    assert count(drifting(64 * 32, 8, 64), 4).halves == 1  # nothing to skip


def test_small_blocks_are_counted_in_whole_steps() -> None:
    lists = drifting(64 * 32, 8, 16)
    halves = count(lists, 4, 16, Shape(rows=128, halves=2))
    assert halves.matrix_ratio == (128 * 8 + 64 * 8) / (16 * 8 * 32)  # four blocks of 16 in a step
    assert count(lists, 4, 16, Shape(rows=128)).matrix_ratio == 128 * 12 / (16 * 8 * 32)


def test_unused_entries_are_not_counted() -> None:
    lists = drifting(64, 8, 64)
    padded = torch.cat([lists, torch.full_like(lists, -1)], -1)
    assert count(padded, 4, shape=Shape(rows=64)) == count(lists, 4, shape=Shape(rows=64))


def test_independent_lists_are_allowed_and_without_locality() -> None:
    lists = independent(torch.zeros(1, 512, 4), 16)
    own = torch.arange(512, 1024)[:, None] // 16
    assert (lists[0] <= own).all()
    assert (lists[0].sort(-1).values.diff(dim=-1) > 0).all()
    assert count(lists, 16).width == 1


def test_the_table_has_the_means() -> None:
    rows = [
        row
        for layer in (1, 2)
        for row in table_rows({"layer": layer, "scores": "nsa", "block": 64}, drifting(128, 8, 8 * layer))
    ]
    lines = summary(rows).splitlines()
    assert len(lines) == 2 + 5
    assert lines[3].startswith("| nsa | 4 | 8.5 | 10.0 | 128 | 2.0 | 32 ")  # 9 and 8, 11 and 9 blocks
