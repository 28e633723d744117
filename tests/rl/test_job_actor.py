"""The actor of a job, on a real Ray: it is gone when the job is over, however that came about."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from serve_app.config import AtlasConfig
from serve_app.jobs import RayLauncher
from serve_app.store import Store, add_job, get_job
from tests.profile_data import make_config

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture
def config(tmp_path: Path) -> AtlasConfig:
    """A deployment whose store has one place, whatever data folder a worker's environment names."""
    return make_config(tmp_path, store={"url": f"sqlite+aiosqlite:///{tmp_path}/atlas.db"})


def until_gone(launcher: RayLauncher, job_id: str) -> None:
    ends_s = time.monotonic() + 120
    while launcher.is_running(job_id):
        assert time.monotonic() < ends_s, "the actor is still there"
        time.sleep(0.1)


def test_a_store_that_is_away_leaves_no_actor(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    away = make_config(tmp_path, store={"url": f"sqlite+aiosqlite:///{tmp_path}/file/atlas.db"})
    launcher = RayLauncher()
    launcher.start(away, "job_away")
    assert launcher.is_running("job_away")
    until_gone(launcher, "job_away")


async def test_a_job_that_fails_says_why_and_leaves_no_actor(
    config: AtlasConfig, store: Store
) -> None:
    settings = {"kind": "rollback", "expect_version": None}
    await add_job(store, "job_1", "rollback", settings, "me")
    launcher = RayLauncher()
    launcher.start(config, "job_1")
    until_gone(launcher, "job_1")
    job = await get_job(store, "job_1")
    assert (job.state, job.error) == ("failed", "nothing was ever promoted")
