"""Live requests beside their replay: what is asked, what serves meanwhile, and what is compared."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import numpy as np
import pytest

from benchmarks.path2.data import Bench, Learnt, complete, read_bench
from benchmarks.path2.live import ask_live
from rl.fit.selection import FitSettings
from rl.publish import fit_snapshot
from serve_app.config import AtlasConfig
from serve_app.errors import ConfigError
from serve_app.questions import Question
from serve_app.router.rules.policy_rule import LearnedRule
from serve_app.store import Store, publish
from serve_app.store.policies import serving_policies
from tests.policy_data import make_policy
from tests.profile_data import DIM, POEMS

FIT = FitSettings(clusterings=((2, 1),), num_repeats=1)
COST_USD = 3e-5


class _Deployment(ThreadingHTTPServer):
    """Answers `right` to every question but `wrong`, by the policy that the store names."""

    config: AtlasConfig
    asked: list[dict[str, Any]]
    wrong: str


class _Handler(BaseHTTPRequestHandler):
    server: _Deployment

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        version = asyncio.run(_serving(self.server.config))
        if self.path == "/v1/route":
            self._say({"policy_version": version})
            return
        self.server.asked.append(body | {"policy_version": version})
        query = body["messages"][0]["content"]
        said = {"role": "assistant", "content": "no" if query == self.server.wrong else "right"}
        choice = {"index": 0, "message": said, "finish_reason": "stop"}
        atlas = {"pair": str(POEMS), "path": "policy", "cost_usd": COST_USD, "steps": [{}, {}]}
        about = {"id": "1", "object": "chat.completion", "created": 0, "model": "atlas"}
        self._say(about | {"choices": [choice], "atlas": atlas})

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _say(self, said: dict[str, Any]) -> None:
        content = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


async def _serving(config: AtlasConfig) -> int:
    store = await Store.open(config.store_url())
    try:
        return (await serving_policies(store, limit=1))[0].policy_version
    finally:
        await store.close()


@contextmanager
def deployment(config: AtlasConfig, wrong: str) -> Iterator[_Deployment]:
    with _Deployment(("127.0.0.1", 0), _Handler) as server:
        server.config, server.asked, server.wrong = config, [], wrong
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
async def router(config: AtlasConfig, store: Store) -> Learnt:
    """Takes both pairs, one after the other."""
    _, snapshot = await fit_snapshot(config, store, FIT)
    rule = LearnedRule(replace(snapshot, policy=make_policy(dim=DIM)))
    return Learnt(rule.snapshot, rule.net, rule.threshold)


def questions_of(bench: Bench) -> list[Question]:
    return [
        Question(id=query, query=query, metric="exact", gold="right")
        for query in (*bench.test.queries, "one that the profile does not know")
    ]


async def test_the_policy_serves_while_it_is_asked_and_what_served_before_afterwards(
    config: AtlasConfig, store: Store, router: Learnt
) -> None:
    before = await publish(store, None, "before")
    assert before is not None
    bench = await asyncio.to_thread(read_bench, config)
    questions = questions_of(bench)
    with deployment(config, wrong=questions[0].query) as served:
        told = await asyncio.to_thread(
            ask_live,
            bench,
            router,
            questions,
            port=served.server_port,
            count=100,
            temperature=0.7,
            on_progress=lambda _: None,
        )
    num = len(bench.test.queries)
    assert sorted(of["messages"][0]["content"] for of in served.asked) == sorted(bench.test.queries)
    assert {of["policy_version"] for of in served.asked} == {before + 1}
    assert {of["temperature"] for of in served.asked} == {0.7}
    for of in served.asked:
        assert of["atlas"] == {"alpha": 0.0, "max_steps": 4, "models": ["poems", "sums"]}
    assert (await serving_policies(store, limit=1))[0].snapshot_id is None
    assert told["num_questions"] == num
    assert told["live"] == pytest.approx(
        {"score": (num - 1) / num, "cost_usd": COST_USD, "steps": 2.0}
    )
    # Both pairs run in replay too, say the same, and the last answer is returned.
    assert told["replay"]["steps"] == 2.0
    for name, of in told["live_minus_replay"].items():
        assert of["value"] == pytest.approx(told["live"][name] - told["replay"][name])
        assert of["low"] <= of["value"] <= of["high"]
    assert told["failed"] == 0
    assert told["paths"] == {"policy": num}


async def test_questions_that_are_not_held_out_ones_are_refused(
    config: AtlasConfig, router: Learnt
) -> None:
    bench = await asyncio.to_thread(read_bench, config)
    with pytest.raises(ConfigError, match="held-out"):
        ask_live(
            bench,
            router,
            questions_of(bench)[-1:],
            port=1,
            count=1,
            temperature=0.0,
            on_progress=lambda _: None,
        )


async def test_pairs_that_few_were_asked_of_go_and_then_questions_that_a_pair_lacks(
    config: AtlasConfig, store: Store
) -> None:
    bench = await asyncio.to_thread(read_bench, config)
    assert complete(bench) is bench

    def without(rows: slice, column: int) -> Bench:
        measured = bench.test.measured.copy()
        measured[0, rows, column] = False
        return replace(bench, test=replace(bench.test, measured=measured))

    num = bench.test.num_queries
    few = complete(without(slice(num // 2 - 1), 0))
    assert few.test.pairs == few.outcomes.pairs == few.train.pairs == bench.test.pairs
    assert few.test.queries == bench.test.queries[num // 2 - 1 :]
    one = complete(without(slice(num // 2 + 1), 0))
    assert one.test.pairs == one.outcomes.pairs == one.train.pairs == bench.test.pairs[1:]
    assert one.test.queries == bench.test.queries
    assert one.likeness is not None
    assert one.likeness.shape == (bench.train.num_queries, 1)
    np.testing.assert_array_equal(one.train.score, bench.train.score[:, :, 1:])
    with pytest.raises(ConfigError, match="every pair"):
        complete(replace(bench, test=replace(bench.test, measured=bench.test.measured & False)))
