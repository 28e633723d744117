"""Keyword rules: what they find, where they look, and that no expression takes long."""

from __future__ import annotations

import time
from typing import Any

import pytest
from pydantic import ValidationError

from serve_app.config.rules import KeywordRuleConfig
from serve_app.router.rules.keyword import MAX_CHARS, KeywordRule, Texts, code_blocks


def matches(said: str | list[dict[str, Any]], system: str = "", **fields: Any) -> bool:
    config = KeywordRuleConfig.model_validate(
        {"type": "keyword", "name": "rule", "use": "route", **fields}
    )
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": system},
        {"role": "user", "content": said},
    ]
    return KeywordRule(config).matches(Texts(messages))


def test_a_keyword_is_found_as_a_whole_word_in_any_case() -> None:
    assert matches("I want a REFUND.", any=["refund"])
    assert not matches("refunding is not it", any=["refund"])
    assert not matches("I want a REFUND.", any=["refund"], case_sensitive=True)


@pytest.mark.parametrize(
    ("keyword", "text"),
    [("straße", "Die STRASSE, die Straße!"), ("#!/bin/sh", "x#!/bin/sh -e"), ("c++", "Use C++!")],
)
def test_words_of_any_language_and_signs_are_found(keyword: str, text: str) -> None:
    assert matches(text, any=[keyword])


def test_blanks_between_the_words_of_a_phrase_do_not_matter() -> None:
    assert matches("where is\n my   order", any=["my order"])


def test_an_expression_may_match_anywhere() -> None:
    assert matches("see order #4711!", any=[{"re": r"order #\d+"}])


def test_any_all_and_none_have_to_hold_together() -> None:
    rule: dict[str, Any] = {"any": ["bug", "error"], "all": ["app"], "none": ["invoice"]}

    assert matches("an error in the app", **rule)
    assert not matches("an error", **rule)
    assert not matches("an error in the app, and on the invoice", **rule)


def test_each_scope_is_looked_at_alone() -> None:
    said = "Why?\n```python\nimport os\n```"

    assert matches(said, any=["import"], scope=["code"])
    assert not matches(said, any=["why"], scope=["code"])
    assert matches("hello", system="You are a lawyer", any=["lawyer"], scope=["system"])
    assert not matches("hello", system="You are a lawyer", any=["lawyer"])
    assert matches("hello", system="You are a lawyer", any=["lawyer"], scope=["last", "system"])


def test_a_block_of_code_that_is_not_closed_goes_to_the_end() -> None:
    assert code_blocks("a\n```\nb\n```\nc\n~~~~\nd\n~~~\ne") == ["b\n", "d\n~~~\ne"]


def test_of_a_long_text_the_beginning_and_the_end_are_looked_at() -> None:
    filler = "x " * 500_000

    assert matches(f"refund {filler}", any=["refund"])
    assert matches(f"{filler} refund", any=["refund"])
    assert not matches(f"{filler} refund {filler}", any=["refund"])


@pytest.mark.parametrize("text", ["", "\0", "\ud800", "a" * MAX_CHARS, "\u017f" * 5])
def test_any_text_can_be_looked_at(text: str) -> None:
    assert not matches(text, any=["refund"])


def test_an_expression_that_explodes_elsewhere_takes_linear_time() -> None:
    started_s = time.monotonic()

    assert not matches("a" * 1_000_000 + "!", any=[{"re": "(a+)+$"}])

    assert time.monotonic() - started_s < 10


def test_ten_thousand_keywords_are_one_expression() -> None:
    words = [f"keyword{number}" for number in range(10_000)]

    assert matches("about keyword9999", any=words)
    assert not matches("about keyword10000", any=words)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"any": ["x"] * 10_001}, "at most 10000 keywords"),
        ({"any": ["x" * 200] * 1_001}, "at most 200000 characters"),
        ({}, "name keywords"),
        ({"any": [" "]}, "more than blanks"),
        ({"any": [{"re": "(a"}]}, "no RE2 expression"),
        ({"any": [{"re": "(?:a{1000}){1000}"}]}, "invalid repetition"),
        ({"any": ["x"], "use": None}, "either 'use' or 'among'"),
        ({"any": ["x"], "among": {}}, "either 'use' or 'among'|name candidates"),
        ({"any": ["x"], "scope": ["user"]}, "scope"),
        ({"any": ["x"], "use": ["route", "m@none"]}, "stand alone"),
    ],
)
def test_what_cannot_work_is_refused_with_its_reason(fields: dict[str, Any], why: str) -> None:
    whole = {"type": "keyword", "name": "rule", "use": "route", **fields}
    with pytest.raises(ValidationError, match=why):
        KeywordRuleConfig.model_validate(whole)
