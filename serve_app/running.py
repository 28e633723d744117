"""A running graph: starts Ray and Serve or joins a cluster, deploys, and takes down again."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import ray
from ray import serve
from ray.serve.deployment import Application
from ray.serve.exceptions import RayServeException

from serve_app.config import load_config
from serve_app.errors import ClusterDied, ConfigError, failure_reason
from serve_app.gateway.deployment import http_address
from serve_app.gateway.edge.hosts import AuthMode, require_loopback
from serve_app.graph import APP_NAME, BuildArgs, build_app
from serve_app.pool.applications import ongoing_requests, running_replicas, serve_details
from serve_app.pool.controller import PoolController
from serve_app.ray_cluster import ClusterRefused, connect
from serve_app.schemas import MemberState, PoolState
from serve_app.watchdog import watched

logger = logging.getLogger(__name__)

_LOOK_S = 1.0
"""How often the cluster's processes are looked at."""
_VITAL = ("raylet", "gcs_server")
_TAKE_DOWN_S = 12.0
"""How long Serve and Ray may take to end in order; then the watchdog ends their processes."""
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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

    def __init__(self, interrupted: threading.Event) -> None:
        """Watch a graph.

        Args:
            interrupted: Set once a signal has asked this process to end.
        """
        self._interrupted = interrupted

    def states(self) -> Iterator[PoolState]:
        """The pool's states, each as it comes, for as long as the graph runs.

        Raises:
            ClusterDied: If Ray's processes have ended.
            KeyboardInterrupt: If a signal has asked this process to end.
        """
        controller = deployment_handle(PoolController.__name__)
        version, response = -1, None
        while True:
            if self._interrupted.is_set():
                raise KeyboardInterrupt
            check_cluster()
            try:
                response = response or controller.state.remote(version)
                state: PoolState = response.result(timeout_s=_LOOK_S)
            except TimeoutError:
                continue
            except Exception as error:  # Serve may be starting the controller again
                logger.warning("the pool controller does not answer: %s", error)
                response = None
                time.sleep(_LOOK_S)
                continue
            response = None
            if state.pool_version != version:
                version = state.pool_version
                yield state

    def wait_for_pool(self) -> Iterator[PoolState]:
        """The pool's states, until no model is starting any more."""
        for state in self.states():
            yield state
            if all(member.state is not MemberState.STARTING for member in state.models):
                return


def check_cluster() -> None:
    """Check that the processes of a Ray cluster that this process started are alive.

    Raises:
        ClusterDied: If one has ended without which nothing works.
    """
    node = ray._private.worker._global_node
    if node is None or not node.head:  # no cluster, or one that another process started
        return
    dead = {kind for kind, _ in node.dead_processes()}
    if not _accepts_connections(node.gcs_address):  # the GCS is ending
        dead.add("gcs_server")
    for kind in _VITAL:
        if kind in dead:
            raise ClusterDied(
                f"Ray's process {kind!r} has ended, and with it the graph; start anew"
            )


def _accepts_connections(address: str) -> bool:
    """Whether a process listens at an address; a stuck process still does."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _LOOK_S).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        pass
    return True


def deployment_handle(name: str) -> Any:
    """Handle of a deployment of the graph, for a process that joined its cluster."""
    handle: Any = serve.get_deployment_handle(name, app_name=APP_NAME)
    if not handle.is_initialized:
        # Throughput mode would run its router in the caller's event loop, and here is none.
        handle._init(_run_router_in_separate_loop=True)
    return handle


def _join(address: str, **options: Any) -> None:
    """Start or join a cluster, without the lines it would print for its own developers."""
    connect(address, log_to_driver=False, logging_level=logging.WARNING, **options)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


@contextmanager
def joined(address: str) -> Iterator[None]:
    """Be a client of a cluster that serves.

    Raises:
        ConnectionError: If there is no such cluster, or nothing is served there.
    """
    nothing = ConnectionError(
        "nothing serves on a Ray cluster here; is `atlas serve` running? (--address names another)"
    )
    try:
        _join(address, namespace="serve")
    except ClusterRefused:
        raise
    except ConnectionError:
        raise nothing from None
    try:
        if APP_NAME not in serve.status().applications:
            raise nothing
        yield
    finally:
        ray.shutdown()


@contextmanager
def running_graph(
    config: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    address: str | None = None,
    tell: Callable[[str], None] = lambda what: None,
) -> Iterator[RunningGraph]:
    """Deploy a configuration; takes down on the way out what it started.

    Args:
        config: Configuration file.
        host: Address of the HTTP proxy.
        port: Port of the HTTP proxy.
        address: Ray cluster to join; `None` starts one in this process's session.
        tell: Told in a few words how far the start is.

    Raises:
        ConfigError: If the configuration cannot work, or asks for no key where other machines could
            connect.
        ClusterRefused: If the cluster cannot be joined.
    """
    auth_mode = load_config(config).gateway.auth.mode
    require_loopback(auth_mode, host)
    # A cluster of our own on one machine: a small object store, no dashboard, and its only node
    # counts as one for replicas.
    own = {
        "include_dashboard": False,
        "object_store_memory": 256 << 20,
        "resources": {"cpu_node": 1},
    }
    with ExitStack() as stack:
        if address is None:  # on another cluster nothing is ours to end
            stack.enter_context(watched())
        interrupted = stack.enter_context(_signals_interrupt())
        # `local`: a cluster that happens to run here already is not ours to take.
        _join(address or "local", **(own if address is None else {}))
        if address is not None:
            _check_running_serve(auth_mode)
        stack.callback(_take_down)
        _set_signals(interrupted)  # Ray has set its own handler, which aborts
        tell("Ray is up; the graph waits for Serve")
        serve.start(http_options={"host": host, "port": port})
        with _watched_start(tell):
            _deploy(build_app(BuildArgs(config=str(config))))
        yield RunningGraph(interrupted)


def _check_running_serve(mode: AuthMode) -> None:
    """Leave a cluster at once whose Serve listens where a deployment without keys must not.

    Where Serve runs already it keeps its address, whatever is asked for here.

    Raises:
        ConfigError: If it does.
    """
    try:
        host, _ = http_address()
    except RayServeException:  # no Serve runs there yet
        return
    try:
        require_loopback(mode, host)
    except ConfigError:
        ray.shutdown()
        raise


@contextmanager
def _signals_interrupt() -> Iterator[threading.Event]:
    """Have what ends a process by default interrupt it in this block, as Ctrl-C does.

    The event is set too: an exception raised in a callback of native code is lost there.
    """
    interrupted = threading.Event()
    before = {number: signal.getsignal(number) for number in _ENDING_SIGNALS}
    _set_signals(interrupted)
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _set_signals(interrupted: threading.Event) -> None:
    def interrupt(number: int, frame: object) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    for number in _ENDING_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` has it
            signal.signal(number, interrupt)


def _take_down() -> None:
    """End Serve and leave the cluster; gives up where their processes do not answer any more."""

    def end() -> None:
        try:
            serve.shutdown()
        except Exception as error:
            logger.warning("Serve did not end in order: %s", error)
        ray.shutdown()

    ends_s = time.monotonic() + _TAKE_DOWN_S
    try:
        check_cluster()
        ending = threading.Thread(target=end, daemon=True)
        ending.start()
        while ending.is_alive():
            # A signal to the whole process group ends Ray's processes too.
            check_cluster()
            if time.monotonic() > ends_s:
                logger.warning("Ray did not end in order within %g s", _TAKE_DOWN_S)
                return
            ending.join(_LOOK_S / 4)
    except ClusterDied as error:
        logger.info("nothing is left to end in order: %s", error.message)


def end_process(code: int) -> NoReturn:
    """End this process after its graph, without Ray's own exit handler and without its threads.

    Both may still wait for a cluster that does not answer, or is gone. Every other exit handler
    runs.

    Args:
        code: Exit code of the process.
    """
    atexit.unregister(ray.shutdown)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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


@contextmanager
def _watched_start(tell: Callable[[str], None]) -> Iterator[None]:
    """Tell which deployments of the graph are not up yet, each time that this changes."""
    over = threading.Event()

    def watch() -> None:
        told: list[str] = []
        while not over.wait(_LOOK_S):
            try:
                application = serve.status().applications.get(APP_NAME)
            except Exception as error:  # what is told is not worth a start
                logger.info("the start cannot be watched: %r", error)
                return
            parts = application.deployments if application else {}
            waiting = sorted(name for name, part in parts.items() if part.status != "HEALTHY")
            if waiting and waiting != told:
                tell(f"the graph waits for {', '.join(waiting)}")
                told = waiting

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join(_LOOK_S)  # it may wait for a cluster that does not answer


def cluster_status(address: str) -> tuple[list[DeploymentRow], PoolState | None]:
    """What runs on a cluster.

    Raises:
        ConnectionError: If there is no such cluster.
    """
    with joined(address):
        rows = []
        for app_name, application in serve_details()["applications"].items():
            for name, deployment in application["deployments"].items():
                actors = running_replicas(deployment)
                ongoing = ongoing_requests(actors)
                rows.append(
                    DeploymentRow(app_name, name, deployment["status"], len(actors), ongoing)
                )
        try:
            pool = deployment_handle(PoolController.__name__).state.remote().result(timeout_s=10)
        except Exception:  # a status page shows what it can
            pool = None
        return rows, pool
