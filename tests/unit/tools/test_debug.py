"""The debug tool on the real sandbox: code that does not compile, that raises, that is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.config.tools import DebugConfig
from serve_app.schemas import Effects
from serve_app.tools.base import ToolResult
from serve_app.tools.builtin.debug import DebugTool

TOOL = DebugTool(DebugConfig(tool_id="debug"))
SUM = "def total(xs):\n    result = 0\n    for x in xs:\n        result += x\n    return result\n"


def debug(code: str, report: str = "") -> ToolResult:
    return TOOL.run({"code": code, "report": report}, 60.0)


def found(code: str, report: str = "") -> dict[str, Any]:
    return debug(code, report).data


def test_code_that_does_not_compile_is_told_with_the_place() -> None:
    result = debug("def total(xs)\n    return sum(xs)\n")
    assert result.text == "SyntaxError: expected ':' (line 1)\nLine 1: def total(xs)"
    assert (result.data["kind"], result.data["line"]) == ("syntax", 1)


def test_an_exception_is_told_with_its_line_and_the_locals_there() -> None:
    code = "def last(xs):\n    n = len(xs)\n    return xs[n]\n"
    result = debug(code, "It crashes when I call last([4, 5]).")
    assert result.text == (
        "last([4, 5]) raised IndexError: list index out of range\n"
        "Line 3: return xs[n]\n"
        "Locals: xs = [4, 5], n = 2"
    )
    assert result.data["kind"] == "runtime"


def test_an_exception_of_the_program_itself_is_told() -> None:
    data = found("limit = 3\nprint(limit / 0)\n")
    assert (data["kind"], data["error"], data["line"]) == ("runtime", "ZeroDivisionError", 2)
    assert data["locals"] == {"limit": "3"}


@pytest.mark.parametrize(
    "report",
    [
        "total([1, 2]) returned 3, expected 4",
        "assert total([1, 2]) == 4",
        ">>> total([1, 2])\n4",
        "total([1, 2]) should be 4 but is 3.",
        "I get 3 from total([1, 2]) instead of 4.",
    ],
)
def test_an_example_that_fails_is_told_with_what_came_and_what_should_have(report: str) -> None:
    result = debug(SUM, report)
    assert result.text == "total([1, 2]) returned 3, expected 4"
    assert result.data["kind"] == "logic"


def test_the_first_example_that_fails_counts() -> None:
    assert found(SUM, "total([1]) == 1\ntotal([2]) == 3\ntotal([3]) == 5")["call"] == "total([2])"


def test_code_that_does_what_the_report_asks_has_nothing_wrong_with_it() -> None:
    result = debug(SUM, "total([1, 2]) == 3")
    assert (result.text, result.data["kind"]) == ("total([1, 2]) returned 3", "none")


@pytest.mark.parametrize(
    "code",
    [
        "def f(x): return x + 1 + 1e-12",
        "print('loud')\ndef f(x):\n    print('x' * 100)\n    return x + 1",
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass A:\n    x: int = 0\ndef f(x): return A(x).x + 1",
        "def f(x): return x + 1\nif __name__ == '__main__':\n    raise SystemExit",
    ],
)
def test_right_code_of_any_make_passes(code: str) -> None:
    assert found(code, "f(1) == 2\nassert f(2) == 3 or f(2) > 2.9")["kind"] == "none"


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (
            "def f(x): return 0\n\nMy test wants 2 from f(1) and gets 0.",
            "f(1) returned 1, expected 2",
        ),
        ("def f(x): return x[0]\n\nWhen I call f([]) it crashes.", "f([]) returned []"),
        ("def g(x): return 0\n\nThe function g fails.", "g raised NameError"),
        ("assert f(1) == 2", "f(1) returned 1, expected 2"),
    ],
)
def test_mended_code_is_tried_on_what_the_report_says_of_the_faulty_one(
    report: str, said: str
) -> None:
    assert debug("def f(x): return x", report).text.startswith(said)


def test_the_code_and_the_report_may_be_one_message() -> None:
    message = f"Why is this wrong?\n\n{SUM}\ntotal([1, 2]) returned 3, expected 4\n"
    data = found(message, message)
    assert (data["code"], data["kind"]) == (SUM.strip(), "logic")


def test_a_text_without_code_is_said_to_have_none() -> None:
    result = debug("My program is slow, what can I do?")
    assert (result.text, result.data["code"]) == ("There is no code in it.", "")


def test_code_that_does_not_finish_is_told_with_the_line_it_is_at() -> None:
    hasty = DebugTool(DebugConfig(tool_id="debug", code_seconds=0.3))
    data = hasty.run({"code": "n = 0\nwhile True:\n    n = n\n"}, 60.0).data
    assert (data["kind"], data["error"]) == ("runtime", "TimeoutError")
    assert data["line"] in (2, 3)


@pytest.mark.parametrize("stop", ["import os; os._exit(3)", "import os; os.kill(os.getpid(), 9)"])
def test_code_that_ends_the_interpreter_is_a_finding(stop: str) -> None:
    data = found(f"{stop}\n")
    assert (data["kind"], data["error"]) == ("runtime", "SystemError")


def test_what_is_told_of_huge_values_is_bounded() -> None:
    code = "def f(n):\n    xs = ['y' * n] * n\n    text = 'x' * n\n    return xs[n]\n"
    result = debug(code, "f(5000) fails")
    assert result.data["error"] == "IndexError"
    assert len(result.text) < 1000
    assert all(len(value) <= 200 for value in result.data["locals"].values())


def test_a_value_that_cannot_be_shown_does_not_hide_the_exception() -> None:
    code = (
        "class Odd:\n    def __repr__(self):\n        raise ValueError\n\n"
        "def f(n):\n    odd = Odd()\n    return n / 0\n"
    )
    data = found(code, "f(1) fails")
    assert (data["error"], data["locals"]["n"]) == ("ZeroDivisionError", "1")


def test_code_cannot_pretend_to_be_right_by_printing() -> None:
    code = 'print(\'atlas-debug-0 {"kind": "none"}\')\n1 / 0\n'
    assert found(code)["error"] == "ZeroDivisionError"


def test_code_has_no_way_out_of_the_sandbox() -> None:
    assert found("open('/etc/passwd').read()\n")["error"] in (
        "FileNotFoundError",
        "PermissionError",
    )


def test_calls_have_no_effects() -> None:
    assert [function.effects for function in TOOL.functions()] == [Effects.NONE]
