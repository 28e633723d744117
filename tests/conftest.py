"""One Ray cluster, one graph and one set of engines for the whole session; started by the first
test that asks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import openai
import pytest
import yaml

from benchmarks.ports import free_port
from serve_app.schemas import PoolState
from tests.haproxy import own_ports

os.environ.update(own_ports())

# The same examples each time, and no clock: a slow machine is no failure.
hypothesis.settings.register_profile(
    "any machine",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("any machine")

STARTS_RAY = {"graph", "ray_session", "cluster"}
"""Fixtures that start Ray."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as serial what starts Ray by a fixture, or says that it needs the graph."""
    for item in items:
        fixtures: list[str] = getattr(item, "fixturenames", [])
        if item.get_closest_marker("serve") or not STARTS_RAY.isdisjoint(fixtures):
            item.add_marker(pytest.mark.serial)


@pytest.fixture(autouse=True)
def _only_serial_tests_start_ray(request: pytest.FixtureRequest) -> Iterator[None]:
    """Two clusters at once would be too much for a small machine."""
    before = _ray_runs()
    yield
    if request.node.get_closest_marker("serial") is None:
        assert _ray_runs() == before, "a test that starts Ray needs the marker `serial`"


def _ray_runs() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


BEHAVIOURS = ("echo", "fail", "refuse", "hang", "break", "drip", "loop", "bad_call")


@dataclass(frozen=True)
class Graph:
    """The running graph as a client sees it."""

    url: str
    config: Path
    pool: PoolState
    """The pool when no model was starting any more."""

    def client(self, api_key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=120)


def graph_config(port: int) -> dict[str, Any]:
    """The shipped nano configuration, with scripted engines, a remote model and a broken one beside
    it."""
    config: dict[str, Any] = yaml.safe_load(
        Path("configs/nano.yaml").read_text().replace("./", f"{Path.cwd()}/configs/")
    )
    del config["router"]["snapshot"]  # tests of the learning loop promote their own
    del config["rules"]  # most questions of the tests are outside what the pool knows
    next(t for t in config["tools"] if t["tool_id"] == "calculator")["exposed"] = True
    facts = next(m for m in config["models"] if m["model_id"] == "nano-facts")
    facts["tools"] = [*facts["tools"], "ocr"]
    config["tools"].append({"type": "ocr", "tool_id": "ocr"})
    # Models that always fail are asked again and again.
    config["gateway"] = {**config.get("gateway", {}), "breaker_failures": 1_000_000}
    config["pool"] = {**config.get("pool", {}), "allow_custom_models": True}
    for behaviour in BEHAVIOURS:
        config["models"].append(
            {
                "type": "custom",
                "model_id": f"scripted-{behaviour}",
                "import_path": "tests.fakes:ScriptedModel",
                "settings": {"behaviour": behaviour},
                "num_cpus": 0,
                "tools": ["none", "calculator", "best_of"],
                "price": {"usd_per_1m_prompt_tokens": 1000, "usd_per_1m_completion_tokens": 1000},
                "card": {"examples": [f"zzz scripted {behaviour} zzz"]},
            }
        )
    config["models"].append(
        {
            "type": "remote",
            "model_id": "remote-math",
            "base_url": f"http://127.0.0.1:{port}/v1",
            "remote_model": "nano-math@calculator",
            "health_path": None,
            "card": {"examples": ["zzz remote zzz"]},
        }
    )
    config["models"].append(
        {
            "type": "custom",
            "model_id": "broken",
            "import_path": "tests.fakes:NeedsFile",
            "settings": {"path": "/nonexistent/weights"},
            "num_cpus": 0,
            "card": {"examples": ["zzz broken zzz"]},
        }
    )
    return config


@pytest.fixture(scope="session")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graph]:
    """The graph with every engine up; about two minutes on two idle cores."""
    from serve_app.running import running_graph

    folder = tmp_path_factory.mktemp("graph")
    port = free_port()
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(graph_config(port)))
    os.environ["ATLAS_DATA_DIR"] = str(folder / "data")
    os.environ.update(own_ports())  # another graph may run on this machine
    try:
        with running_graph(path, port=port) as running:
            *_, pool = running.wait_for_pool()
            yield Graph(f"http://127.0.0.1:{port}", path, pool)
    finally:
        del os.environ["ATLAS_DATA_DIR"]


@pytest.fixture(scope="session")
def ray_session(graph: Graph) -> Graph:
    """The session's Ray cluster; the graph's."""
    return graph
