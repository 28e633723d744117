"""The learning loop on the running graph: profile, fit, promote, feedback, roll back, and jobs; the
graph ends as it began, with the cold-start rule."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from sqlalchemy import func, select, update

from rl.fit.selection import FitSettings
from rl.profile.run import ProfileSettings, Progress, fingerprint, profile
from rl.publish import fit_snapshot, keep_snapshot, promote
from serve_app.config import AtlasConfig, load_config
from serve_app.config.abilities import abilities_of
from serve_app.orchestrator.planning import with_note
from serve_app.questions import Question, read_questions
from serve_app.router.snapshots.library import SnapshotLibrary
from serve_app.router.snapshots.snapshot import RouterSnapshot
from serve_app.schemas import Pair
from serve_app.store import Store, publish, read_profile, read_thoughts
from serve_app.store.tables import ProfileOutcomeRow, RequestRow
from tests.conftest import Graph

pytestmark = pytest.mark.serve

T = TypeVar("T")

MODELS = frozenset({"nano-math", "nano-facts", "nano-code"})
SETTINGS = ProfileSettings(models=MODELS)
FIT = FitSettings(clusterings=((8, 1),), num_repeats=1)
SUM = "What is 15% of 240?"


@dataclass
class Loop:
    """The learning loop's side of the graph."""

    graph: Graph
    config: AtlasConfig
    questions: tuple[Question, ...]

    def num_pairs(self) -> int:
        """Of the three models, those that a question without a picture can be asked."""
        able = abilities_of(self.config)
        pairs = self.config.all_pairs()
        return sum(pair.model_id in MODELS and able[pair].text_alone for pair in pairs)

    def run(self, work: Callable[[Store], Awaitable[T]]) -> T:
        async def opened() -> T:
            store = await Store.open(self.config.store_url())
            try:
                return await work(store)
            finally:
                await store.close()

        return asyncio.run(opened())

    def measure(self, **settings: Any) -> Progress:
        changed = replace(SETTINGS, **settings)
        return self.run(lambda store: profile(self.config, self.questions, store, changed))

    def route(self, question: str = SUM) -> dict[str, Any]:
        body = {"model": "atlas", "messages": [{"role": "user", "content": question}]}
        decision: dict[str, Any] = httpx.post(
            self.graph.url + "/v1/route",
            json=body | {"atlas": {"models": sorted(MODELS)}},
            timeout=60,
        ).json()
        return decision

    def wait_for_policy(self, version: int) -> dict[str, Any]:
        return eventually(lambda: found if (found := self.route())["policy_version"] == version
                          else None)  # fmt: skip

    def job(self, **request: Any) -> str:
        response = httpx.post(self.graph.url + "/v1/admin/jobs", json=request, timeout=60)
        assert response.status_code == 201, response.text
        return str(response.json()["job_id"])

    def look_up(self, job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(
            f"{self.graph.url}/v1/admin/jobs/{job_id}", timeout=60
        ).json()
        return found

    def end_of(self, job_id: str) -> dict[str, Any]:
        over = ("succeeded", "failed", "cancelled")
        return eventually(
            lambda: found if (found := self.look_up(job_id))["state"] in over else None, 120
        )


def eventually(look: Callable[[], T | None], within_s: float = 60) -> T:
    ends_s = time.monotonic() + within_s
    while (found := look()) is None:
        assert time.monotonic() < ends_s, "it did not happen in time"
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def loop(graph: Graph) -> Loop:
    """The loop on 36 questions of three domains; a third of them held out."""
    shipped = read_questions(Path("configs/nano/questions.jsonl"))
    chosen = [
        question
        for domain in ("math", "facts", "code")
        for split, number in (("train", 8), ("held_out", 4))
        for question in [q for q in shipped if (q.domain, q.split) == (domain, split)][:number]
    ]
    return Loop(graph, load_config(graph.config), tuple(chosen))


@pytest.fixture(scope="module")
def measured(loop: Loop) -> Progress:
    """The whole profile, after one that was stopped on its way."""

    async def stopped(store: Store) -> None:
        is_under_way = asyncio.Event()
        work = asyncio.ensure_future(
            profile(
                loop.config,
                loop.questions,
                store,
                SETTINGS,
                lambda progress: is_under_way.set() if progress.done else None,
            )
        )
        await is_under_way.wait()
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work

    loop.run(stopped)
    return loop.measure()


@pytest.fixture(scope="module")
def fitted(loop: Loop, measured: Progress) -> tuple[str, RouterSnapshot]:
    """A snapshot of the profile, and its id."""
    return loop.run(lambda store: fit_snapshot(loop.config, store, FIT, with_traffic=False))


@pytest.fixture
def serving(loop: Loop, fitted: tuple[str, RouterSnapshot]) -> Iterator[int]:
    """The fitted policy serves; the cold-start rule does again afterwards."""
    version = loop.run(lambda store: promote(store, fitted[0], "a test"))
    loop.wait_for_policy(version)
    yield version
    back = loop.run(lambda store: publish(store, None, "a test is over"))
    assert back is not None
    loop.wait_for_policy(back)


def test_a_profile_that_was_stopped_goes_on_and_measures_each_pair_once(
    loop: Loop, measured: Progress
) -> None:
    num_pairs = loop.num_pairs()

    async def count(store: Store) -> int:
        async with store.begin() as connection:
            return await connection.scalar(select(func.count()).select_from(ProfileOutcomeRow)) or 0

    assert measured.skipped > 0
    assert measured.failed == 0
    assert measured.done + measured.skipped == num_pairs * len(loop.questions)
    assert loop.run(count) == num_pairs * len(loop.questions)


def test_outcomes_hold_what_a_policy_may_see(loop: Loop, measured: Progress) -> None:
    _, outcomes = loop.run(lambda store: read_profile(store, loop.config.embedder.model, "train"))
    sums = [o for o in outcomes if str(o.pair) == "nano-math@calculator" and o.score == 1]
    assert sums
    assert all(o.answer and o.mean_logprob is not None and o.mean_logprob <= 0 for o in sums)
    assert all(o.prompt_tokens > 0 and o.completion_tokens > 0 and o.seconds > 0 for o in sums)
    price = loop.config.model("nano-math").price
    tool = next(tool for tool in loop.config.tools if tool.tool_id == "calculator")
    one = sums[0]
    expected = (
        one.prompt_tokens * price.usd_per_1m_prompt_tokens
        + one.completion_tokens * price.usd_per_1m_completion_tokens
    ) / 1e6 + tool.price_usd_per_call
    assert one.cost_usd == pytest.approx(expected)


def test_what_ended_in_an_error_is_measured_anew_where_that_is_asked_for(
    loop: Loop, measured: Progress
) -> None:
    row = ProfileOutcomeRow
    chosen = (
        row.question_key == loop.questions[0].key,
        row.tool_id == "none",
        row.model_id.in_(MODELS),
    )

    async def spoil(store: Store) -> None:
        async with store.begin() as connection:
            await connection.execute(update(row).where(*chosen).values(error="it was too slow"))

    async def errors(store: Store, *those: Any) -> int:
        query = select(func.count()).select_from(row).where(row.error.is_not(None), *those)
        async with store.begin() as connection:
            return await connection.scalar(query) or 0

    loop.run(spoil)
    wrong = loop.run(errors)  # on a slow machine a tool's time-outs are among them
    assert wrong >= len(MODELS)
    assert loop.measure().done == 0
    assert loop.measure(errors_again=True).done == wrong
    assert loop.run(lambda store: errors(store, *chosen)) == 0


def test_further_samples_of_a_question_are_kept_beside_the_first(
    loop: Loop, measured: Progress
) -> None:
    settings = replace(SETTINGS, samples=3, models=frozenset({"nano-math"}))

    def work() -> Progress:
        asked = loop.questions[:1]
        return loop.run(lambda store: profile(loop.config, asked, store, settings))

    progress = work()
    assert progress.failed == 0
    assert progress.done == 2 * progress.skipped > 0
    assert work().done == 0


def test_a_profile_stops_before_it_spends_too_much(loop: Loop, measured: Progress) -> None:
    stopped = loop.measure(again=True, max_cost_usd=0.0)
    assert stopped.done == 0
    assert stopped.stopped is not None


def test_measuring_is_no_traffic(loop: Loop, measured: Progress) -> None:
    async def owners(store: Store) -> set[str]:
        async with store.begin() as connection:
            return set(await connection.scalars(select(RequestRow.owner)))

    loop.route()
    assert "profile" not in loop.run(owners)


@dataclass
class Traffic:
    """Questions asked without a pause, and what came back."""

    loop: Loop
    statuses: list[int] = field(default_factory=list)
    versions: set[int] = field(default_factory=set)

    def run(self, stop: threading.Event) -> None:
        body = {
            "model": "atlas",
            "messages": [{"role": "user", "content": SUM}],
            "atlas": {"models": sorted(MODELS)},
        }
        with httpx.Client(base_url=self.loop.graph.url, timeout=60) as client:
            while not stop.is_set():
                answer = client.post("/v1/chat/completions", json=body)
                self.statuses.append(answer.status_code)
                if answer.status_code == 200:
                    self.versions.add(answer.json()["atlas"]["policy_version"])


def test_a_policy_is_swapped_under_load_without_a_failed_request(
    loop: Loop, fitted: tuple[str, RouterSnapshot]
) -> None:
    before = loop.route()["policy_version"]
    traffic, stop = Traffic(loop), threading.Event()
    thread = threading.Thread(target=traffic.run, args=(stop,))
    thread.start()
    try:
        eventually(lambda: len(traffic.statuses) >= 5 or None)

        version = loop.run(lambda store: promote(store, fitted[0], "a test"))
        decision = loop.wait_for_policy(version)
        asked = len(traffic.statuses)
        eventually(lambda: len(traffic.statuses) >= asked + 5 or None)
        back = loop.run(lambda store: publish(store, None, "a test is over"))
        assert back is not None
        loop.wait_for_policy(back)
    finally:
        stop.set()
        thread.join(60)
    assert set(traffic.statuses) == {200}
    assert {before, version} <= traffic.versions
    assert decision["path"] in ("clusters", "out_of_distribution")


def test_an_explanation_names_intervals_the_cluster_and_the_versions(
    loop: Loop, serving: int
) -> None:
    decision = loop.route()
    best = decision["candidates"][0]
    assert len(decision["candidates"]) == loop.num_pairs()
    assert best["pair"] == decision["pair"] == "nano-math@calculator"
    low, high = best["quality_low"], best["quality_high"]  # within [0, 1], as the quality is
    assert low < high
    assert low <= best["quality"] <= high
    assert 0 <= decision["distance_quantile"] <= 1
    assert decision["cluster"]["examples"]
    assert (decision["policy_version"], decision["propensity"]) == (serving, 1.0)


def test_a_damaged_snapshot_is_refused_and_the_serving_one_goes_on(
    loop: Loop, fitted: tuple[str, RouterSnapshot], serving: int
) -> None:
    other = replace(fitted[1], metadata={**fitted[1].metadata, "note": "another one"})

    async def damaged(store: Store) -> None:
        snapshot_id = await keep_snapshot(loop.config, store, other)
        folder = SnapshotLibrary(loop.config.snapshots_path()).folder(snapshot_id)
        (folder / "snapshot.json").write_text("{}")
        await promote(store, snapshot_id, "a test")

    loop.run(damaged)
    time.sleep(3 * loop.config.router.refresh_interval_s)
    assert loop.route()["policy_version"] == serving


def test_users_verdicts_move_traffic_off_a_pair_that_went_bad(loop: Loop, serving: int) -> None:
    body = {
        "model": "atlas",
        "messages": [{"role": "user", "content": SUM}],
        "atlas": {"models": sorted(MODELS)},
    }
    first = loop.route()["pair"]
    with httpx.Client(base_url=loop.graph.url, timeout=60) as client:
        for _ in range(50):
            answer = client.post("/v1/chat/completions", json=body).json()["atlas"]
            if answer["pair"] != first:
                break
            verdict = {"request_id": answer["request_id"], "score": 0}
            assert client.post("/v1/feedback", json=verdict).status_code == 200
            time.sleep(0.1)
    assert eventually(lambda: found if (found := loop.route()["pair"]) != first else None)


def test_the_loop_runs_as_jobs_over_http(loop: Loop, measured: Progress) -> None:
    questions = [question.model_dump(mode="json") for question in loop.questions[:2]]
    profiled = loop.end_of(loop.job(kind="profile", questions=questions, models=sorted(MODELS)))
    assert (profiled["state"], profiled["result"]["done"]) == ("succeeded", 0)
    fitted = loop.end_of(loop.job(kind="fit", with_traffic=False))
    assert fitted["state"] == "succeeded", fitted["error"]
    promoted = loop.end_of(loop.job(kind="promote", force=True))
    assert promoted["state"] == "succeeded", promoted["error"]
    assert promoted["result"]["snapshot_id"] == fitted["result"]["snapshot_id"]
    loop.wait_for_policy(promoted["result"]["policy_version"])
    rolled_back = loop.end_of(loop.job(kind="rollback"))
    loop.wait_for_policy(rolled_back["result"]["policy_version"])
    assert loop.route()["path"] == "cold_start"


def test_a_planner_thinks_once_and_every_pair_runs_with_its_thought(
    loop: Loop, measured: Progress
) -> None:
    planner, asked = "scripted-echo", loop.questions[:2]
    pair = Pair(planner, "none")
    settings = ProfileSettings(models=frozenset({planner}), planner=planner)
    num_pairs = sum(known.model_id == planner for known in loop.config.all_pairs())

    def measure() -> Progress:
        return loop.run(lambda store: profile(loop.config, asked, store, settings))

    first, second = measure(), measure()
    assert (first.thoughts, first.failed) == (len(asked), 0)
    assert first.done == first.total == len(asked) * (2 * num_pairs + 1)
    assert (second.done, second.skipped) == (0, first.done)

    async def read(store: Store) -> tuple[dict[str, str | None], dict[str, str | None]]:
        thoughts = await read_thoughts(store, [question.key for question in asked])
        _, outcomes = await read_profile(store, loop.config.embedder.model)
        mark = fingerprint(loop.config, pair, planner)
        after = {
            o.question_key: o.answer for o in outcomes if (o.pair, o.fingerprint) == (pair, mark)
        }
        return {thought.question_key: thought.thought for thought in thoughts}, after

    thoughts, after = loop.run(read)
    for question in asked:
        planned = json.loads(thoughts[question.key] or "")  # it echoes what it was asked
        assert (planned["max_tokens"], planned["temperature"]) == (256, 0.0)
        assert planned["messages"][-1]["content"] == f"Question:\n{question.query}"
        (message,) = json.loads(after[question.key] or "")["messages"]
        assert message["content"] == with_note(thoughts[question.key] or "", question.query)


def test_a_profile_job_can_be_cancelled(loop: Loop, measured: Progress) -> None:
    questions = [question.model_dump(mode="json") for question in loop.questions]
    job_id = loop.job(kind="profile", questions=questions, models=sorted(MODELS), again=True)
    eventually(lambda: loop.look_up(job_id)["progress"].get("done") or None, 60)
    cancelled = httpx.delete(f"{loop.graph.url}/v1/admin/jobs/{job_id}", timeout=60).json()
    assert cancelled["state"] == "cancelled"

    async def count(store: Store) -> int:
        async with store.begin() as connection:
            return await connection.scalar(select(func.count()).select_from(ProfileOutcomeRow)) or 0

    time.sleep(2)
    settled = loop.run(count)
    time.sleep(2)
    assert loop.run(count) == settled
