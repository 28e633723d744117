"""Examples in a question, and a program that tries an answer's code on them."""

from __future__ import annotations

import ast
import re
import secrets
from dataclasses import dataclass

_BLOCK = re.compile(r"```(?:python|py)?\s*\n(.*?)```", re.DOTALL)
_RETURNS = re.compile(
    r"^\s*[-*]?\s*`?(?P<call>[A-Za-z_]\w*\(.*\))\s*"
    r"(?:==|=>|->|returns|should return|must return|gives)\s*(?P<value>.+?)`?[.,;]?\s*$"
)
_EXPECTED = re.compile(
    r"(?P<call>[A-Za-z_]\w*\(.*?\)) (?:returned|returns|raised|raises|gave|gives) .*, "
    r"expected (?P<value>.+?)[.;]?\s*$"
)
_ASSERT = re.compile(r"^\s*assert\s+(?P<test>.+?)\s*$")
_PROMPT = re.compile(r"^\s*>>>\s*(?P<call>.+?)\s*$")
_MAX_EXAMPLES = 16
_MAX_FAULTS = 4
_MARK = "atlas-examples"

_HARNESS = """
import json as _json, sys as _sys
_said, _code, _examples, _space = [], {code!r}, {examples!r}, {{"__name__": "answer"}}
try:
    exec(compile(_code, "<answer>", "exec"), _space)
except BaseException as _error:
    _said.append("the code fails: " + type(_error).__name__ + ": " + str(_error)[:200])
else:
    for _call, _value in _examples:
        try:
            if _value is None:
                if not eval(_call, _space):
                    _said.append(_call + " does not hold")
                continue
            _got, _want = eval(_call, _space), eval(_value, _space)
            _near = isinstance(_got, float) and isinstance(_want, (int, float))
            if not (abs(_got - _want) <= 1e-6 * max(1.0, abs(_want)) if _near else _got == _want):
                _said.append(_call + " returned " + repr(_got)[:200] + ", expected " + _value)
        except BaseException as _error:
            _want = "" if _value is None else ", expected " + _value
            _kind = type(_error).__name__
            _said.append(_call + " raised " + _kind + ": " + str(_error)[:200] + _want)
_sys.stdout.write("\\n{mark} " + _json.dumps(_said[:{most}]) + "\\n")
"""


@dataclass(frozen=True)
class Example:
    """One thing that code has to do."""

    call: str
    """A Python expression."""
    value: str | None
    """A Python expression of what it must equal; `None`: it must be true."""


def examples_in(question: str) -> list[Example]:
    """The examples of a question.

    They are `assert` lines, doctests, `f(3) == 7`, `f(3) returns 7` and
    `f(3) returned 5, expected 7`.

    Lines that are no Python are left out.
    """
    found: list[Example] = []
    lines = question.splitlines()
    for number, line in enumerate(lines):
        if match := _ASSERT.match(line):
            found.append(Example(match["test"], None))
        elif match := _PROMPT.match(line):
            value = lines[number + 1].strip() if number + 1 < len(lines) else ""
            if value and not value.startswith(">>>"):
                found.append(Example(match["call"], value))
        elif match := _EXPECTED.search(line) or _RETURNS.match(line):
            found.append(Example(match["call"], match["value"]))
    return [example for example in found if _is_python(example)][:_MAX_EXAMPLES]


def _is_python(example: Example) -> bool:
    try:
        for text in (example.call, example.value):
            if text is not None:
                ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def code_of(text: str) -> str:
    """The code of an answer: its last block, or all of it."""
    blocks = _BLOCK.findall(text)
    return blocks[-1] if blocks else text


@dataclass(frozen=True)
class Trial:
    """A program that tries code on examples, and how its verdict is told."""

    program: str
    mark: str

    def failures(self, said: str) -> str | None:
        """What is wrong, by what the program said; `None`: nothing.

        Args:
            said: Its output, or why it ended without one.
        """
        for line in reversed(said.splitlines()):
            if line.startswith(self.mark):
                faults = ast.literal_eval(line.removeprefix(self.mark).strip())
                return "; ".join(faults) or None
        return said.strip()[:500] or "the code ended without a result"


def trial_of(answer: str, question: str) -> Trial | None:
    """The program that tries an answer's code; `None`: the question has no example."""
    examples = examples_in(question)
    if not examples:
        return None
    mark = f"{_MARK}-{secrets.token_hex(8)}"
    tried = [(example.call, example.value) for example in examples]
    program = _HARNESS.format(code=code_of(answer), examples=tried, mark=mark, most=_MAX_FAULTS)
    return Trial(program, mark)
