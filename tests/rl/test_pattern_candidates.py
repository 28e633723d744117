"""Patterns as candidates of the learning loop: what is measured anew, and under which card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rl.profile.run import fingerprint
from serve_app.config import AtlasConfig
from serve_app.schemas import Pair
from tests.path2_fakes import path2_config

NAME = Pair.of_pattern("p")


def config(folder: Path, pair: str = "math", **card: Any) -> AtlasConfig:
    node = {"ask": {"pair": pair, "prompt": "Answer: {{question}}"}}
    return path2_config(folder, patterns=[{"name": "p", "do": [node]} | card])


def changed(of: AtlasConfig, model_id: str) -> AtlasConfig:
    """The same with another engine behind one model."""
    models = tuple(
        model.model_copy(update={"remote_model": "other"}) if model.model_id == model_id else model
        for model in of.models
    )
    return of.model_copy(update={"models": models})


def test_a_pattern_with_another_node_is_measured_anew(tmp_path: Path) -> None:
    first, second = config(tmp_path), config(tmp_path, "strong")
    assert fingerprint(first, NAME) != fingerprint(second, NAME)


def test_a_pattern_with_another_card_is_not_measured_anew(tmp_path: Path) -> None:
    first, second = config(tmp_path), config(tmp_path, answers="sums", routable=False)
    assert fingerprint(first, NAME) == fingerprint(second, NAME)


def test_a_pattern_is_measured_anew_when_a_model_that_it_asks_changes(tmp_path: Path) -> None:
    of = config(tmp_path)
    assert fingerprint(of, NAME) != fingerprint(changed(of, "math"), NAME)
    assert fingerprint(of, NAME) == fingerprint(changed(of, "strong"), NAME)


def test_a_pattern_that_asks_the_router_depends_on_every_pair_it_may_choose(
    tmp_path: Path,
) -> None:
    of = config(tmp_path, "route")
    assert fingerprint(of, NAME) != fingerprint(changed(of, "strong"), NAME)
