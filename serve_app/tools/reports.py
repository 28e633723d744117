"""What people write of faulty code, read: the code, examples, and calls that failed.

Text comes in, of a user or a model. Nothing is run: what is found is checked to be Python and no
more.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

ErrorType = Literal["syntax", "runtime", "logic"]

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
_MAX_CALLS = 64
"""Calls of a report that are looked at."""

_DEFINED = re.compile(
    r"\bdef\s+([A-Za-z_]\w*)\s*\(|^(?!assert\b)\w+\s+([A-Za-z_]\w*)\(", re.MULTILINE
)
_TOP_LEVEL = re.compile(r"^(?:async )?def\s+([A-Za-z_]\w*)\s*\(", re.MULTILINE)
_WANTED = re.compile(
    r"\b(?:expect(?:ed|s|ing)?|want(?:ed)?|should (?:be|give|return|have been|say|print)"
    r"|must (?:be|give|return)|ought to (?:be|give|return)|instead of|rather than|right answer is"
    r"|correct (?:answer|value|result) is|supposed to (?:be|give|return))\b[:,]?\s*(?:a |the )?`?"
)
_WANTED_FROM = re.compile(
    r"\b(?:expect(?:s|ed)?|wants?|wanted|needs?|needed) (?P<value>\S.*) (?:from|for|of) `?$"
)
_STARTS_CODE = re.compile(
    r"(?:def|class|import|@)\b.|from [\w.]+ import|[A-Za-z_][\w.\[\]]* [-+*/%]?= ?\S"
    r"|(?!assert\b)\w+ [A-Za-z_]\w*\([^.]*\):?$"
)
_IS_CODE = re.compile(
    r"(?:for [\w, ()]+ in |(?:while|if|elif|except|with|class)\b.*:$|(?:else|try|finally):?$"
    r"|return\b|raise\b|pass$|break$|continue$|#|[\w.]+\(.*\)$|[)\]}]+$)"
)
_WORDS: tuple[tuple[ErrorType, re.Pattern[str]], ...] = (
    (
        "syntax",
        re.compile(
            r"\b(?:Syntax|Indentation|Tab)Error\b"
            r"|\b(?:does not|doesn't|won't|cannot|can't) (?:compile|parse)\b"
            r"|\bpars(?:er|ing|e)\b|\binvalid syntax\b|\bunexpected (?:indent|EOF)|\bnever closed\b"
            r"|\bunmatched '|\bexpected '.'|\bunterminated\b|\bexpected an indented block\b",
        ),
    ),
    (
        "runtime",
        re.compile(
            r"\b[A-Z]\w*(?:Error|Exception|Interrupt|Iteration)\b|\bTraceback\b"
            r"|\b(?:raise[sd]?|throws?|threw|crash(?:es|ed|ing)?|exceptions?|dies|died)\b"
            r"|\b(?:never|does not|doesn't|did not) (?:end|finish|stop|return)\b|\bendless\b"
            r"|\bis not (?:defined|callable|iterable|subscriptable)\b|\bout of range\b",
        ),
    ),
    (
        "logic",
        re.compile(
            r"(?i)\bexpect(?:ed|s)?\b|\bshould\b|\binstead of\b|\brather than\b|^\s*>>>|\bassert\b"
            r"|\bwrong (?:result|answer|output|value)\b|\bincorrect\b|\bI want\b|\bwants?\b",
            re.MULTILINE,
        ),
    ),
)
"""Words that tell of an error, the surest first."""
_IN_TRACEBACK = re.compile(r'\s+File "')


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
    return [example for example in found if _are_python(example.call, example.value)][
        :_MAX_EXAMPLES
    ]


def _are_python(*texts: str | None) -> bool:
    try:
        for text in texts:
            if text is not None:
                ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _blocks(text: str) -> list[str]:
    """Blocks of Python; one that is cut short counts where there is no other."""
    found: list[str] = []
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
            if inside in ("", "py", "python", "python3"):
                found.append("\n".join(block) + "\n")
            inside = None
    if not found and inside is not None:
        found.append("\n".join(block) + "\n")
    return found


def code_in(text: str) -> str:
    """The code in a message.

    Returns:
        Its last block of Python with a definition, else its last block, else its longest run of
        code lines; all of the text where that is Python, and nothing where there is no code.
    """
    code = _marked_code(text)
    if code:
        return code
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    return text


def _marked_code(text: str) -> str:
    """Code that differs from what is around it: blocks, and runs of lines."""
    blocks = _blocks(text)
    if blocks:
        return next((of for of in reversed(blocks) if _DEFINED.search(of)), blocks[-1])
    runs: list[list[str]] = []
    is_open = False
    for line in text.splitlines():
        starts = _STARTS_CODE.match(line) is not None
        is_more = not line.strip() or line[0] in " \t" or _IS_CODE.match(line) is not None
        if is_open and (starts or is_more) and not _IN_TRACEBACK.match(line):
            runs[-1].append(line)
        else:
            is_open = starts
            if starts:
                runs.append([line])
    return max(("\n".join(run).strip("\n") + "\n" for run in runs), key=len, default="")


def error_said(report: str) -> ErrorType | None:
    """What kind of error the words of a report tell of; `None`: they do not say."""
    said = report.replace(_marked_code(report).strip("\n") or "\0", "")
    return next((error for error, words in _WORDS if words.search(said)), None)


def trials_in(report: str, code: str) -> list[tuple[str, str | None]]:
    """What to try on code, by what a report says of calls of its functions.

    Args:
        report: What somebody wrote; the code may be part of it, or an earlier state of the code.
        code: The code that is tried.

    Returns:
        Calls, each with what it must equal, or `None` where the report does not say: then it must
        only run. At most 16, those with a value first. Where there is none, the functions of the
        report's own code, which must be there.
    """
    reported = _marked_code(report)
    said = report
    for known in (code, reported):
        said = said.replace(known.strip("\n"), "") if known.strip() else said
    found: dict[str, str | None] = {}
    for example in examples_in(said):
        call, value = _compared(example)
        found[call] = value
    names = {name for pair in _DEFINED.findall(f"{code}\n{reported}") for name in pair if name}
    for before, call, after in _calls_of(names, said):
        if found.get(call) is None:
            found[call] = _wanted_in(after) or _wanted_from(before)
    if not found:
        found = dict.fromkeys(_TOP_LEVEL.findall(reported))
    return sorted(found.items(), key=lambda trial: trial[1] is None)[:_MAX_EXAMPLES]


def _compared(example: Example) -> tuple[str, str]:
    """An example's call and value; of an assertion `f(3) == 7` its two sides."""
    if example.value is not None:
        return example.call, example.value
    test = ast.parse(example.call, mode="eval").body
    if isinstance(test, ast.Compare) and [type(of) for of in test.ops] == [ast.Eq]:
        return ast.unparse(test.left), ast.unparse(test.comparators[0])
    return f"bool({example.call})", "True"


def _calls_of(names: set[str], text: str) -> Iterator[tuple[str, str, str]]:
    """Calls of functions, each with its line before it and what is said up to the next one."""
    pattern = "|".join(map(re.escape, sorted(names)))
    starts = (
        [m.start() for m in re.finditer(rf"\b(?:{pattern})\(", text)][:_MAX_CALLS] if names else []
    )
    for number, start in enumerate(starts):
        if text[:start].rsplit(None, 1)[-1:] == ["def"]:
            continue
        until = starts[number + 1] if number + 1 < len(starts) else len(text)
        call = _call_at(text[start : start + _MAX_LINE_CHARS])
        if call is not None:
            before = text[max(0, start - _MAX_LINE_CHARS) : start].rpartition("\n")[2]
            yield before, call, text[start + len(call) : until]


def _call_at(text: str) -> str | None:
    """The call with plain data that a text begins with."""
    for end, sign in enumerate(text, start=1):
        if sign == ")" and _are_python(text[:end]):
            call = ast.parse(text[:end], mode="eval").body
            is_plain = isinstance(call, ast.Call) and all(
                _is_literal(of) for of in (*call.args, *(named.value for named in call.keywords))
            )
            return text[:end] if is_plain else None
    return None


def _is_literal(value: ast.expr | str) -> bool:
    try:
        ast.literal_eval(value)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return False
    return True


def _wanted_in(text: str) -> str | None:
    """The value that is asked for in what is said after a call."""
    for match in _WANTED.finditer(text[:_MAX_LINE_CHARS]):
        value = _value_at(text[match.end() :].split("\n", 1)[0])
        if value is not None:
            return value
    return None


def _wanted_from(text: str) -> str | None:
    """The value that is asked for in what is said before a call: "my test wants 7 from"."""
    match = _WANTED_FROM.search(text)
    return match["value"].strip("`") if match and _is_literal(match["value"].strip("`")) else None


def _value_at(text: str) -> str | None:
    """The longest literal that a text begins with."""
    ends = [len(text), *(m.start() for m in re.finditer(r"[\s,.;`)?!]", text))]
    for end in sorted(set(ends), reverse=True)[:64]:
        value = text[:end].strip().rstrip("`.,;?!")
        if _is_literal(value):
            return value
    return None
