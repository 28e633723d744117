"""Semantic rules: which route is found, how sure it is, and what it makes of odd vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from serve_app.config.rules import SemanticRuleConfig
from serve_app.router.rules.semantic import SemanticRule

AXES = np.eye(4, dtype=np.float32)
WEIGHTS = {"bias": -2.0, "similarity": 3.0, "margin": 4.0, "neighbours": 1.0}


def rule(*counts: int, weights: Any = WEIGHTS) -> SemanticRule:
    """Routes `r0`, `r1` … with so many utterances each, all on an axis of their own."""
    routes = [
        {"name": f"r{n}", "use": "route", "utterances": [f"{n} {i}" for i in range(count)]}
        for n, count in enumerate(counts)
    ]
    config: dict[str, Any] = {"type": "semantic", "name": "rule", "routes": routes}
    config["fitted"] = {
        "encoder": "e",
        "utterances": "0" * 64,
        "examples": 1,
        "routes": {route["name"]: weights for route in routes},
    }
    vectors = np.concatenate([np.tile(AXES[n], (count, 1)) for n, count in enumerate(counts)])
    return SemanticRule(SemanticRuleConfig.model_validate(config), vectors)


def unit(*values: float) -> NDArray[np.float32]:
    vector = np.array(values, np.float32)
    return vector / np.float32(np.linalg.norm(vector))


def test_features_are_similarity_margin_and_share_of_the_neighbours() -> None:
    (features,) = rule(3, 5).features(np.array([unit(0.8, 0.6, 0, 0)]))

    np.testing.assert_allclose(features[0], [1, 0.8, 0.2, 3 / 8], atol=1e-6)
    np.testing.assert_allclose(features[1], [1, 0.6, -0.2, 5 / 8], atol=1e-6)


def test_the_confidence_is_that_of_the_logistic_regression() -> None:
    found = rule(8, 8).judge(unit(1, 0, 0, 0))

    assert found is not None
    assert found.label == "r0"
    assert found.score == pytest.approx(1.0)
    assert found.confidence == pytest.approx(1 / (1 + np.exp(-(-2 + 3 + 4 + 1))), abs=1e-6)


def test_what_is_like_nothing_makes_no_route_sure() -> None:
    found = rule(2, 2).judge(unit(0, 0, 1, 0))

    assert found is not None
    assert found.confidence < 0.5


def test_of_a_tie_the_route_that_is_written_first_is_found() -> None:
    found = rule(2, 2).judge(unit(1, 1, 0, 0))

    assert found is not None
    assert found.label == "r0"


def test_one_route_and_one_utterance_are_enough() -> None:
    found = rule(1).judge(unit(1, 0, 0, 0))

    assert found is not None
    assert found.confidence > 0.99


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_vector_that_is_none_finds_nothing(value: float) -> None:
    assert rule(1, 1).judge(np.full(4, value, np.float32)) is None


def test_an_enormous_logit_gives_a_confidence_all_the_same() -> None:
    weights = {"bias": 1e6, "similarity": 1e6, "margin": 1e6, "neighbours": 1e6}
    found = rule(1, 1, weights=weights).judge(unit(1, 0, 0, 0))

    assert found is not None
    assert 0.5 < found.confidence <= 1.0
