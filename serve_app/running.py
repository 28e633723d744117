"""A running graph: starts Ray and Serve or joins a cluster, deploys, and takes down again."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.deployment import Application

from serve_app.errors import ConfigError
from serve_app.gateway.proxy import CALLBACK, CALLBACK_VARIABLE
from serve_app.graph import APP_NAME, BuildArgs, build_app
from serve_app.models.controller import PoolController, failure_reason
from serve_app.schemas import MemberState, PoolState

_POLL_S = 0.5


@dataclass(frozen=True)
class DeploymentRow:
    """One deployment and what it is doing."""

    application: str
    deployment: str
    status: str
    replicas: int
    ongoing_requests: int


class RunningGraph:
    """The graph while it runs."""

    def wait_for_pool(self) -> Iterator[PoolState]:
        """The pool's states, until no model is starting any more."""
        controller = pool_controller()
        version = -1
        while True:
            state: PoolState = controller.state.remote(version).result(timeout_s=60)
            version = state.pool_version
            yield state
            if all(member.state is not MemberState.STARTING for member in state.models):
                return

    def wait(self) -> None:
        """Return when interrupted."""
        while True:
            time.sleep(3600)


def pool_controller() -> Any:
    """Handle of the pool controller."""
    return serve.get_deployment_handle(PoolController.__name__, app_name=APP_NAME)


@contextmanager
def running_graph(
    config: Path, *, host: str = "127.0.0.1", port: int = 8000, address: str | None = None
) -> Iterator[RunningGraph]:
    """Deploy a configuration; takes down on the way out what it started.

    Args:
        config: Configuration file.
        host: Address of the HTTP proxy.
        port: Port of the HTTP proxy.
        address: Ray cluster to join; `None` starts one in this process's session.
    """
    # A cluster of our own on a laptop: a small object store, no telemetry, no dashboard.
    own = {"include_dashboard": False, "object_store_memory": 256 << 20} if address is None else {}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray makes its workers 15 nicer than everything else: beside any other work on the machine,
    # replicas then do not even start in time.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # And it ends idle workers after a second where there are more than CPUs: the tools' workers
    # would start anew for every call, each with what it has to load.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")
    os.environ[CALLBACK_VARIABLE] = CALLBACK
    ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **own)
    try:
        serve.start(http_options={"host": host, "port": port})
        _deploy(build_app(BuildArgs(config=str(config))))
        yield RunningGraph()
    finally:
        serve.shutdown()
        ray.shutdown()


def _deploy(application: Application) -> None:
    """Run the application; what keeps a deployment from starting is said in one line.

    Raises:
        ConfigError: If a deployment does not start.
    """
    try:
        serve.run(application, name=APP_NAME, route_prefix="/")
    except RuntimeError as error:
        deployments = serve.status().applications[APP_NAME].deployments
        reasons = [
            f"{name}: {failure_reason(d.message)}"
            for name, d in deployments.items()
            if d.status != "HEALTHY"
        ]
        raise ConfigError("the graph did not start; " + "; ".join(reasons)) from error


def cluster_status(address: str) -> tuple[list[DeploymentRow], PoolState | None]:
    """What runs on a cluster.

    Raises:
        ConnectionError: If there is no such cluster.
    """
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace="serve")
    try:
        rows = []
        details = serve.context._get_global_client().get_serve_details()
        for app_name, application in details["applications"].items():
            for name, deployment in application["deployments"].items():
                actors = [
                    replica["actor_name"]
                    for replica in deployment["replicas"]
                    if replica["state"] == "RUNNING"
                ]
                rows.append(
                    DeploymentRow(
                        app_name, name, deployment["status"], len(actors), _ongoing(actors)
                    )
                )
        try:
            pool = pool_controller().state.remote().result(timeout_s=10)
        except Exception:  # a status page shows what it can
            pool = None
        return rows, pool
    finally:
        ray.shutdown()


def _ongoing(actor_names: list[str]) -> int:
    """Requests the replicas are working on."""
    calls = [
        ray.get_actor(name, namespace="serve").get_num_ongoing_requests.remote()
        for name in actor_names
    ]
    done, _ = ray.wait(calls, num_returns=len(calls), timeout=5) if calls else ([], [])
    return sum(ray.get(done))
