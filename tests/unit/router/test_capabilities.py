"""Who can take what a request needs: every rule chooses among those alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from serve_app.capabilities import Capabilities, Needs, needs_of
from serve_app.config import AtlasConfig
from serve_app.config.abilities import abilities_of
from serve_app.errors import NoCandidate
from serve_app.router.rules.admission import Abilities
from serve_app.router.rules.base import Answer, Batch, Deciding, RoutingRequest
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.rules.cold_start import ColdStartRule, PairCard
from serve_app.router.rules.policy_rule import LearnedRule
from serve_app.schemas import DecidedBy, Decision, Pair
from tests.pictures import asking
from tests.policy_data import with_policy
from tests.router_data import COSTS_USD, LIMITS, PAIRS, make_snapshot, topics

CHEAP, MATH, STRONG = PAIRS
TOPIC = topics()[0]
LEAST: Abilities = {
    CHEAP: Capabilities(vision=True, json_schema=False, tools=False, context_tokens=1000),
    MATH: Capabilities(json_schema=True, tools=False, context_tokens=500),
    STRONG: Capabilities(json_schema=False, tools=True, context_tokens=100),
}
NEEDS = {
    "vision": (Needs(vision=True), CHEAP),
    "json_schema": (Needs(json_schema=True), MATH),
    "tools": (Needs(tools=True), STRONG),
    "context": (Needs(prompt_tokens=501), CHEAP),
}


def cold_start() -> ColdStartRule:
    cards = [
        PairCard(pair, (str(pair),), float(usd)) for pair, usd in zip(PAIRS, COSTS_USD, strict=True)
    ]
    return ColdStartRule(cards, lambda texts: topics()[: len(texts)])


LOCAL = {"type": "local", "model_id": "m", "model_source": "./m"}

RULES: dict[str, tuple[Any, DecidedBy]] = {
    "cold start": (cold_start, DecidedBy.COLD_START),
    "clusters": (lambda: ClusterRule(make_snapshot()), DecidedBy.CLUSTERS),
    "policy": (lambda: LearnedRule(with_policy(threshold=1.01)), DecidedBy.POLICY),
    "exploring": (lambda: ClusterRule(make_snapshot(), epsilon=1.0, seed=0), DecidedBy.CLUSTERS),
}


def answer_of(rule: Deciding, needs: Needs, abilities: Abilities = LEAST) -> Answer:
    request = RoutingRequest(TOPIC, replace(LIMITS, needs=needs), explain=True)
    (answer,) = rule.decide(Batch((request,), PAIRS, 1, None, abilities))
    return answer


@pytest.mark.parametrize("need", NEEDS)
@pytest.mark.parametrize("rule", RULES)
def test_only_who_can_take_a_request_is_a_candidate(rule: str, need: str) -> None:
    (make, path), (needs, able) = RULES[rule], NEEDS[need]
    decision = answer_of(make(), needs)
    assert isinstance(decision, Decision)
    assert decision.path is path
    assert [candidate.pair for candidate in decision.candidates] == [able]


@pytest.mark.parametrize("rule", RULES)
def test_where_nobody_can_there_is_no_candidate(rule: str) -> None:
    answer = answer_of(RULES[rule][0](), Needs(vision=True, tools=True))
    assert isinstance(answer, NoCandidate)


@pytest.mark.parametrize("rule", ["cold start", "clusters", "policy"])
def test_a_request_that_needs_nothing_special_is_decided_as_if_nothing_were_known(
    rule: str,
) -> None:
    make = RULES[rule][0]
    needs = Needs(prompt_tokens=50)
    assert answer_of(make(), needs) == answer_of(make(), Needs(), {})


def test_a_change_of_what_a_model_can_take_counts_at_once() -> None:
    rule = ClusterRule(make_snapshot())
    assert isinstance(answer_of(rule, Needs(vision=True), {}), NoCandidate)
    seeing: Abilities = {MATH: Capabilities(vision=True)}
    decision = answer_of(rule, Needs(vision=True), seeing)
    assert isinstance(decision, Decision)
    assert decision.pair == MATH


def test_requests_of_one_batch_have_needs_of_their_own() -> None:
    rule = ClusterRule(make_snapshot())
    needs = (Needs(), Needs(vision=True), Needs())
    requests = tuple(RoutingRequest(TOPIC, replace(LIMITS, needs=of)) for of in needs)
    answers = rule.decide(Batch(requests, PAIRS, 1, None, LEAST))
    pairs = [answer.pair for answer in answers if isinstance(answer, Decision)]
    assert pairs == [STRONG, CHEAP, STRONG]


def pool(*models: dict[str, Any], patterns: tuple[dict[str, Any], ...] = ()) -> AtlasConfig:
    remote = {"type": "remote", "base_url": "http://127.0.0.1:1/v1", "remote_model": "x"}
    return AtlasConfig.model_validate(
        {"models": [remote | model for model in models], "patterns": patterns}
    )


def test_a_remote_model_is_taken_to_do_all_but_see() -> None:
    (able,) = abilities_of(pool({"model_id": "m"})).values()
    assert able == Capabilities(vision=False, json_schema=True, tools=True, context_tokens=np.inf)


@pytest.mark.parametrize(
    ("engine", "tools"),
    [
        ({}, False),
        ({"tool_call_parser": "hermes"}, False),
        ({"tool_call_parser": "hermes", "enable_auto_tool_choice": True}, True),
    ],
)
def test_a_local_model_calls_functions_where_its_engine_reads_calls(
    engine: dict[str, Any], tools: bool
) -> None:
    settings = LOCAL | {"engine_kwargs": engine}
    config = AtlasConfig.model_validate({"models": [settings]})
    assert abilities_of(config)[Pair("m", "none")].tools is tools


def test_a_local_models_context_is_that_of_its_engine() -> None:
    settings = LOCAL | {"engine_kwargs": {"max_model_len": 4096}}
    config = AtlasConfig.model_validate({"models": [settings]})
    assert abilities_of(config)[Pair("m", "none")].context_tokens == 4096


def test_what_the_settings_say_counts_first() -> None:
    said = {"vision": True, "json_schema": False, "tools": True, "context_tokens": 7}
    settings = LOCAL | {"capabilities": said}
    config = AtlasConfig.model_validate({"models": [settings]})
    assert abilities_of(config)[Pair("m", "none")]._asdict() == said | {"text_alone": True}


@pytest.mark.parametrize(
    ("asked", "sees"),
    [(["eye"], True), (["eye", "text"], False), (["eye", "route"], True), (["route"], True)],
)
def test_a_pattern_sees_where_every_model_that_it_names_does(asked: list[str], sees: bool) -> None:
    nodes = [{"ask": {"pair": name, "prompt": "{{question}}"}} for name in asked]
    config = pool(
        {"model_id": "eye", "capabilities": {"vision": True}},
        {"model_id": "text"},
        patterns=({"name": "look", "do": nodes},),
    )
    assert abilities_of(config)[Pair.of_pattern("look")].vision is sees


def test_a_pattern_that_routes_sees_nothing_where_no_model_does() -> None:
    look = {"name": "look", "do": [{"ask": {"pair": "route", "prompt": "{{question}}"}}]}
    config = pool({"model_id": "text"}, patterns=(look,))
    assert not abilities_of(config)[Pair.of_pattern("look")].vision


def test_needs_are_read_from_the_call() -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
    needs = needs_of([asking()], {"response_format": schema}, [{"type": "function"}], None)
    assert (needs.vision, needs.json_schema, needs.tools) == (True, True, True)
    plain = needs_of([{"role": "user", "content": "hi"}], {}, [{"type": "function"}], "none")
    assert plain == Needs()


def test_a_prompt_is_taken_to_be_as_short_as_it_can_be() -> None:
    words = "abcd " * 800
    assert needs_of([{"role": "user", "content": words}], {}, [], None).prompt_tokens == 400
    blanks = {"role": "user", "content": " " * 10_000}
    assert needs_of([blanks], {}, [], None).prompt_tokens == 0


def test_with_a_tool_that_reads_pictures_a_model_of_text_takes_them_and_nothing_else() -> None:
    config = AtlasConfig.model_validate(
        {
            "models": [LOCAL | {"tools": ["none", "ocr"]}],
            "tools": [{"type": "ocr", "tool_id": "ocr"}],
        }
    )
    reads, plain = (abilities_of(config)[Pair("m", tool)] for tool in ("ocr", "none"))
    assert (reads.take(Needs(vision=True)), reads.take(Needs())) == (True, False)
    assert (plain.take(Needs(vision=True)), plain.take(Needs())) == (False, True)


@pytest.mark.parametrize("rule", RULES)
def test_a_request_without_pictures_is_not_sent_to_what_reads_them(rule: str) -> None:
    make = RULES[rule][0]
    reading = {STRONG: Capabilities(vision=True, text_alone=False)}
    seen = answer_of(make(), Needs(vision=True), reading)
    assert isinstance(seen, Decision)
    assert seen.pair == STRONG
    text = answer_of(make(), Needs(), reading)
    assert isinstance(text, Decision)
    assert text.pair != STRONG
