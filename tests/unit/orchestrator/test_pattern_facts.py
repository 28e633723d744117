"""Names, numbers and citations that are checked without a model."""

from __future__ import annotations

import time

import pytest

from serve_app.orchestrator.patterns.facts import (
    names_in,
    numbers_in,
    ungrounded,
    words_in,
    wrong_citations,
)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Where does Ada Lovelace live?", ["Ada", "Lovelace"]),
        ("Ada Lovelace lives there.", ["Ada", "Lovelace"]),
        ("Sum these. Then tell me. Paris is nice.", []),
        ("Is it\nParis", []),
        ("the capital of Côte-d'Or", ["Côte-d'Or"]),
        ("He said: What Who Where", []),
        ("", []),
    ],
)
def test_proper_names_are_told_from_first_words(text: str, names: list[str]) -> None:
    assert names_in(text) == names


def test_names_of_a_long_text_are_found_at_once() -> None:
    began_s = time.process_time()
    assert names_in("a\n\n " * 20_000 + "to Rome") == ["Rome"]
    assert time.process_time() - began_s < 2


def test_words_are_compared_without_case() -> None:
    assert words_in("The CAT, the cat's 9 lives") == {"the", "cat", "cat's", "lives"}


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("1,234,567 and 2.50", ["1234567", "2.5"]),
        ("0012", ["12"]),
        ("3,5", ["3.5"]),
        ("0", ["0"]),
        ("none", []),
    ],
)
def test_numbers_are_read_in_one_form(text: str, numbers: list[str]) -> None:
    assert numbers_in(text) == numbers


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("Ada has 1,000 cats [1].", None),
        ("ada has 1000.0 cats", None),
        ("Ada has 1001 cats", "the number 1001 stands in no source"),
        ("Bob", "'Bob' stands in no source"),
        ("The cats", None),
    ],
)
def test_what_stands_in_no_source_is_told(text: str, fault: str | None) -> None:
    assert ungrounded(text, ["It is said that", "Ada has 1000 cats."]) == fault


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("So [1], and so [2].", None),
        ("So.", "it cites no source"),
        ("So [3].", "there is no source [3]"),
        ("So [0].", "there is no source [0]"),
    ],
)
def test_citations_of_what_is_not_there_are_told(text: str, fault: str | None) -> None:
    assert wrong_citations(text, 2) == fault
