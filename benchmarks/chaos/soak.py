"""Does what the graph holds stay flat under load: memory, descriptors, threads, tasks, objects."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import ray
from ray._private.internal_api import node_stats

from benchmarks.chaos.cluster import ChaosCluster
from benchmarks.chaos.load import Answer
from benchmarks.stats import Target

_EVERY_S = 5.0
_WARM_UP_SHARE = 0.3
"""Of the samples: caches fill, and allocators take what they will keep."""
TOLERANCE = {
    "memory_mb": (0.05, 8.0),
    "descriptors": (0.05, 4.0),
    "threads": (0.05, 4.0),
    "tasks": (0.05, 16.0),
    "objects": (0.05, 16.0),
}
"""Growth over the rest that counts as flat: a share of the mean, or so many, whichever is more."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at one process."""

    seconds: float
    """Since the soak began."""
    process: str
    memory_mb: float
    descriptors: float
    threads: float
    tasks: float
    """Ray tasks that it waits for; 0 for what is no Ray worker."""
    objects: float
    """Ray objects that it refers to."""


@dataclass(frozen=True, slots=True)
class Growth:
    """How one figure of one process went."""

    process: str
    what: str
    mean: float
    growth: float
    """By the fitted line, from the end of the warm-up to the last sample."""
    allowed: float

    @property
    def is_flat(self) -> bool:
        """Whether it stays within the tolerance."""
        return self.growth <= self.allowed


def growths(samples: Sequence[Sample]) -> list[Growth]:
    """The line through every figure of every process that was there all along."""
    if not samples:
        return []
    last_s = max(sample.seconds for sample in samples)
    from_s = _WARM_UP_SHARE * last_s
    found = []
    for process in sorted({sample.process for sample in samples}):
        own = [s for s in samples if s.process == process and s.seconds >= from_s]
        if len(own) < 3 or own[-1].seconds < last_s - 2 * _EVERY_S:
            continue
        seconds = np.array([sample.seconds for sample in own])
        for what, (share, floor) in TOLERANCE.items():
            values = np.array([getattr(sample, what) for sample in own])
            slope = float(np.polyfit(seconds, values, 1)[0])
            mean = float(values.mean())
            growth = slope * float(seconds[-1] - seconds[0])
            found.append(Growth(process, what, mean, growth, max(share * mean, floor)))
    return found


async def soak(names: dict[int, str], seconds: float) -> dict[str, Any]:
    """Watch for a while.

    Args:
        names: Names of the processes by their ids; they are under load.
        seconds: How long.

    Returns:
        The samples' growth per process, and what is not flat.
    """
    samples: list[Sample] = []
    began_s = time.monotonic()
    while (since_s := time.monotonic() - began_s) < seconds:
        samples += await asyncio.to_thread(_look, names, since_s)
        await asyncio.sleep(min(_EVERY_S, seconds / 20))
    found = growths(samples)
    return {
        "seconds": seconds,
        "processes": len(names),
        "looks": len({sample.seconds for sample in samples}),
        "growth": [
            {"process": g.process, "what": g.what, "mean": round(g.mean, 2),
             "growth": round(g.growth, 2), "allowed": round(g.allowed, 2)}
            for g in found
        ],
        "not_flat": [f"{g.process} {g.what}: +{g.growth:.1f}" for g in found if not g.is_flat],
        "total_memory_mb": _totals(samples),
    }  # fmt: skip


def soak_targets(soaked: dict[str, Any], answers: Sequence[Answer]) -> list[Target]:
    """Everything flat, and nothing failed."""
    return [
        Target("figures that are not flat", float(len(soaked["not_flat"])), "<=", 0.0),
        Target("failed requests", float(sum(answer.failed for answer in answers)), "<=", 0.0),
    ]


def watched(running: ChaosCluster) -> dict[int, str]:
    """What to watch of a cluster: every replica, Ray's own servers, the proxy."""
    names = {replica.pid: f"{replica.deployment} {replica.actor_name[-8:]}"
             for replica in running.replicas()}  # fmt: skip
    running.processes.look()
    for process in running.processes.alive():
        with contextlib.suppress(psutil.Error):
            title = (process.cmdline() or [""])[0]
            for mark in ("raylet", "gcs_server", "haproxy", "ray::ServeController",
                         "ray::HAProxyManager"):  # fmt: skip
                if title.endswith(mark) or title.startswith(mark):
                    names.setdefault(process.pid, f"{mark} {process.pid}")
    return names


def _look(names: dict[int, str], since_s: float) -> list[Sample]:
    workers: dict[int, tuple[float, float]] = {}
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], True)
        for worker in stats.core_workers_stats:
            workers[worker.pid] = (worker.num_pending_tasks, worker.num_object_refs_in_scope)
    samples = []
    for pid, name in names.items():
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            tasks, objects = workers.get(pid, (0, 0))
            with process.oneshot():
                samples.append(
                    Sample(
                        seconds=since_s,
                        process=name,
                        memory_mb=process.memory_info().rss / 2**20,
                        descriptors=process.num_fds(),
                        threads=process.num_threads(),
                        tasks=tasks,
                        objects=objects,
                    )
                )
    return samples


def _totals(samples: Sequence[Sample]) -> dict[str, float]:
    """Memory of all together, at the beginning and at the end."""
    times = sorted({sample.seconds for sample in samples})
    if not times:
        return {}
    by_time = {
        when: sum(sample.memory_mb for sample in samples if sample.seconds == when)
        for when in (times[0], times[-1])
    }
    return {"first": round(by_time[times[0]]), "last": round(by_time[times[-1]])}
