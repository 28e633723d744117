"""Examples in a question, and a program that tries an answer's code on them."""

from __future__ import annotations

import ast
import json
import re
import secrets
from dataclasses import dataclass

_FENCE = "```"
_MAX_LINE_CHARS = 500
_RETURNS = re.compile(
    r"^(?:[-*]\s*)?`?(?P<call>[A-Za-z_]\w*\(.*\))`?\s*"
    r"(?:==|=>|->|returns|should return|must return|gives)\s*`?(?P<value>.+?)`?[.,;]?\s*$"
)
_EXPECTED = re.compile(
    r"(?P<call>[A-Za-z_]\w*\(.*?\)) (?:returned|returns|raised|raises|gave|gives) .*, "
    r"expected (?P<value>.+?)[.;]?\s*$"
)
_ASSERT = re.compile(r"^assert\s+(?P<test>.+)$")
_PROMPT = re.compile(r"^>>>\s*(?P<call>.+)$")
_MAX_EXAMPLES = 16
_MAX_FAULTS = 4
_MARK = "atlas-examples"

_HARNESS = """
import io as _io, json as _json, sys as _sys, types as _types
_said, _code, _examples, _out = [], {code!r}, {examples!r}, _sys.stdout
_module = _sys.modules["answer"] = _types.ModuleType("answer")
_space = vars(_module)
class _Unheard(_io.TextIOBase):
    def write(self, text):
        return len(text)
_sys.stdout = _Unheard()
try:
    exec(compile(_code, "<answer>", "exec"), _space)
except BaseException as _error:
    _said.append("the code fails: " + type(_error).__name__ + ": " + str(_error)[:200])
else:
    for _call, _value in _examples:
        try:
            if _value is None:
                if not eval(_call, _space):
                    _said.append(_call[:200] + " does not hold")
                continue
            _got, _want = eval(_call, _space), eval(_value, _space)
            _near = isinstance(_got, float) and isinstance(_want, (int, float))
            if not (abs(_got - _want) <= 1e-6 * max(1.0, abs(_want)) if _near else _got == _want):
                _wrong = " returned " + repr(_got)[:200] + ", expected " + _value[:200]
                _said.append(_call[:200] + _wrong)
        except BaseException as _error:
            _want = "" if _value is None else ", expected " + _value[:200]
            _wrong = " raised " + type(_error).__name__ + ": " + str(_error)[:200] + _want
            _said.append(_call[:200] + _wrong)
_out.write("\\n{mark} " + _json.dumps(_said[:{most}]) + "\\n")
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

    Lines that are no Python, or very long, are left out.
    """
    found: list[Example] = []
    lines = [line.strip() for line in question.splitlines()]
    lines = [line if len(line) <= _MAX_LINE_CHARS else "" for line in lines]
    for number, line in enumerate(lines):
        if match := _ASSERT.match(line):
            found.append(Example(match["test"], None))
        elif match := _PROMPT.match(line):
            value = lines[number + 1] if number + 1 < len(lines) else ""
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
    """The code of an answer: its last block of Python, or all of it."""
    found: list[str] | None = None
    block: list[str] = []
    inside: str | None = None
    for line in text.splitlines():
        said = line.strip()
        if not said.startswith(_FENCE):
            if inside is not None:
                block.append(line)
        elif inside is None:
            inside, block = said.removeprefix(_FENCE).strip().casefold(), []
        else:
            found = block if inside in ("", "py", "python", "python3") else found
            inside = None
    if found is None and inside is not None:
        found = block  # the answer was cut short within it
    return text if found is None else "\n".join(found) + "\n"


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
                try:
                    faults = json.loads(line.removeprefix(self.mark))
                except ValueError:
                    return "it fails more examples than there is room for"
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
