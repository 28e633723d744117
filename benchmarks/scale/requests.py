"""CPU seconds that one request takes of each process, by kind of request, on a running graph."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.engines import MODEL_ID
from benchmarks.ports import free_port
from benchmarks.serving import CLOSED_16, Bench, Endpoint, Phase, with_snapshot

_CONFIG = Path(__file__).parents[2] / "configs" / "bench" / "bench.yaml"
_CHAT = "/v1/chat/completions"
_SAMPLING = {"max_tokens": 16, "temperature": 0}
_STREAM_16 = Phase("stream_16", "closed", 16, stream=True)
_WARM_UP_S = 3.0
OTHERS = "others"
"""Ray's own processes and Serve's proxy and controller, together."""

Advance = Callable[[str], None]


@dataclass(frozen=True)
class Kind:
    """One kind of request."""

    name: str
    body: Mapping[str, Any]
    phase: Phase = CLOSED_16
    profiled: bool = False


KINDS = (
    Kind("named", {"model": MODEL_ID}),
    Kind("named, streamed", {"model": MODEL_ID}, _STREAM_16),
    Kind("routed, like the profile", {"model": "atlas"}, profiled=True),
    Kind("routed, unlike the profile", {"model": "atlas"}),
)


@dataclass(frozen=True)
class Cost:
    """What one kind of request costs."""

    cpu_ms: dict[str, float]
    """By deployment, and `OTHERS`: milliseconds of CPU for each request."""
    requests_per_s: float
    """With 16 connections."""
    memory_mb: dict[str, float]
    """By deployment: proportional set size afterwards."""


@contextmanager
def graph_of_instant_engines(advance: Advance) -> Iterator[int]:
    """The port of a graph whose engine answers at once, and whose router has a snapshot."""
    from serve_app.running import running_graph

    port = free_port()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ["ATLAS_DATA_DIR"] = str(folder)
        advance("a snapshot for the graph")
        config = with_snapshot(_CONFIG, folder)
        advance("the graph starts")
        graph = stack.enter_context(running_graph(config, port=port))
        for _ in graph.wait_for_pool():
            pass
        yield port


def endpoint_of(kind: Kind, port: int) -> Endpoint:
    """Where requests of a kind go."""
    body = {**kind.body, **_SAMPLING}
    return Endpoint(kind.name, port, _CHAT, body, profiled=kind.profiled)


def measured(advance: Advance, port: int, seconds: float) -> dict[str, Cost]:
    """What every kind of request costs on a running graph.

    Args:
        advance: Told what is measured.
        port: Of the graph.
        seconds: Of each kind.

    Raises:
        RuntimeError: If a request fails.
    """
    bench, costs = Bench(seconds, 1), {}
    for kind in KINDS:
        advance(kind.name)
        endpoint = endpoint_of(kind, port)
        bench.run_once(kind.phase, endpoint, _WARM_UP_S)
        costs[kind.name] = _cost(bench, kind.phase, endpoint, seconds)
    return costs


def _cost(bench: Bench, phase: Phase, endpoint: Endpoint, seconds: float) -> Cost:
    processes = processes_of_the_cluster()
    before = {pid: _cpu_s(pid) for pid in processes}
    measured = bench.run_once(phase, endpoint, seconds)
    if measured.errors or not measured.latencies_ms:
        raise RuntimeError(f"{endpoint.name}: {measured.error_sample}")
    cpu_ms: dict[str, float] = {}
    for pid, name in processes.items():
        took_s = max(0.0, _cpu_s(pid) - before[pid])
        cpu_ms[name] = cpu_ms.get(name, 0.0) + took_s / len(measured.latencies_ms) * 1e3
    memory: dict[str, float] = {}
    for pid, name in processes.items():
        if name != OTHERS:
            pss = psutil.Process(pid).memory_full_info().pss / 1e6
            memory[name] = memory.get(name, 0.0) + pss
    return Cost(cpu_ms, len(measured.latencies_ms) / measured.seconds, memory)


def processes_of_the_cluster() -> dict[int, str]:
    """The processes of the cluster by id: a replica by its deployment's name, the rest together."""
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None
    found = {child.pid: OTHERS for child in psutil.Process().children(recursive=True)}
    for application in client.get_serve_details()["applications"].values():
        for name, deployment in application["deployments"].items():
            kind = "model" if name.startswith(MODEL_ID) else name
            for replica in deployment["replicas"]:
                if replica.get("pid") is not None:
                    found[replica["pid"]] = kind
    return found


def _cpu_s(pid: int) -> float:
    """CPU seconds of a process so far; 0 once it is gone."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)
