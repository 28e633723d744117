"""A quarter of an hour of mixed traffic at 80% of what the graph can do: errors, and memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from benchmarks.client import Load, Measurement, run_load
from benchmarks.scale.requests import KINDS, Kind, endpoint_of, processes_of_the_cluster
from benchmarks.stats import Summary, merge, summarise

SHARE = 0.8
_BUSY_S = 20.0
_PROBE_S = 120.0
"""Of a rate that is tried: a machine is slower for minutes at times."""
_LOOK_S = 15.0
_MAX_IN_FLIGHT = 256

Advance = Callable[[str], None]


@dataclass(frozen=True)
class LoadTest:
    """What came of it."""

    sustainable_per_s: float
    """Requests of the mix in a second that the graph answered for two minutes without an error."""
    rate_per_s: float
    summary: Summary
    """Of all requests, latencies from when each was due."""
    memory_mb: list[tuple[float, float]]
    """Seconds since the start, and proportional set size of all processes of the cluster."""

    @property
    def growth(self) -> float:
        """Of the memory from the second to the last quarter of the time, as a share."""
        size = len(self.memory_mb)
        if size < 4:
            return 0.0
        quarters = (self.memory_mb[size // 4 : size // 2], self.memory_mb[-(size // 4) :])
        early, late = (sum(mb for _, mb in part) / len(part) for part in quarters)
        return late / early - 1


def run(advance: Advance, port: int, seconds: float) -> LoadTest:
    """Find out what the graph can do, then let traffic arrive at 80% of that."""
    return asyncio.run(_run(advance, port, seconds))


async def _run(advance: Advance, port: int, seconds: float) -> LoadTest:
    sustainable = await _sustainable_per_s(advance, port)
    rate = SHARE * sustainable
    advance(f"load: {rate:.0f} requests per second for {seconds:.0f} s")
    memory: list[tuple[float, float]] = []
    watch = asyncio.create_task(_watch(memory))
    whole = await _mixed(port, rate, seconds, 100)
    watch.cancel()
    return LoadTest(sustainable, rate, summarise(whole), memory)


async def _sustainable_per_s(advance: Advance, port: int) -> float:
    """The highest rate of a few that is answered without a refusal.

    Raises:
        RuntimeError: If even half of what busy connections get is not.
    """
    advance("load: what busy connections get")
    busy = await asyncio.gather(
        *(run_load(_closed(kind, port, number)) for number, kind in enumerate(KINDS))
    )
    most = sum(len(part.latencies_ms) / part.seconds for part in busy)
    for number, share in enumerate((0.9, 0.8, 0.7, 0.6, 0.5), start=1):
        advance(f"load: whether {share * most:.0f} requests per second are answered")
        probe = await _mixed(port, share * most, _PROBE_S, 10 * number)
        if not probe.errors:
            return share * most
    raise RuntimeError(f"{most / 2:.0f} requests per second are too many: {probe.error_sample}")


async def _mixed(port: int, rate: float, seconds: float, number: int) -> Measurement:
    """Requests of all kinds, as they fall due."""
    loads = [
        _open(kind, port, rate / len(KINDS), seconds, number + place)
        for place, kind in enumerate(KINDS)
    ]
    measured: list[Measurement] = await asyncio.gather(*map(run_load, loads))
    whole = merge(measured)
    whole.seconds = max(part.seconds for part in measured)
    return whole


async def _watch(memory: list[tuple[float, float]]) -> None:
    began_s = time.monotonic()
    while True:
        taken = await asyncio.to_thread(_memory_mb)
        memory.append((time.monotonic() - began_s, taken))
        await asyncio.sleep(_LOOK_S)


def _memory_mb() -> float:
    """Proportional set size of all processes of the cluster."""
    total = 0.0
    for pid in processes_of_the_cluster():
        try:
            total += psutil.Process(pid).memory_full_info().pss / 1e6
        except psutil.NoSuchProcess:  # one of the load's own, which has ended
            continue
    return total


def _closed(kind: Kind, port: int, number: int) -> Load:
    return _load(kind, port, number, mode="closed", concurrency=4, seconds=_BUSY_S)


def _open(kind: Kind, port: int, rate: float, seconds: float, number: int) -> Load:
    return _load(
        kind,
        port,
        number,
        mode="open",
        concurrency=_MAX_IN_FLIGHT,
        seconds=seconds,
        rate=rate,
    )


def _load(kind: Kind, port: int, number: int, **shape: object) -> Load:
    endpoint = endpoint_of(kind, port)
    return Load(
        host="127.0.0.1",
        port=port,
        path=endpoint.path,
        body=endpoint.body,
        stream=kind.phase.stream,
        profiled=kind.profiled,
        first_number=number * 1_000_000,
        **shape,  # type: ignore[arg-type]
    )
