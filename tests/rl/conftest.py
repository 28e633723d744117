"""What the tests of training share: a Ray cluster of two CPUs, and a profile in a store."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import ray

from serve_app.config import AtlasConfig
from serve_app.store import Store
from tests.profile_data import fill, make_config


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """The session's cluster if it runs, else one of two CPUs."""
    if ray.is_initialized():
        yield
        return
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AtlasConfig:
    """A deployment of two pairs; see `profile_data`."""
    monkeypatch.delenv("ATLAS_DATA_DIR", raising=False)
    return make_config(tmp_path)


@pytest.fixture
async def store(config: AtlasConfig) -> AsyncIterator[Store]:
    """Its store, with the profile in it."""
    opened = await Store.open(config.store_url())
    await fill(config, opened)
    yield opened
    await opened.close()
