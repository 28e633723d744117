"""Reports of faulty code: the code in a message, and the calls that it tells of."""

from __future__ import annotations

import time

import pytest

from serve_app.tools.reports import Example, code_in, examples_in, trials_in

CODE = "def f(n):\n    return n + 1\n"


@pytest.mark.parametrize(
    "message",
    [
        f"Fix it:\n```python\n{CODE}```\nf(1) returned 2, expected 3",
        f"Fix it:\n\n{CODE}\nf(1) returned 2, expected 3",
        f"{CODE}f(1) gives 2, but should give 3.",
        f'{CODE}\n  File "main.py", line 1\n    def f(n)\nSyntaxError: no',
        f"```python\n{CODE}```\nThis test fails:\n```python\nassert f(1) == 3\n```",
        f"```\n{CODE}```\n```text\nTraceback\n```",
        CODE,
    ],
)
def test_the_code_of_a_message_is_found_in_a_fence_or_without_one(message: str) -> None:
    assert code_in(message) == CODE


def test_code_that_does_not_parse_is_found_all_the_same() -> None:
    broken = "df f(n):\nfor i in range(n)\n    total =+ i\n  return total\n"
    assert code_in(f"Please mend this.\n\n{broken}\nI do not know why.") == broken


@pytest.mark.parametrize("text", ["Why is my program slow?", "", "for example this, if you like"])
def test_prose_has_no_code(text: str) -> None:
    assert code_in(text) == ""


@pytest.mark.parametrize(
    ("report", "trials"),
    [
        ("f(1) returned 2, expected 3", [("f(1)", "3")]),
        ("f(1) should be 3 but is 2.", [("f(1)", "3")]),
        ("f([1, 2], k='a)') must return {'a': [1]}.", [("f([1, 2], k='a)')", "{'a': [1]}")]),
        ("My test wants [3] from f([1]) and gets 2.", [("f([1])", "[3]")]),
        ("We expected `'a from b'` from `f(1)`.", [("f(1)", "'a from b'")]),
        ("I want an answer from f(1)", [("f(1)", None)]),
        ("assert f(1) == 3", [("f(1)", "3")]),
        ("assert f(1)", [("bool(f(1))", "True"), ("f(1)", None)]),
        ("f(1) fails, and f(2) should be 3", [("f(2)", "3"), ("f(1)", None)]),
        ('  File "m.py", line 4, in <module>\n    print(f(1))\nKeyError: 1', [("f(1)", None)]),
        ("f(n) fails", []),
        ("g(1) fails", []),
        ("f(1", []),
        ("", []),
    ],
)
def test_calls_are_read_with_what_they_should_give(
    report: str, trials: list[tuple[str, str | None]]
) -> None:
    assert trials_in(report, CODE) == trials


def test_calls_inside_the_code_are_no_reports() -> None:
    code = "def f(n):\n    return 1 if n == 0 else f(0)\n"
    assert trials_in(f"```python\n{code}```\nf(2) returned 1, expected 2", code) == [("f(2)", "2")]


def test_a_mended_code_is_tried_on_the_calls_of_the_report() -> None:
    assert trials_in(f"{CODE}\nf(1) returned 2, expected 3", "1 + 1\n") == [("f(1)", "3")]


def test_without_a_call_the_functions_of_the_report_have_to_be_there() -> None:
    report = "```python\ndef f(n)\n    def inner(m):\n        return m\n```\nIt does not compile."
    assert trials_in(report, "1 + 1\n") == [("f", None)]


def test_a_long_report_is_read_in_bounded_time() -> None:
    assert len(trials_in("f(" * 20_000 + "f(1) " * 2_000, CODE)) <= 16


@pytest.mark.parametrize(
    ("line", "example"),
    [
        ("assert f(1) == 2", Example("f(1) == 2", None)),
        ("f(1) == 2", Example("f(1)", "2")),
        ("- `f(1)` returns `2`.", Example("f(1)", "2")),
        ("- f('a b') returns [1, 2].", Example("f('a b')", "[1, 2]")),
        ("`f(1) -> None`", Example("f(1)", "None")),
        ("f(g(2), 3) should return 4  # why", Example("f(g(2), 3)", "4  # why")),
        ("f(1) == the answer", None),
        ("Write f(x) so that it holds.", None),
        ("assert", None),
    ],
)
def test_examples_are_read_from_lines(line: str, example: Example | None) -> None:
    assert examples_in(f"Write f.\n  {line}\n") == ([] if example is None else [example])


def test_doctests_are_examples() -> None:
    found = examples_in("Write f.\n>>> f(1)\n2\n>>> f(2)\n>>> f(3)\n4")
    assert found == [Example("f(1)", "2"), Example("f(3)", "4")]


def test_no_more_than_sixteen_examples_count() -> None:
    assert len(examples_in("f(1) == 2\n" * 50)) == 16


@pytest.mark.parametrize("line", [" " * 200_000, "f(" + ")" * 50_000, "assert " + "a " * 50_000])
def test_an_odd_line_is_read_at_once(line: str) -> None:
    began_s = time.process_time()
    assert examples_in(line) == []
    assert time.process_time() - began_s < 2
