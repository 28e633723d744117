"""The swap benchmark's own parts: what it reads of an answer, and what it calls inconsistent."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.client import unchunked
from benchmarks.swap import Record, Swap, inconsistent, judge, ranked_snapshot
from benchmarks.swap_load import Answer, extension_of
from serve_app.router.rules.cold_start import PairCard
from serve_app.router.rules.policy_rule import LearnedRule
from serve_app.schemas import Limits, Pair
from tests.router_data import decide

SAID = {"policy_version": 3, "steps": []}
EVENTS = b'data: {"choices": []}\n\ndata: ' + json.dumps({"atlas": SAID}).encode() + b"\n\n"


def test_the_extension_is_read_of_whole_and_streamed_answers() -> None:
    assert extension_of(json.dumps({"atlas": SAID}).encode(), streamed=False) == SAID
    assert extension_of(EVENTS + b"data: [DONE]\n\n", streamed=True) == SAID
    with pytest.raises(ValueError, match="cut off"):
        extension_of(EVENTS, streamed=True)


def test_chunks_are_joined_wherever_they_were_cut() -> None:
    body = EVENTS + b"data: [DONE]\n\n"
    cut = [body[:30], body[30:31], body[31:]]
    framed = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in cut) + b"0\r\n\r\n"
    assert unchunked(framed) == body
    assert unchunked(b'{"atlas": {}}') == b'{"atlas": {}}'


ORDER = ("a@none", "b@none", "c@none")
SWAPS = [
    Swap(1, 0.0, 0.0, "promote", ORDER),
    Swap(2, 10.0, 10.1, "promote", ORDER[::-1]),
]
GOOD = Answer(11.0, 5.0, False, None, 2, (2, 2), ("c@none", "b@none"))


@pytest.mark.parametrize(
    "change",
    [
        {"step_versions": (1, 2)},
        {"policy_version": 1},
        {"policy_version": 7, "step_versions": (7, 7)},
        {"policy_version": None},
        {"pairs": ("c@none", "a@none")},
    ],
)
def test_an_answer_of_two_policies_is_found(change: dict[str, Any]) -> None:
    assert inconsistent([GOOD], SWAPS) == []
    wrong = replace(GOOD, **change)
    assert inconsistent([GOOD, wrong], SWAPS) == [wrong]


def test_the_verdict_separates_steady_from_swapping() -> None:
    steady = [Answer(float(n), 10.0, False, None, 1, (1,), ORDER[:1]) for n in range(10)]
    late = Answer(10.5, 12.0, True, None, 1, (1,), ORDER[:1])
    after = [replace(GOOD, began_unix_s=11.0 + n, latency_ms=12.0) for n in range(5)]
    record = Record([*steady, late, *after], SWAPS, [(10.0, 16.0)], 0.0)
    figures, targets = judge(record, 10_000)
    assert figures["latency"]["steady"]["requests"] == 10
    assert figures["latency"]["swapping"]["requests"] == 6
    reached = {target.name: (round(target.value, 3), target.holds) for target in targets}
    assert reached["p99 during swaps over the steady one"] == (1.2, True)
    assert reached["slowest swap at every replica, s"] == (0.4, True)
    assert reached["requests"] == (16, False)
    failed = replace(record, answers=[*record.answers, Answer(12.0, 0.0, False, "500")])
    assert judge(failed, 10_000)[1][0].holds is False


def test_a_ranked_policy_takes_the_pairs_in_its_order() -> None:
    cards = [PairCard(Pair(name, "none"), (name,), 1e-5) for name in "abc"]
    rule = LearnedRule(ranked_snapshot(cards, "an-encoder", (2, 0, 1)))
    query = np.eye(384, dtype=np.float32)[7]
    pairs = tuple(card.pair for card in cards)
    decision = decide(rule, query, Limits(0.0, 60.0, max_steps=2), pairs, 1)
    assert [candidate.pair.model_id for candidate in decision.candidates] == ["c", "a", "b"]
