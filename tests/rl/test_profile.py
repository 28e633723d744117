"""Which pairs a profile gives each question to."""

from __future__ import annotations

import pytest

from rl.profile.run import sampled_pairs
from serve_app.questions import PlainMetric, Question, QuestionSplit
from serve_app.schemas import Pair

PAIRS = tuple(Pair("m", f"t{number}") for number in range(10))


def question(number: int, split: QuestionSplit) -> Question:
    exact = PlainMetric(name="exact")
    return Question(id=f"q{number}", query=f"query {number}", gold="yes", metric=exact, split=split)


def test_training_questions_get_a_share_of_the_pairs_drawn_per_question() -> None:
    drawn = [sampled_pairs(question(number, "train"), PAIRS, 0.3) for number in range(40)]
    assert {len(pairs) for pairs in drawn} == {3}
    assert set().union(*drawn) == set(PAIRS)
    assert drawn[0] == sampled_pairs(question(0, "train"), PAIRS, 0.3)


@pytest.mark.parametrize("share", [0.001, 0.3, 1.0])
def test_held_out_questions_get_every_pair(share: float) -> None:
    assert sampled_pairs(question(0, "held_out"), PAIRS, share) == PAIRS
