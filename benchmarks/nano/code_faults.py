"""Faults put into right code: one change each, by the error that it is meant to cause.

Whether it does cause that error is found by running the code (`code_repair`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Literal

from serve_app.tools.reports import ErrorType

ERROR_TYPES: tuple[ErrorType, ...] = ("syntax", "runtime", "logic")

Fault = Literal[
    "mark", "bracket", "quote", "keyword", "sign", "indentation",
    "name", "attribute", "index", "type", "lost_line",
    "off_by_one", "operator", "comparison", "return", "variable", "call",
]  # fmt: skip
FAULTS: Mapping[ErrorType, tuple[Fault, ...]] = {
    "syntax": ("mark", "bracket", "quote", "keyword", "sign", "indentation"),
    "runtime": ("name", "attribute", "index", "type", "lost_line"),
    "logic": ("off_by_one", "operator", "comparison", "return", "variable", "call"),
}

Swap = tuple[str, str]
"""An expression, and what takes the place of a match of it."""
_SWAPS: dict[Fault, tuple[Swap, ...]] = {
    "keyword": (
        (r"\breturn\b", "retrun"),
        (r"\breturn\b", "retun"),
        (r"\bdef\b", "df"),
        (r"\bdef\b", "function"),
        (r"\bfor\b", "fro"),
        (r"\bfor\b", "foreach"),
        (r"\bin\b", "of"),
        (r"\bif\b", "fi"),
        (r"\belse\b", "esle"),
        (r"\bwhile\b", "whlie"),
        (r"\bnot in\b", "not"),
    ),
    "sign": (
        (r" == ", " = "),
        (r" != ", " =! "),
        (r" <= ", " =< "),
        (r" >= ", " => "),
        (r" and ", " && "),
        (r" or ", " || "),
        (r" not ", " ! "),
        (r" \+= 1\b", "++"),
        (r"(?m)$(?<=\w)(?<!```)(?<!python)", ";;"),
    ),
    "attribute": (
        (r"\.append\(", ".add("),
        (r"\.append\(", ".push("),
        (r"\.split\(", ".splits("),
        (r"\.join\(", ".joins("),
        (r"\.lower\(", ".lowercase("),
        (r"\.upper\(", ".uppercase("),
        (r"\.get\(", ".gets("),
        (r"\.items\(\)", ".item()"),
        (r"\.(count|index|replace|capitalize|isdigit|isupper|extend)\(", r".\1s("),
        (r"len\((\w+)\)", r"\1.length"),
        (r"len\((\w+)\)", r"\1.size()"),
    ),
    "index": (
        (r"\[(\w)\]", r"[\1 + 1]"),
        (r"\[-1\]", "[-100]"),
        (r"\[0\]", "[100]"),
        (r"\[(\w) \+ 1\]", r"[\1 + 2]"),
        (r"range\(len\((\w+)\)\)", r"range(len(\1) + 1)"),
        (r"range\(len\((\w+)\) - 1\)", r"range(len(\1))"),
    ),
    "type": (
        (r"\bstr\((\w+)\)", r"\1"),
        (r"\bint\((\w+)\)", r"\1"),
        (r"\blen\((\w+)\)", r"\1"),
        (r"= 0$", "= None"),
        (r"= 0$", "= ''"),
        (r"= 1$", "= None"),
        (r"= \[\]$", "= None"),
        (r"= \[\]$", "= {}"),
        (r"= \{\}$", "= []"),
        (r"= ''$", "= 0"),
        (r"\bsum\((\w+)\)", r"sum(str(\1))"),
        (r"\b(\w+)\[", r"\1("),
    ),
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
_FUNCTIONS = r"len|sum|max|min|sorted|range|str|int|abs|set|list|any|all|zip|enumerate|reversed"

Change = tuple[int, int, str]
"""Where a change starts and ends, and the new text."""


def faulty_variants(code: str, fault: Fault) -> list[str]:
    """Every way to put one fault of a kind into code.

    Args:
        code: Definition of one function, without a fence.
        fault: Which kind.
    """
    if fault in FAULTS["syntax"]:
        if fault in _SWAPS:
            return _changed(code, _swapped(code, _SWAPS[fault]))
        return _with_broken_line(code, fault)
    start = code.index("\n", code.index("def ")) + 1
    body = code[start:]
    if fault == "return":
        changes = [(m.start(), m.end(), "") for m in re.finditer(r"return (?=.*\Z)", body)]
    elif fault == "off_by_one":
        changes = _shifted_numbers(body)
    elif fault == "variable":
        changes = _other_names(body, _identifiers(code))
    elif fault == "name":
        changes = _misspelt(body, _identifiers(code))
    elif fault == "lost_line":
        changes = [
            (m.start(), m.end(), "") for m in re.finditer(r"(?m)^ +\w+ = .*\n", body)
        ]  # fmt: skip
    else:
        changes = _swapped(body, _SWAPS[fault])
    return [code[:start] + variant for variant in _changed(body, changes)]


def _changed(text: str, changes: Iterable[Change]) -> list[str]:
    return [text[:first] + new + text[end:] for first, end, new in changes]


def _swapped(text: str, swaps: Iterable[Swap]) -> list[Change]:
    return [
        (match.start(), match.end(), match.expand(replacement))
        for pattern, replacement in swaps
        for match in re.finditer(f"(?m){pattern}" if "$" in pattern else pattern, text)
    ]


@cache
def _identifiers(code: str) -> tuple[str, ...]:
    parameters = re.search(r"def solution\(([^)]*)\)", code)
    names = set(parameters[1].split(", ")) if parameters else set()
    names |= set(re.findall(r"\bfor (\w+) in", code))
    names |= set(re.findall(r"^ +(\w+) = ", code, re.MULTILINE))
    return tuple(sorted(names))


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


def _misspelt(body: str, names: tuple[str, ...]) -> list[Change]:
    """Uses of names and of built-in functions with one letter wrong."""
    changes = []
    for match in re.finditer(rf"(?<![\w'.])(?:{_FUNCTIONS})(?=\()|(?<![\w'.])[a-z]\w*\b", body):
        word = match[0]
        if word not in names and not re.fullmatch(_FUNCTIONS, word):
            continue
        wrong = {f"{word}s", f"{word}{word[-1]}", word.capitalize()}
        if len(word) > 2:
            wrong |= {word[:-1], word[0] + word[2] + word[1] + word[3:]}
        changes += [(match.start(), match.end(), text) for text in sorted(wrong - {word})]
    return changes


def _with_broken_line(code: str, fault: Fault) -> list[str]:
    lines = code.split("\n")
    return [
        "\n".join([*lines[:index], broken, *lines[index + 1 :]])
        for index, line in enumerate(lines)
        for broken in _broken(line, fault)
    ]


def _broken(line: str, fault: Fault) -> list[str]:
    """A line of code with a mark too few or too many."""
    if fault == "mark":
        return [line[:-1]] if line.endswith(":") else []
    if fault == "indentation":
        spaces = len(line) - len(line.lstrip())
        if not spaces:
            return []
        wrong = {spaces - 4, spaces - 1, spaces + 1, spaces + 4}
        return [" " * count + line.lstrip() for count in sorted(wrong) if count >= 0]
    signs = "'\"" if fault == "quote" else "()[]{}"
    broken = []
    for sign in signs:
        for index in [i for i, of in enumerate(line) if of == sign]:
            broken.append(line[:index] + line[index + 1 :])
    if fault == "bracket" and line.endswith((")", "]")):
        broken.append(line + line[-1])
    return broken
