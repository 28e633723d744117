"""Names, numbers and citations in a text, as far as they can be checked without a model."""

from __future__ import annotations

import re
from collections.abc import Sequence

_WORD = re.compile(r"[^\W\d_][^\W_]*(?:['\u2019-][^\W_]+)*")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_CITATION = re.compile(r"\[(\d{1,3})\]")
_COMMON = frozenset(
    """
    a about after all also an and any are as at be because but by can could did do does each
    find for from give has have he her his how i if in is it its just may me might more most my
    name no not of on or our please question quick said say she should show so some state tell
    that the their them then there they this to under up us was we were what when where which
    who whom whose why will with would yes you your
    """.split()  # noqa: SIM905
)
"""Words that are no names, however they are written."""


def words_in(text: str) -> set[str]:
    """The words of a text, without regard to case."""
    return {word.casefold() for word in _WORD.findall(text)}


def names_in(text: str) -> list[str]:
    """Words of a text that look like proper names: capital first, and no common word.

    The first word of a sentence counts only where a name follows it, because any word is written
    so there.
    """
    found: list[str] = []
    matches = list(_WORD.finditer(text))
    for number, match in enumerate(matches):
        word, before = match[0], text[matches[number - 1].end() if number else 0 : match.start()]
        if not word[0].isupper() or word.casefold() in _COMMON:
            continue
        if number == 0 or _ends_sentence(before):
            following = matches[number + 1] if number + 1 < len(matches) else None
            gap = "" if following is None else text[match.end() : following.start()]
            if following is None or gap != " " or not following[0][0].isupper():
                continue
        found.append(word)
    return found


def _ends_sentence(gap: str) -> bool:
    """Whether a sentence begins after what stands between two words."""
    said = gap.rstrip()
    return "\n" in gap[len(said) :] or (said != gap and said.endswith((".", "!", "?", ":")))


def numbers_in(text: str) -> list[str]:
    """The numbers of a text, without separators of thousands and trailing zeros."""
    return [_plain(match) for match in _NUMBER.findall(text)]


def _plain(number: str) -> str:
    number = re.sub(r",(?=\d{3}(?:\D|$))", "", number)
    whole, dot, part = number.replace(",", ".").partition(".")
    part = part.rstrip("0") if dot else ""
    return (whole.lstrip("0") or "0") + (f".{part}" if part else "")


def ungrounded(text: str, sources: Sequence[str]) -> str | None:
    """What of a text stands in no source; `None`: its numbers and names all do.

    Capitalised words count as names wherever they stand, because an answer may be a name alone.
    """
    text = _CITATION.sub("", text)
    joined = "\n".join(sources)
    known_words, known_numbers = words_in(joined), set(numbers_in(joined))
    for number in numbers_in(text):
        if number not in known_numbers:
            return f"the number {number} stands in no source"
    for word in _WORD.findall(text):
        named = word[0].isupper() and word.casefold() not in _COMMON
        if named and word.casefold() not in known_words:
            return f"{word!r} stands in no source"
    return None


def wrong_citations(text: str, num_sources: int) -> str | None:
    """What is wrong with the citations `[1]` of a text; `None`: nothing.

    Args:
        text: An answer.
        num_sources: How many sources there are to cite.
    """
    cited = [int(number) for number in _CITATION.findall(text)]
    if not cited:
        return "it cites no source"
    wrong = [number for number in cited if not 1 <= number <= num_sources]
    return f"there is no source [{wrong[0]}]" if wrong else None
