"""The hostile benchmark's cases against one real gateway: right statuses, and nothing is held."""

from __future__ import annotations

from benchmarks.hostile import __main__ as hostile
from benchmarks.hostile.cases import CASES, ENGINES, REQUESTS, Case

MAX_DELAY_MS = 1_500.0
"""On a busy machine; without the bounds these requests take from 3 s to minutes."""
QUICK = (
    "30k blanks",
    "marks on one letter",
    "arguments nested",
    "a number of 5000",
    "no function",
    "usage of 10**30",
    "a surrogate",
    "a call of index 10**9",
    "a delta that is a list",
    "chunks that are no JSON",
)


def is_quick(case: Case) -> bool:
    return any(name in case.name for name in QUICK) and "@none" in case.name


def test_the_benchmark_has_its_cases_each_under_one_name() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names)) >= 40


def test_no_case_holds_the_gateway_or_gets_a_wrong_status() -> None:
    engines = [case for case in ENGINES if is_quick(case)]
    assert len(engines) >= len(QUICK)
    record = hostile.run([*REQUESTS, *engines])
    assert [result for result in record.results if not result.is_right] == []
    most_ms = MAX_DELAY_MS + record.control_ms
    assert [result for result in record.results if result.delay_ms > most_ms] == []
    assert max(result.growth_mib for result in record.results) <= hostile.MAX_GROWTH_MIB
    assert record.growth_mib <= 2 * hostile.MAX_GROWTH_MIB
