"""Examples in a question, and the program that tries an answer's code on them."""

from __future__ import annotations

import time

import pytest

from serve_app.config.tools import PythonConfig
from serve_app.errors import ToolRetry
from serve_app.orchestrator.patterns.examples import trial_of
from serve_app.tools.builtin.python import PythonTool
from serve_app.tools.reports import Example, code_of, examples_in


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


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("x = 1", "x = 1"),
        ("So:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```\nx = 1\n```\n```py\nx = 2\n```", "x = 2\n"),
        ("```text\nno\n```\nthen\n```python\nx = 1\n```\n```text\n2\n```", "x = 1\n"),
        ("```python\nx = 1\ny =", "x = 1\ny =\n"),
    ],
)
def test_the_last_block_of_python_is_the_code(answer: str, code: str) -> None:
    assert code_of(answer) == code


def faults(code: str, question: str) -> str | None:
    """What is wrong with code, by the program in the sandbox."""
    trial = trial_of(code, question)
    assert trial is not None
    tool = PythonTool(PythonConfig(tool_id="python"))
    try:
        said = tool.run({"code": trial.program}, 60).text
    except ToolRetry as failure:
        said = failure.message
    return trial.failures(said)


@pytest.mark.parametrize(
    "code",
    [
        "def f(x): return x + 1",
        "def f(x): return x + 1 + 1e-12",
        "print('loud')\ndef f(x):\n    print('x' * 100)\n    return x + 1",
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass A:\n    x: int = 0\ndef f(x): return A(x).x + 1",
    ],
)
def test_code_that_does_what_the_examples_say_passes(code: str) -> None:
    assert faults(code, "f(1) == 2\nassert f(2) == 3 or f(2) > 2.9") is None


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def f(x): return x", "f(1) returned 1, expected 2"),
        ("def f(x): return 1 / 0", "f(1) raised ZeroDivisionError: division by zero"),
        ("def f(x):", "the code fails: IndentationError"),
        ("raise SystemExit", "the code fails: SystemExit"),
        ("import os; os._exit(0)", "the code ended without a result"),
        ("def f(x): return 'ü😀'", "f(1) returned 'ü😀', expected 2"),
    ],
)
def test_what_the_code_does_instead_is_told(code: str, said: str) -> None:
    assert said in (faults(code, "f(1) == 2") or "")


def test_a_test_that_does_not_hold_is_told() -> None:
    assert faults("def f(x): return x", "assert f(1) == 2") == "f(1) returned 1, expected 2"


@pytest.mark.parametrize(
    ("question", "said"),
    [
        (
            "def f(x): return 0\n\nMy test wants 2 from f(1) and gets 0.",
            "f(1) returned 1, expected 2",
        ),
        ("def f(x): return x[0]\n\nWhen I call f([]) it crashes.", None),
        ("def g(x): return 0\n\nThe function g fails.", "g raised NameError"),
    ],
)
def test_what_a_user_says_of_faulty_code_is_an_example(question: str, said: str | None) -> None:
    found = faults("def f(x): return x", question)
    assert found is None if said is None else said in (found or "")


def test_no_more_than_four_faults_are_told() -> None:
    told = faults("def f(x): return x", "\n".join(f"f({n}) == -1" for n in range(9)))
    assert (told or "").count("expected") == 4


def test_a_verdict_that_was_cut_short_is_a_fault() -> None:
    trial = trial_of("x", "f(1) == 2")
    assert trial is not None
    assert trial.failures(f'{trial.mark} ["f(1) retu') == (
        "it fails more examples than there is room for"
    )


def test_code_cannot_tell_the_verdict_beforehand() -> None:
    assert faults("print('atlas-examples-0 []')\ndef f(x): return x", "f(1) == 2") is not None


def test_a_question_without_examples_has_no_program() -> None:
    assert trial_of("x = 1", "Write f.") is None
