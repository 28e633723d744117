"""Rules on the running graph: put over HTTP, followed without a restart, and taken out again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from serve_app.config import load_config
from serve_app.pool.desired import written_rules
from tests.conftest import Graph

pytestmark = [pytest.mark.serve, pytest.mark.serial]


def put(graph: Graph, rules: list[Any]) -> None:
    answer = httpx.put(f"{graph.url}/v1/admin/rules", json={"rules": rules}, timeout=60)
    assert answer.status_code == 202, answer.text


def decided(graph: Graph, question: str) -> Any:
    body = {"model": "atlas", "messages": [{"role": "user", "content": question}]}
    answer = httpx.post(f"{graph.url}/v1/route", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture
def shipped(graph: Graph) -> Iterator[Graph]:
    """The graph with the rules of the bundled pool, which the tests' own has not."""
    put(graph, list(written_rules(load_config("configs/nano.yaml"))))
    give_up_s = time.monotonic() + 120
    while not decided(graph, "hello")["hops"]:
        assert time.monotonic() < give_up_s, "the rules do not serve"
        time.sleep(0.2)
    yield graph
    put(graph, [])


def test_what_the_pool_does_not_know_gets_a_refusal_that_says_what_it_can_do(
    shipped: Graph,
) -> None:
    completion = shipped.client().chat.completions.create(
        model="atlas", messages=[{"role": "user", "content": "Hello, who are you?"}]
    )
    extension: Any = completion.model_extra["atlas"] if completion.model_extra else None

    assert extension["path"] == "default"
    assert extension["stop"] == "declined"
    assert "I can do arithmetic" in (completion.choices[0].message.content or "")
    known = decided(shipped, "What is 15% of 240?")
    assert known["path"] != "default"
    assert [hop["rule"] for hop in known["hops"]] == ["scope", "learned"]


def test_a_real_model_s_choice_of_a_label_decides(graph: Graph) -> None:
    question = "What is the capital of Japan?"
    labels = [
        {"name": "sums", "about": "arithmetic", "use": "nano-math@none"},
        {"name": "facts", "about": "anything else", "use": "nano-facts@none"},
    ]
    desk = {"type": "llm", "name": "desk", "model": "nano-facts", "labels": labels, "floor": 0}
    put(graph, [desk, {"type": "default", "use": "nano-code@none"}])
    try:
        give_up_s = time.monotonic() + 120
        while not (hops := [of for of in decided(graph, question)["hops"] if of["rule"] == "desk"]):
            assert time.monotonic() < give_up_s, "the rules do not serve"
            time.sleep(0.2)
        (hop,) = hops
        assert hop["decided"], hop["note"]
        assert 0 < hop["confidence"] <= 1
        assert hop["cost_usd"] > 0
        chosen = {label["name"]: label["use"] for label in labels}[hop["label"]]
        completion = graph.client().chat.completions.create(
            model="atlas", messages=[{"role": "user", "content": question}]
        )
        extension: Any = (completion.model_extra or {})["atlas"]
        assert (extension["path"], extension["pair"]) == ("llm", chosen)
    finally:
        put(graph, [])
