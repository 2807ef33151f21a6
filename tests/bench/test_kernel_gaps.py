"""Gaps between kernels, of hand-made timelines."""

from __future__ import annotations

import pytest

from tandem.bench.kernel_gaps import by_name, by_neighbours, idle_share


def test_only_gaps_without_any_kernel_count_and_only_long_ones() -> None:
    kernels = [
        (60_000, 100_000),
        (0, 50_000),  # 10 µs before the next: not over it
        (20_000, 30_000),  # within another
        (70_000, 130_000),  # overlaps
        (150_000, 160_000),  # 20 µs after
        (200_000, 1_000_000),  # 40 µs after
    ]
    found = idle_share(kernels)
    assert found["kernels"] == 6
    assert found["gaps"] == 2
    assert found["longest_gap_us"] == 40
    assert found["seconds"] == pytest.approx(1e-3)
    assert found["idle_share"] == pytest.approx(0.06)


def test_nothing_and_a_single_kernel_are_no_idle_time() -> None:
    assert idle_share([])["idle_share"] == 0
    assert idle_share([(5, 9)])["idle_share"] == 0


def test_kernels_of_one_name_are_one_line_and_the_longest_in_all_comes_first() -> None:
    kernels = [("norm", 0, 3_000), ("product", 3_000, 9_000), ("norm", 10_000, 15_000), ("copy", 0, 1_000)]
    found = by_name(kernels)
    assert [line["name"] for line in found] == ["norm", "product", "copy"]
    assert found[0] == {"name": "norm", "count": 2, "total_ms": 0.008, "mean_us": 4.0, "longest_us": 5.0}


def test_gaps_are_told_by_what_stands_around_them() -> None:
    kernels = [
        ("long", 0, 100_000),
        ("short", 10_000, 20_000),  # within it
        ("norm", 120_000, 130_000),
        ("long", 150_000, 160_000),
        ("norm", 190_000, 200_000),
        ("short", 205_000, 210_000),  # no gap to speak of
    ]
    assert by_neighbours(kernels) == [
        {"after": "long", "before": "norm", "count": 2, "total_us": 50.0, "longest_us": 30.0},
        {"after": "norm", "before": "long", "count": 1, "total_us": 20.0, "longest_us": 20.0},
    ]
    assert by_neighbours([]) == []
