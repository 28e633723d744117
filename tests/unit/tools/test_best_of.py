"""Self-consistency: equal answers count as equal, the majority wins, ties go to the earliest."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.config.tools import BestOfConfig
from serve_app.errors import ToolFailed
from serve_app.tools.builtin.best_of import BestOf, agreement, answer_key, normalise, vote

SAME = [
    ("42", "42.0"),
    ("42", " 42. "),
    ("1,234", "1234"),
    ("$5.00", "5"),
    ("0.5", "1/2"),
    ("-3", "\N{MINUS SIGN}3"),
    ("12%", "12"),
    ("12 apples", "12"),
    ("The answer is 7.", "7"),
    ("6 * 7 is 42, so the final answer is: 42", "#### 42"),
    (r"so \boxed{42}", "42"),
    ("1e3", "1000"),
    ("Paris", "paris."),
    ("  The   Seine ", "the seine!"),
    ("Answer: Paris", "paris"),
    ("```python\nx = 1  # one\n\nprint('a')\n```", '```py\nx = 1\nprint("a")\n```'),
    ("def f(x):\n    return x", "def f(x):\n    # the same\n    return  x\n"),
]

DIFFERENT = [
    ("42", "43"),
    ("1/2", "2"),
    ("5k", "5"),
    ("1 and 2", "1"),
    ("3.14", "3.15"),
    ("-3", "3"),
    ("Paris", "Rome"),
    ("def f(x):\n    return x", "def f(x):\n    return -x"),
    ("def f():\n    return 1", "def f():\nreturn 1"),
    ("", "0"),
]


@pytest.mark.parametrize(("left", "right"), SAME)
def test_equal_answers_are_one_group(left: str, right: str) -> None:
    assert normalise(left) == normalise(right)


@pytest.mark.parametrize(("left", "right"), DIFFERENT)
def test_different_answers_stay_apart(left: str, right: str) -> None:
    assert normalise(left) != normalise(right)


@pytest.mark.parametrize("answer", [None, "", " \n "])
def test_an_answer_with_nothing_in_it_has_no_key(answer: str | None) -> None:
    assert answer_key(answer) is None
    assert answer_key("The answer is 7.") == answer_key("7.0")


def test_majority_wins() -> None:
    assert vote(["41", "42", "the answer is 42", "40", "42.0"]) == 1


def test_tie_goes_to_the_earliest() -> None:
    assert vote(["a", "b", "b", "a"]) == 0
    assert vote(["c", "b", "a"]) == 0


def test_empty_answers_never_win_over_others() -> None:
    assert vote(["", "  ", "", "7"]) == 3
    assert vote(["", ""]) == 0


def test_vote_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        vote([])


def test_agreement_is_the_share_of_the_winner() -> None:
    assert agreement(["1", "2", "1.0", "1"]) == 0.75
    assert agreement(["x"]) == 1.0


@given(st.lists(st.text(max_size=40), min_size=1, max_size=8))
@settings(max_examples=100)
def test_vote_names_the_first_of_the_largest_group(answers: list[str]) -> None:
    winner = vote(answers)
    keys = [normalise(answer) for answer in answers]
    assert keys.index(keys[winner]) == winner
    if keys[winner]:
        assert keys.count(keys[winner]) == max(keys.count(key) for key in keys if key)


def test_long_numbers_are_compared_in_bounded_time() -> None:
    assert vote(["9" * 100_000, "1e999999999999", "7", "7"]) == 2


N = 300_000
HOSTILE_ANSWERS = {
    "blanks behind a marker": "#### a" + " " * N + "b",
    "blanks around a unit": "#### 5" + " " * N + "%x",
    "blanks in code": "def f():\n  x" + " " * N + "y",
    "lines behind a marker": "the answer is" + "\n" * N + "x",
    "markers": "the answer is " * (N // 14),
    "open boxes": "\\boxed{" * (N // 7),
    "open blocks": "```py\n" * (N // 6),
    "a number": "1" * N,
    "grouped digits": "1" + ",111" * (N // 4),
    "fractions": ("1" + " " * 1000) * (N // 1000),
    "marks on one letter": "a" + "\u0300\u0316" * (N // 2),
    "letters that stand for many": "\ufdfa" * N,
    "comment signs": "def f():\n" + " #" * (N // 2),
}


@pytest.mark.serial
@pytest.mark.parametrize("answer", HOSTILE_ANSWERS.values(), ids=list(HOSTILE_ANSWERS))
def test_no_answer_takes_long_to_compare(answer: str) -> None:
    began_s = time.thread_time()
    assert answer_key(answer) is not None
    assert time.thread_time() - began_s < 0.1  # a few ms; what is quadratic takes minutes


def test_the_end_of_a_long_answer_counts() -> None:
    thoughts = "Let me think. " * 10_000
    assert answer_key(thoughts + "The answer is: 42.") == answer_key("42")
    assert answer_key("#### 41" + " " * 30_000 + "42") != answer_key("41")


def test_best_of_cannot_be_called() -> None:
    with pytest.raises(ToolFailed):
        BestOf(BestOfConfig(tool_id="best_of")).run({}, 1)
