"""The best of several sampled answers: most of them agree on it, or a verifier rates it highest."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import islice
from typing import Any

from serve_app.config.tools import BestOfConfig
from serve_app.errors import ToolFailed
from serve_app.tools.base import Tool, ToolResult

MAX_READ_CHARS = 64 << 10
"""Of an answer, from its end: no more is looked at."""
MAX_COMPARED_CHARS = 4 << 10
"""The same, with long blanks shortened."""
MAX_FINAL_CHARS = 2_048
"""Of what follows a marker, or of a text without one, from its end."""

# Every pattern here is linear in the text: no two neighbouring repeats take the same characters.
_LONG_BLANK = re.compile(r"[^\S\n]{17,}")
_BOXED = re.compile(r"\\boxed\s*\{([^{}]*)\}")
_MARKER = re.compile(r"(?:####|answer\s*(?:is|:|=))\s*(?:[:=]\s*)?", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\n|(?<=\w)\.\s")
_CODE = re.compile(r"```[\w+-]*\n(.*?)```", re.DOTALL)
_CODE_START = re.compile(r"^(?:def|class|import|from|async def|@)\b", re.MULTILINE)
_NUMBER = re.compile(
    r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d{1,3})?(?:\s*/\s*\d+)?|[-+]?\.\d+"
)
_COMMENT = re.compile(r"(?:^|\s)#")
_BLANKS = "".join(filter(str.isspace, map(chr, range(0x3001))))


def final_answer(answer: str) -> str:
    """The part of an answer that is compared: after a marker, or the whole of it.

    Args:
        answer: A model's text.

    Returns:
        What follows `####` or `answer is`, or stands in a LaTeX box; the last one counts.
    """
    answer = _readable(answer)
    boxed = _BOXED.findall(answer)
    return str(boxed[-1]).strip() if boxed else (_after_marker(answer) or answer)


def _readable(answer: str) -> str:
    """The end of an answer that is looked at, its long blanks shortened."""
    end = answer[-MAX_READ_CHARS:].strip()
    return _LONG_BLANK.sub(" " * 16, end)[-MAX_COMPARED_CHARS:]


def _compatible(text: str) -> str:
    """The text in Unicode's form NFKC, without marks beyond the 8th on one letter.

    To put n marks into order takes n^2 steps.
    """
    if text.isascii():
        return text
    kept, marks = [], 0
    for letter in text:
        marks = marks + 1 if unicodedata.combining(letter) else 0
        if marks <= 8:
            kept.append(letter)
    return unicodedata.normalize("NFKC", "".join(kept))[-MAX_COMPARED_CHARS:]


def _after_marker(answer: str) -> str | None:
    """What the last marker says, to the end of its sentence; `None` where there is none."""
    found, begin = None, 0
    while marker := _MARKER.search(answer, begin):
        if marker.end() == len(answer):
            break
        end = _SENTENCE_END.search(answer, marker.end() + 1)
        begin = end.start() if end else len(answer)
        found = answer[marker.end() : begin].strip()
    return found


def normalise(answer: str) -> str:
    """Bring an answer into a form in which equal answers are equal strings.

    Args:
        answer: A model's text.

    Returns:
        `number:` and its value, `code:` and its text without comments and blank lines, or `text:`
        and its words; empty for an answer with nothing in it.
    """
    answer = _readable(answer)
    blocks = _CODE.findall(answer)
    if blocks or _CODE_START.search(answer):
        return _normalise_code(blocks[-1] if blocks else answer)
    final = final_answer(_compatible(answer))[-MAX_FINAL_CHARS:].strip()
    number = _as_number(final)
    if number is not None:
        return f"number:{number}"
    words = re.findall(r"\w+", final.casefold())
    return f"text:{' '.join(words)}" if words else (f"text:{final}" if final else "")


def answer_key(answer: str | None) -> str | None:
    """What answers are compared by, here and across the steps of a request.

    Args:
        answer: A model's text; `None` where there is none.

    Returns:
        `normalise` of it; `None` for an answer with nothing in it.
    """
    return normalise(answer or "") or None


def _normalise_code(code: str) -> str:
    lines = [
        _COMMENT.split(line, maxsplit=1)[0].rstrip() for line in code.expandtabs(4).splitlines()
    ]
    kept = [re.sub(r"(?<=\S)[ ]+", " ", line) for line in lines if line.strip()]
    return "code:" + "\n".join(kept).replace("'", '"')


def _as_number(text: str) -> Fraction | None:
    """The value of a text that is one number, whatever sign, unit or separator stands around it."""
    bare = text.replace("\N{MINUS SIGN}", "-").replace("\N{FRACTION SLASH}", "/")
    bare = bare.lstrip(_BLANKS + "$€£≈=").rstrip(_BLANKS + "%°.!")
    matches = list(islice(_NUMBER.finditer(bare), 2))
    if len(matches) != 1:
        return None
    match = matches[0]
    if match.start() != 0 or re.search(r"\d", bare[match.end() :]):
        return None
    if len(bare[match.end() :].split()) > 3 or len(match[0]) > 200:
        return None
    number = match[0].replace(",", "").replace(" ", "")
    try:
        numerator, _, denominator = number.partition("/")
        value = Fraction(numerator) / (Fraction(denominator) if denominator else 1)
    except (ValueError, ZeroDivisionError):
        return None
    unit = bare[match.end() :].strip()
    # 5 apples and 5 pears are the same number; 5 and 5k are not.
    return value if not unit or not match[0][-1:].isalnum() or bare[match.end()].isspace() else None


def vote(answers: Sequence[str]) -> int:
    """Choose among sampled answers by majority (self-consistency, arXiv 2203.11171).

    Args:
        answers: At least one text; empty ones never win over others.

    Returns:
        The index of the first answer of the largest group of equal ones; of groups of the same
        size, the one that appeared first.

    Raises:
        ValueError: If there are no answers.
    """
    if not answers:
        raise ValueError("vote needs at least one answer")
    keys = [normalise(answer) for answer in answers]
    counts = Counter(key for key in keys if key)
    if not counts:
        return 0
    # `most_common` keeps the order of first appearance among equals.
    return keys.index(counts.most_common(1)[0][0])


def best_rated(scores: Sequence[float]) -> int:
    """Choose among sampled answers by a verifier's scores (best of n).

    Args:
        scores: At least one, finite.

    Returns:
        The index of the highest; of equal ones, the first.
    """
    return max(range(len(scores)), key=lambda number: scores[number])


def agreement(answers: Sequence[str]) -> float:
    """Share of the answers that agree with the chosen one.

    Args:
        answers: At least one text.

    Returns:
        A number in (0, 1].
    """
    keys = [normalise(answer) for answer in answers]
    return keys.count(keys[vote(answers)]) / len(keys)


class BestOf(Tool):
    """Sampling and voting; the orchestrator draws the samples, so there is nothing to dispatch."""

    config: BestOfConfig

    def run(self, arguments: dict[str, Any], deadline_s: float) -> ToolResult:
        """Not callable.

        Args:
            arguments: Ignored.
            deadline_s: Ignored.

        Raises:
            ToolFailed: Always.
        """
        raise ToolFailed(f"tool {self.tool_id!r} samples answers; it cannot be called")
