"""The cold-start rule: nearest card wins, price breaks near-ties, limits are kept."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from serve_app.config import AtlasConfig
from serve_app.errors import NoCandidate
from serve_app.router.rules.cold_start import ColdStartRule, pair_cards
from serve_app.schemas import DecidedBy, Limits, Pair
from tests.router_data import decide

AXES = {"maths": 0, "facts": 1}
PAIRS = (Pair("cheap", "none"), Pair("dear", "none"), Pair("dear", "calculator"))


def encode(texts: Sequence[str]) -> NDArray[np.float32]:
    """Each known word is an axis of its own; every other text points elsewhere."""
    vectors = np.zeros((len(texts), 3), dtype=np.float32)
    for row, text in enumerate(texts):
        vectors[row, AXES.get(text, 2)] = 1.0
    return vectors


def config(**changes: object) -> AtlasConfig:
    remote = {"type": "remote", "base_url": "http://127.0.0.1:1/v1", "remote_model": "x"}
    price = {"usd_per_1m_prompt_tokens": 1.0, "usd_per_1m_completion_tokens": 1.0}
    return AtlasConfig.model_validate(
        {
            "models": [
                {**remote, "model_id": "cheap", "card": {"examples": ["facts"]}, "price": price},
                {
                    **remote,
                    "model_id": "dear",
                    "card": {"examples": ["facts"]},
                    "price": {name: 100 * value for name, value in price.items()},
                    "tools": ["none", "calculator"],
                },
            ],
            "tools": [{"type": "calculator", "tool_id": "calculator"}],
            "pairs": [{"pair": "dear@calculator", "examples": ["maths"]}],
            **changes,
        }
    )


@pytest.fixture
def rule() -> ColdStartRule:
    return ColdStartRule(pair_cards(config()), encode)


def limits(**changes: object) -> Limits:
    return Limits(**{"alpha": 0.0, "deadline_s": 1.0, **changes})  # type: ignore[arg-type]


def query(word: str) -> NDArray[np.float32]:
    vector: NDArray[np.float32] = encode([word])[0]
    return vector


def test_the_pair_whose_example_is_nearest_is_chosen(rule: ColdStartRule) -> None:
    decision = decide(rule, query("maths"), limits(), PAIRS, 7)
    assert (decision.pair, decision.path, decision.pool_version) == (
        PAIRS[2],
        DecidedBy.COLD_START,
        7,
    )
    utilities = [candidate.utility for candidate in decision.candidates]
    assert utilities == sorted(utilities, reverse=True)


def test_of_equals_the_cheaper_is_chosen_once_alpha_counts(rule: ColdStartRule) -> None:
    assert decide(rule, query("facts"), limits(alpha=0.1), PAIRS, 1).pair == PAIRS[0]


def test_alpha_one_is_price_alone(rule: ColdStartRule) -> None:
    assert decide(rule, query("maths"), limits(alpha=1.0), PAIRS, 1).pair == PAIRS[0]


def test_a_forbidden_model_is_never_a_candidate(rule: ColdStartRule) -> None:
    decision = decide(rule, query("facts"), limits(models=frozenset({"dear"})), PAIRS, 1)
    assert {c.pair.model_id for c in decision.candidates} == {"dear"}


def test_a_pair_over_the_cost_limit_is_never_a_candidate(rule: ColdStartRule) -> None:
    decision = decide(rule, query("maths"), limits(max_cost_usd=0.001), PAIRS, 1)
    assert [c.pair for c in decision.candidates] == [PAIRS[0]]


def test_nothing_is_known_of_seconds_so_a_short_deadline_removes_none(rule: ColdStartRule) -> None:
    decision = decide(rule, query("maths"), limits(deadline_s=1e-3), PAIRS, 1)
    assert {c.pair for c in decision.candidates} == set(PAIRS)


def test_a_pair_that_does_not_answer_is_never_a_candidate(rule: ColdStartRule) -> None:
    assert decide(rule, query("maths"), limits(), PAIRS[:1], 1).pair == PAIRS[0]


def test_nothing_allowed_is_an_error_not_a_guess(rule: ColdStartRule) -> None:
    with pytest.raises(NoCandidate):
        decide(rule, query("maths"), limits(tools=frozenset({"python"})), PAIRS, 1)


def test_confidence_is_higher_for_a_clear_choice(rule: ColdStartRule) -> None:
    clear = decide(rule, query("maths"), limits(), PAIRS, 1).confidence
    even = decide(rule, query("facts"), limits(), PAIRS, 1).confidence
    assert 0 < even < clear <= 1


def test_mean_of_the_nearest_examples_is_used_where_asked() -> None:
    cards = pair_cards(config(pairs=[{"pair": "dear@calculator", "examples": ["maths", "facts"]}]))
    one, two = (ColdStartRule(cards, encode, top_k=k).qualities(query("maths"))[2] for k in (1, 2))
    assert (one, two) == (1.0, 0.5)
