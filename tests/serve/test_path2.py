"""Path 2 on the running graph: several steps over HTTP, streamed and not, canaries; the graph ends
as it began, with the cold-start rule."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import httpx
import pytest

from benchmarks.swap import ranked_snapshot
from rl.publish import keep_snapshot, promote
from serve_app.config import AtlasConfig, load_config
from serve_app.router.rules.cold_start import pair_cards
from serve_app.store import Mode, Store, publish
from tests.conftest import Graph
from tests.serve.test_learning import eventually

pytestmark = pytest.mark.serve

T = TypeVar("T")

MODELS = ["scripted-fail", "scripted-echo", "scripted-bad_call"]
BODY = {"model": "atlas", "messages": [{"role": "user", "content": "zzz"}]}
OPTIONS = {"models": MODELS, "tools": ["none"], "max_steps": 3}


def in_store(config: AtlasConfig, work: Callable[[Store], Awaitable[T]]) -> T:
    async def opened() -> T:
        store = await Store.open(config.store_url())
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(opened())


def route(graph: Graph) -> dict[str, Any]:
    decided: dict[str, Any] = httpx.post(
        f"{graph.url}/v1/route", json=BODY | {"atlas": OPTIONS}
    ).json()
    return decided


def ask(graph: Graph, **changes: Any) -> httpx.Response:
    body = BODY | {"atlas": OPTIONS | changes.pop("atlas", {})} | changes
    answer = httpx.post(f"{graph.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer


def put(graph: Graph, first: list[str], **how: Any) -> int:
    """Publish a policy that takes some pairs first, in their order."""
    config = load_config(graph.config)
    cards = pair_cards(config)
    names = [str(card.pair) for card in cards]
    order = [names.index(name) for name in first]
    order += [number for number in range(len(names)) if number not in order]

    async def work(store: Store) -> int:
        snapshot = ranked_snapshot(cards, config.embedder.model, order)
        return await promote(
            store, await keep_snapshot(config, store, snapshot), "a test of path 2", **how
        )

    return in_store(config, work)


@pytest.fixture
def serving(graph: Graph) -> Iterator[int]:
    """A policy that tries a pair that fails, and then one that echoes."""
    version = put(graph, ["scripted-fail@none", "scripted-echo@none"])
    eventually(lambda: route(graph)["policy_version"] == version or None)
    yield version
    config = load_config(graph.config)
    back = in_store(config, lambda store: publish(store, None, "a test is over"))
    eventually(lambda: route(graph)["policy_version"] == back or None)


def test_the_policy_goes_on_after_a_failed_step(graph: Graph, serving: int) -> None:
    answer = ask(graph, atlas={"max_steps": 2})
    said = answer.json()
    steps = said["atlas"]["steps"]
    assert [step["pair"] for step in steps] == ["scripted-fail@none", "scripted-echo@none"]
    assert [step["path"] for step in steps] == ["policy", "policy"]
    assert (steps[0]["error"], steps[1]["error"]) == ("scripted failure", None)
    assert {step["policy_version"] for step in steps} == {serving}
    assert (said["atlas"]["answer_step"], said["model"]) == (1, "scripted-echo@none")
    assert answer.headers["x-atlas-path"] == "policy"


def test_every_step_is_asked_and_one_answer_is_given(graph: Graph, serving: int) -> None:
    said = ask(graph).json()["atlas"]
    assert len(said["steps"]) == 3
    assert said["pair"] == said["steps"][said["answer_step"]]["pair"]
    assert said["usage"]["total_tokens"] == sum(
        step["usage"]["total_tokens"] for step in said["steps"]
    )


def test_a_stream_of_several_steps_ends_with_all_of_them(graph: Graph, serving: int) -> None:
    body = BODY | {"stream": True, "atlas": OPTIONS | {"max_steps": 3}}
    url = f"{graph.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=60) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    last = httpx.Response(200, text=lines[-2].removeprefix("data: ")).json()
    assert {step["policy_version"] for step in last["atlas"]["steps"]} == {serving}
    assert len(last["atlas"]["steps"]) == 3


def test_an_explanation_says_what_the_policy_would_do(graph: Graph, serving: int) -> None:
    decided = route(graph)
    assert (decided["path"], decided["action"]) == ("policy", "route")
    assert decided["pair"] == "scripted-fail@none"
    assert len(decided["candidates"]) == len(MODELS)


def test_a_canary_serves_a_share_and_the_rest_stays(graph: Graph, serving: int) -> None:
    canary = put(graph, ["scripted-echo@none"], mode=Mode.CANARY, share=0.5)
    eventually(lambda: route(graph)["policy_version"] == canary or None)
    seen: dict[int, set[str]] = {}
    for _ in range(40):
        said = ask(graph, atlas={"max_steps": 2}).json()["atlas"]
        seen.setdefault(said["policy_version"], set()).add(said["steps"][0]["pair"])
    assert seen == {serving: {"scripted-fail@none"}, canary: {"scripted-echo@none"}}
    listed = httpx.get(f"{graph.url}/v1/admin/snapshots").json()["policies"]
    assert [(p["policy_version"], p["mode"], p["share"]) for p in listed[:2]] == [
        (canary, "canary", 0.5),
        (serving, "serving", 1.0),
    ]


def test_an_engine_with_a_bug_of_its_own_has_failed_and_no_more(graph: Graph) -> None:
    body = BODY | {"model": "scripted-bad_call@none"}  # it looks for the tool it was not given
    answer = httpx.post(f"{graph.url}/v1/chat/completions", json=body, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "engine_error")
