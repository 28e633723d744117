"""Repair questions of nano-code: a function with one fault and an example that fails, to be mended.

A fault is made by changing the right program in one place; the example is found by running it. The
wordings have held-out members; the pattern's prompt is a trained one.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import FrameType
from typing import Any, Literal

from benchmarks.nano.code_composed import draw_composition, draw_items
from benchmarks.nano.code_functions import FUNCTION_TASKS
from benchmarks.nano.code_questions import code_answer, composition_tests, function_tests
from benchmarks.nano.prompts import prompt
from benchmarks.nano.task import Split

Fault = Literal["off_by_one", "operator", "comparison", "return", "variable", "call", "syntax"]
FAULTS: tuple[Fault, ...] = (
    "off_by_one",
    "operator",
    "comparison",
    "return",
    "variable",
    "call",
    "syntax",
)
PROMPT_NAME = "nano-repair"

WORDINGS: dict[Split, tuple[str, ...]] = {
    "seen": (
        "Fix this code:\n\n{code}\n\n{failure}",
        "Fix this code.\n\n{code}\n\nIt fails: {failure}",
        "{code}\n\n{failure}. Please fix it.",
        "This function does not work: {failure}.\n\n{code}",
        "Repair this function.\n{code}\nFailing example: {failure}",
        "My function fails: {failure}. Mend the code.\n\n{code}",
        "Find the bug and fix it.\n\n{code}\n\nIt fails: {failure}",
        "The test fails: {failure}\n\n{code}\n\nCorrect the code.",
        "What is wrong here? {failure}\n\n{code}",
        "Debug this:\n{code}\n{failure}",
        "Correct this Python function.\n\n{code}\n\nProblem: {failure}",
        "Here is my code:\n\n{code}\n\n{failure}. What is the right code?",
        "I get a wrong result with this code: {failure}\n\n{code}",
        "Can you repair this?\n\n{code}\n\n{failure}",
    ),
    "held_out": (
        "There is a mistake in this code.\n\n{code}\n\nFor example, {failure}.",
        "Why does this fail? {failure}\n\n{code}",
        "Please patch the function below so that it passes. {failure}\n\n{code}",
    ),
}

_MAX_STEPS = 20_000
"""Lines that a faulty function may run."""
_MAX_SIZE = 10_000
"""Characters, items or bits of a value that it may make: some faults double a value per line."""
_SWAPS: dict[Fault, tuple[tuple[str, str], ...]] = {
    "operator": (
        (r" \+ ", " - "),
        (r" - ", " + "),
        (r" \* ", " + "),
        (r" // ", " % "),
        (r" % ", " // "),
        (r" / ", " // "),
        (r" \*\* ", " * "),
        (r" \+= ", " -= "),
        (r" \*= ", " += "),
        (r" and ", " or "),
        (r" or ", " and "),
    ),
    "comparison": (
        (r" == ", " != "),
        (r" != ", " == "),
        (r" < ", " <= "),
        (r" < ", " > "),
        (r" > ", " >= "),
        (r" > ", " < "),
        (r" <= ", " < "),
        (r" >= ", " > "),
        (r" not in ", " in "),
        (r" if (\w) in ", r" if \1 not in "),
    ),
    "call": (
        (r"\bmax\(", "min("),
        (r"\bmin\(", "max("),
        (r"\bsum\(", "len("),
        (r"\blen\(", "sum("),
        (r", reverse=True\)", ")"),
        (r"\bsorted\((\w+)\)", r"sorted(\1, reverse=True)"),
        (r"\[::-1\]", ""),
        (r"\.upper\(\)", ".lower()"),
        (r"\bset\((\w+)\)", r"list(\1)"),
        (r"\babs\((\w+)\)", r"\1"),
    ),
}


@dataclass(frozen=True)
class Repair:
    """A faulty function and what it takes to mend it."""

    draft: str
    """The faulty code in a fence, as a model would have answered."""
    failure: str
    """The failing example, for example `solution(3) returned 5, expected 7`."""
    answer: str
    """The right code in a fence."""
    tests: tuple[str, ...]
    fault: Fault

    def worded(self, rng: random.Random, split: Split) -> str:
        """The request in a wording of the split."""
        text = rng.choice(WORDINGS[split]).replace("{failure}", self.failure)
        code = self.draft
        if rng.random() < 0.2:
            code = code.removeprefix("```python\n").removesuffix("\n```")
        return text.replace("{code}", code)

    def prompted(self) -> str:
        """The request as patterns word it."""
        return prompt(PROMPT_NAME, draft=self.draft, objections=self.failure)


def draw_repair(rng: random.Random, split: Split) -> Repair:
    """A random repair; `held_out` takes functions composed as none in training."""
    while True:
        source = _fixed(rng) if rng.random() < 0.55 else _composed(rng, split)
        drawn = _faulty(rng, source.answer)
        if drawn is None:
            continue
        fault, draft = drawn
        failure = _failure(draft, source.answer, source.arguments)
        if failure is not None:
            return Repair(draft, failure, source.answer, source.tests(), fault)


@dataclass(frozen=True)
class _Source:
    """A right function, and how to call and test it."""

    answer: str
    arguments: Callable[[], tuple[Any, ...]]
    tests: Callable[[], tuple[str, ...]]


def _fixed(rng: random.Random) -> _Source:
    task = rng.choice(FUNCTION_TASKS)
    return _Source(
        code_answer(task.parameters, task.body),
        lambda: task.draw(rng),
        lambda: function_tests(rng, task),
    )


def _composed(rng: random.Random, split: Split) -> _Source:
    composition = draw_composition(rng, split)
    variable = "xs" if composition.subject == "numbers" else "words"
    return _Source(
        code_answer(variable, composition.body(variable)),
        lambda: (draw_items(rng, composition),),
        lambda: composition_tests(rng, composition),
    )


def _faulty(rng: random.Random, answer: str) -> tuple[Fault, str] | None:
    """A kind of fault and the code with it; `None` where the kind drawn does not apply."""
    fault = rng.choice(FAULTS)
    choices = faulty_variants(answer, fault)
    return (fault, rng.choice(choices)) if choices else None


@cache
def _identifiers(answer: str) -> tuple[str, ...]:
    parameters = re.search(r"def solution\(([^)]*)\)", answer)
    names = set(parameters[1].split(", ")) if parameters else set()
    names |= set(re.findall(r"\bfor (\w+) in", answer))
    names |= set(re.findall(r"^ +(\w+) = ", answer, re.MULTILINE))
    return tuple(sorted(names))


def faulty_variants(answer: str, fault: Fault) -> list[str]:
    """Every way to put one fault of a kind into fenced code."""
    if fault == "syntax":
        return _without_marks(answer)
    start = answer.index("\n", answer.index("def solution")) + 1
    opening, body = answer[:start], answer[start:]
    if fault == "return":
        changes = [(m.start(), m.end(), "") for m in re.finditer(r"return (?=.*\n```$)", body)]
    elif fault == "off_by_one":
        changes = _shifted_numbers(body)
    elif fault == "variable":
        changes = _other_names(body, _identifiers(answer))
    else:
        changes = [
            (match.start(), match.end(), match.expand(replacement))
            for pattern, replacement in _SWAPS[fault]
            for match in re.finditer(pattern, body)
        ]
    return [opening + body[:first] + text + body[end:] for first, end, text in changes]


Change = tuple[int, int, str]
"""Where a change starts and ends, and the new text."""


def _shifted_numbers(body: str) -> list[Change]:
    changes = []
    for match in re.finditer(r"(?<![\w.'])\d+(?![\w.'])", body):
        value = int(match[0])
        for other in sorted({value + 1, max(0, value - 1)} - {value}):
            changes.append((match.start(), match.end(), str(other)))
    return changes + [(m.start(), m.end(), "") for m in re.finditer(r" [+-] 1\b", body)]


def _other_names(body: str, names: tuple[str, ...]) -> list[Change]:
    return [
        (match.start(), match.end(), other)
        for match in re.finditer(r"(?<![\w'.])[a-z]\w*(?![\w'(=])", body)
        if match[0] in names and not body[: match.start()].endswith("for ")
        for other in names
        if other != match[0]
    ]


def _without_marks(answer: str) -> list[str]:
    lines = answer.split("\n")
    return [
        "\n".join([*lines[:index], broken, *lines[index + 1 :]])
        for index, line in enumerate(lines)
        for broken in _broken_lines(line)
    ]


def _broken_lines(line: str) -> list[str]:
    """A line of code with a colon or a bracket missing."""
    if line.startswith("```"):
        return []
    broken = [line[:-1]] if line.endswith(":") else []
    for bracket in ")]":
        if bracket in line:
            index = line.rfind(bracket)
            broken.append(line[:index] + line[index + 1 :])
    return broken


def _failure(draft: str, answer: str, draw: Callable[[], tuple[Any, ...]]) -> str | None:
    """An example that tells the draft from the right code; `None` where none was found."""
    namespace: dict[str, Any] = {}
    try:
        exec(_plain(draft), namespace)
    except SyntaxError as error:
        return f"SyntaxError: {error.msg} (line {error.lineno})"
    except Exception:
        return None
    right: dict[str, Any] = {}
    exec(_plain(answer), right)
    for _ in range(8):
        arguments = draw()
        call = f"solution({', '.join(map(repr, arguments))})"
        expected = right["solution"](*_copied(arguments))
        outcome = _outcome(namespace["solution"], _copied(arguments), expected)
        if outcome is not None and len(call) + len(outcome) < 220:
            return f"{call} {outcome}, expected {expected!r}"
    return None


def _plain(code: str) -> str:
    return code.removeprefix("```python\n").removesuffix("\n```")


def _copied(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(list(a) if isinstance(a, list) else a for a in arguments)


class _TooLong(Exception):
    pass


def _is_large(value: object) -> bool:
    if isinstance(value, int):
        return value.bit_length() > _MAX_SIZE
    return isinstance(value, str | list) and len(value) > _MAX_SIZE


def _outcome(function: Callable[..., Any], arguments: tuple[Any, ...], expected: Any) -> str | None:
    """What went wrong; `None` where the value is right."""
    steps = 0

    def count(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal steps
        steps += 1
        if steps > _MAX_STEPS or any(map(_is_large, frame.f_locals.values())):
            raise _TooLong
        return count

    earlier = sys.gettrace()
    sys.settrace(count)
    try:
        value = function(*arguments)
    except _TooLong:
        return "did not finish"
    except Exception as error:
        return f"raised {type(error).__name__}: {error}"
    finally:
        sys.settrace(earlier)
    if type(value) is type(expected) and value == expected:
        return None
    if isinstance(value, bool) == isinstance(expected, bool) and value == expected:
        return None
    return f"returned {value!r}"
