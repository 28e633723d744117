"""The debugging benchmark's own parts: what single hops tell, and how targets are judged."""

from __future__ import annotations

import pytest

from benchmarks.debugging import Asked, judge, told_by_hops
from serve_app.tools.reports import ErrorType

CODE = "```python\ndef solution(n):\n    return n {operator}\n```\n\n"


def asked(error: ErrorType, plain: float, mended: float, together: ErrorType) -> Asked:
    return Asked(error, {"words": "logic", "together": together}, plain, mended, 1)


@pytest.mark.parametrize(
    ("operator", "report", "told"),
    [
        ("+", "It does not compile.", ("syntax", "syntax", "runtime")),
        ("+ m", "solution(1) raised NameError", ("runtime", "logic", "runtime")),
        ("+ 2", "solution(1) should be 2", ("logic", "logic", "logic")),
    ],
)
def test_single_hops_tell_what_they_can(
    operator: str, report: str, told: tuple[ErrorType, ErrorType, ErrorType]
) -> None:
    found = told_by_hops(CODE.replace("{operator}", operator) + report)
    assert (found["words"], found["compile"], found["run"]) == told


def test_the_targets_are_triage_repair_and_what_the_pattern_adds() -> None:
    requests = [asked("syntax", 0.0, 1.0, "syntax")] * 9 + [asked("logic", 1.0, 0.0, "syntax")]
    values = {target.name: round(target.value, 3) for target in judge(requests)}
    assert values.pop("lower end of what it adds to nano-code@none") < 0.8
    assert list(values.values()) == [0.9, 0.8, 0.9]
