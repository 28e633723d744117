"""The hostile benchmark has its cases."""

from __future__ import annotations

from benchmarks.hostile.cases import CASES


def test_the_benchmark_has_its_cases_each_under_one_name() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names)) >= 40
