"""From the outcomes in the store to a snapshot with a policy: by call, and as a job."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import ray

from rl.ppo.config import parse_train_config
from rl.ppo.loop import TrainProgress
from rl.publish import NEWEST, fit_snapshot, resolve
from rl.training import train
from serve_app.config import AtlasConfig
from serve_app.errors import NotFound
from serve_app.jobs import Jobs, RayLauncher, TrainJob
from serve_app.router.rules.policy_rule import LearnedRule
from serve_app.router.snapshots.library import SnapshotLibrary
from serve_app.schemas import DecidedBy, Limits
from serve_app.store import Store, serving_policies
from tests.profile_data import DIM, POEMS, SUMS
from tests.rl.training_data import SETTINGS
from tests.router_data import QUICK, decide

pytestmark = pytest.mark.usefixtures("cluster")


async def test_training_keeps_a_snapshot_that_decides_and_does_not_serve(
    config: AtlasConfig, store: Store
) -> None:
    base_id, _ = await fit_snapshot(config, store, QUICK)
    told: list[TrainProgress] = []
    trained = await train(config, store, parse_train_config(SETTINGS), told.append)
    assert await resolve(store, NEWEST) == trained.snapshot_id
    assert await serving_policies(store) == []
    assert (told[0].phase, told[-1].phase) == ("reading", "evaluating")

    snapshot = SnapshotLibrary(config.snapshots_path()).load(trained.snapshot_id, policy_version=1)
    about = snapshot.metadata
    assert (about["kind"], about["base"], about["train_seed"]) == ("ppo", base_id, 0)
    assert about["num_queries"] == 60
    rule = LearnedRule(snapshot)
    vector = np.eye(DIM, dtype=np.float32)[0]
    decision = decide(rule, vector, Limits(alpha=0.0, deadline_s=60), (SUMS, POEMS), 1)
    assert decision.path in {DecidedBy.CLUSTERS, DecidedBy.POLICY}

    assert trained.report is not None
    folder = trained.result.folder
    assert (folder / "report" / "report.json").exists()
    assert (folder / "snapshot_id").read_text() == trained.snapshot_id
    assert folder.parent == config.data_path() / "training"


async def test_the_same_call_goes_on_until_its_snapshot_is_kept(
    config: AtlasConfig, store: Store
) -> None:
    await fit_snapshot(config, store, QUICK)
    settings = parse_train_config(SETTINGS | {"iterations": 2})
    first = await train(config, store, settings)
    (first.result.folder / "snapshot_id").unlink()  # as if it had been killed just before
    told: list[TrainProgress] = []
    second = await train(config, store, settings, told.append)
    assert second.result.folder == first.result.folder
    assert [progress.phase for progress in told] == ["reading", "evaluating"]
    told.clear()
    work = asyncio.ensure_future(train(config, store, settings, told.append))
    assert await eventually(lambda: any(progress.done for progress in told))
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    runs = {path.name[-2:] for path in (config.data_path() / "training").iterdir()}
    assert runs == {"-1", "-2"}


async def test_without_a_fitted_snapshot_there_is_nothing_to_build_on(
    config: AtlasConfig, store: Store
) -> None:
    with pytest.raises(NotFound, match="atlas fit"):
        await train(config, store, parse_train_config(SETTINGS))
    with pytest.raises(NotFound, match="atlas fit"):
        await train(config, store, parse_train_config(SETTINGS | {"base": "serving"}))


async def test_a_cancelled_call_leaves_a_checkpoint(config: AtlasConfig, store: Store) -> None:
    await fit_snapshot(config, store, QUICK)
    under_way = asyncio.Event()
    loop = asyncio.get_running_loop()

    def tell(progress: TrainProgress) -> None:
        if progress.phase == "training":
            loop.call_soon_threadsafe(under_way.set)

    endless = parse_train_config(SETTINGS | {"iterations": 100_000})
    work = asyncio.ensure_future(train(config, store, endless, tell))
    await under_way.wait()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    (run,) = (config.data_path() / "training").iterdir()
    assert list((run / "checkpoints").iterdir())


async def eventually(claim: Callable[[], Any], within_s: float = 120) -> bool:
    ends_s = time.monotonic() + within_s
    while time.monotonic() < ends_s:
        found = claim()
        if await found if asyncio.iscoroutine(found) else found:
            return True
        await asyncio.sleep(0.2)
    return False


async def test_a_job_trains_on_the_cluster_and_cancelled_frees_what_it_held(
    config: AtlasConfig, store: Store
) -> None:
    def free_cpus() -> float:
        return float(ray.available_resources().get("CPU", 0.0))

    before = free_cpus()
    if before != 2:
        pytest.skip("the session's cluster has data and work of its own")
    await fit_snapshot(config, store, QUICK)
    jobs = Jobs(config, store, RayLauncher())
    spread = SETTINGS | {"iterations": 100_000, "num_env_runners": 1}
    job = await jobs.submit(TrainJob(kind="train", settings=spread), "me")

    async def is_under_way() -> bool:
        now = await jobs.get(job.job_id)
        assert now.state in {"queued", "running"}, now.error
        return now.progress.get("phase") == "training"

    assert await eventually(is_under_way)
    assert free_cpus() == 1
    assert (await jobs.cancel(job.job_id)).state == "cancelled"
    assert await eventually(lambda: free_cpus() == 2, 30)
    assert not RayLauncher().is_running(job.job_id)
