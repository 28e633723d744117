"""Training on a pool: by the call that also replays, within its caps, and taken up again without
paying twice; only the pool is scripted."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rl.ppo.config import TrainConfig, parse_train_config
from rl.ppo.loop import TrainProgress
from rl.ppo.run_folder import RESULT_FILE
from rl.publish import NEWEST, fit_snapshot, resolve
from rl.training import PUBLISHED_FILE, train
from serve_app.config import AtlasConfig
from serve_app.errors import AtlasError, ConfigError, InvalidRequest, NoCandidate, TrainingStopped
from serve_app.jobs import TrainJob
from serve_app.questions import Question
from serve_app.router.snapshots.library import SnapshotLibrary
from serve_app.router.snapshots.snapshot import THINKS
from serve_app.schemas import ChatCall, DecidedBy, Decision, Pair, Report, Step, Usage
from serve_app.store import Store, serving_policies
from tests.profile_data import COST_USD, POEMS, SUMS
from tests.rl.training_data import SETTINGS
from tests.router_data import QUICK

pytestmark = pytest.mark.usefixtures("cluster")

QUESTIONS = tuple(
    Question(id=f"q{number}", query=f"query {number}", gold="yes", metric="exact")
    for number in range(80)
)
LIVE: dict[str, Any] = SETTINGS | {"live": {"max_cost_usd": 1.0}, "iterations": 2}


class ScriptedPool:
    """Sums are right on even questions, poems on odd ones, as in the profile."""

    def __init__(self, ready: tuple[Pair, ...] = (SUMS, POEMS)) -> None:
        self.ready = ready
        self.calls: list[ChatCall] = []
        self.is_away = False

    async def ready_pairs(self) -> tuple[Pair, ...]:
        return self.ready

    async def run(self, call: ChatCall) -> tuple[Report, AtlasError | None]:
        if self.is_away:
            raise NoCandidate("not ready")
        self.calls.append(call)
        pair = Pair.parse(call.model)
        right = int(call.query.split()[1]) % 2 == (SUMS, POEMS).index(pair)
        usage = Usage(10, 5, COST_USD)
        step = Step(pair, DecidedBy.PINNED, 1.0, usage, 0.1, answer="yes" if right else "no")
        decision = Decision((), DecidedBy.PINNED, 1.0, 1.0, 0, 1)
        return Report(call.request_id, decision, (step,), usage, 0.1, call.query, None), None


def settings(**changes: Any) -> TrainConfig:
    return parse_train_config(LIVE | changes)


async def test_a_live_run_trains_and_tells_what_it_spent(config: AtlasConfig, store: Store) -> None:
    base_id, _ = await fit_snapshot(config, store, QUICK)
    pool, told = ScriptedPool(), list[TrainProgress]()
    trained = await train(config, store, settings(), told.append, questions=QUESTIONS, pool=pool)
    spent = trained.result.spent
    assert spent is not None
    assert spent.requests == len(pool.calls) > 0
    assert spent.usd == pytest.approx(COST_USD * len(pool.calls))
    # As large as the batch would let it be, but for what was asked before.
    assert len(pool.calls) == len({(call.model, call.query) for call in pool.calls}) <= 120
    assert [p.spent_usd for p in told if p.phase == "training"][-1] == pytest.approx(spent.usd)
    assert trained.to_json()["spent"]["usd"] == spent.usd
    assert (trained.result.iterations, trained.result.stopped) == (2, None)

    assert await resolve(store, NEWEST) == trained.snapshot_id != base_id
    assert await serving_policies(store) == []
    about = SnapshotLibrary(config.snapshots_path()).load(trained.snapshot_id, 1).metadata
    assert (about["base"], about[THINKS]) == (base_id, 0)
    assert about["spent_usd"] == pytest.approx(spent.usd)


async def test_only_training_questions_are_asked_and_none_of_those_apart(
    config: AtlasConfig, store: Store
) -> None:
    await fit_snapshot(config, store, QUICK)
    pool = ScriptedPool()
    await train(config, store, settings(iterations=1), questions=QUESTIONS, pool=pool)
    asked = {int(call.query.split()[1]) for call in pool.calls}
    assert all(number % 8 < 6 for number in asked)
    assert len(asked) < 60


async def test_at_its_cap_it_keeps_what_it_learned_and_says_so(
    config: AtlasConfig, store: Store
) -> None:
    await fit_snapshot(config, store, QUICK)
    first = ScriptedPool()
    probe = await train(config, store, settings(iterations=1), questions=QUESTIONS, pool=first)
    assert probe.result.spent is not None
    # Room for the first iteration, and a little of the second.
    cap = probe.result.spent.usd + 1.5 * COST_USD
    pool = ScriptedPool()
    capped = settings(iterations=50, seed=0, live={"max_cost_usd": cap})
    trained = await train(config, store, capped, questions=QUESTIONS, pool=pool)
    result = trained.result
    assert result.stopped is not None
    assert "USD" in result.stopped
    assert 1 <= result.iterations < 50
    assert COST_USD * len(pool.calls) <= cap
    assert result.best_utility >= result.start.utility
    assert await resolve(store, NEWEST) == trained.snapshot_id
    kept = json.loads((result.folder / RESULT_FILE).read_text())
    assert (kept["stopped"], kept["spent"]["requests"]) == (result.stopped, len(pool.calls))


async def test_a_cap_before_anything_is_learned_publishes_nothing_and_a_higher_one_goes_on(
    config: AtlasConfig, store: Store
) -> None:
    base_id, _ = await fit_snapshot(config, store, QUICK)
    pool = ScriptedPool()
    with pytest.raises(TrainingStopped, match="nothing was learned"):
        await train(
            config,
            store,
            settings(live={"max_cost_usd": 3.5 * COST_USD}),
            questions=QUESTIONS,
            pool=pool,
        )
    assert len(pool.calls) == 3
    assert await resolve(store, NEWEST) == base_id
    (run,) = (config.data_path() / "training").iterdir()
    assert not (run / PUBLISHED_FILE).exists()

    trained = await train(config, store, settings(), questions=QUESTIONS, pool=pool)
    assert trained.result.folder == run
    assert len(pool.calls) == len({(call.model, call.query) for call in pool.calls})


class _Killed(Exception):
    pass


async def test_a_run_that_was_killed_goes_on_without_paying_again(
    config: AtlasConfig, store: Store
) -> None:
    await fit_snapshot(config, store, QUICK)
    pool = ScriptedPool()
    whole = await train(config, store, settings(iterations=3), questions=QUESTIONS, pool=pool)
    (whole.result.folder / PUBLISHED_FILE).unlink()
    whole.result.folder.rename(whole.result.folder.with_name("whole"))

    def die(progress: TrainProgress) -> None:
        if progress.done == 2:
            raise _Killed

    again, three = ScriptedPool(), settings(iterations=3)
    with pytest.raises(_Killed):
        await train(config, store, three, die, questions=QUESTIONS, pool=again)
    resumed = await train(config, store, three, questions=QUESTIONS, pool=again)
    assert len(again.calls) == len({(call.model, call.query) for call in again.calls})
    assert resumed.result.spent is not None
    assert resumed.result.spent.requests == len(again.calls) == len(pool.calls)
    assert [row["mean_return"] for row in resumed.result.curve] == pytest.approx(
        [row["mean_return"] for row in whole.result.curve], abs=1e-5
    )


async def test_a_pool_that_goes_away_ends_the_run_and_publishes_nothing(
    config: AtlasConfig, store: Store
) -> None:
    base_id, _ = await fit_snapshot(config, store, QUICK)
    pool = ScriptedPool()
    pool.is_away = True
    with pytest.raises(TrainingStopped, match="pool is away"):
        await train(config, store, settings(), questions=QUESTIONS, pool=pool)
    assert await resolve(store, NEWEST) == base_id


@pytest.mark.parametrize(
    ("questions", "ready", "said"),
    [
        ((), (SUMS, POEMS), "labelled questions"),
        (QUESTIONS, (), "ready"),
        ((Question(id="x", query="?", gold="y", metric="judge"),), (SUMS, POEMS), "live.judge"),
        ((Question(id="x", query="?", gold="y", metric="exact"),), (SUMS, POEMS), "same file"),
    ],
)
async def test_what_a_live_run_lacks_is_said_before_anything_is_bought(
    config: AtlasConfig,
    store: Store,
    questions: tuple[Question, ...],
    ready: tuple[Pair, ...],
    said: str,
) -> None:
    await fit_snapshot(config, store, QUICK)
    pool = ScriptedPool(ready)
    with pytest.raises(ConfigError, match=said):
        await train(config, store, settings(), questions=questions, pool=pool)
    assert pool.calls == []


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({"settings": LIVE}, "questions"),
        ({"settings": LIVE, "questions": [{"id": "x"}]}, "questions[0].query"),
        ({"settings": LIVE | {"live": {}}}, "settings"),
    ],
)
def test_a_job_says_what_a_live_run_lacks_when_it_is_sent(
    request_: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        TrainJob(kind="train", **request_).check_settings()
    assert refused.value.param == field
