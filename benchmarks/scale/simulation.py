"""How many replicas some traffic needs, by a simulation on measured service times.

Requests arrive at random (Poisson). Each passes the gateway, the router and, where a first look is
not enough, the embedder; an engine is not part of it. A replica is one core that works on one
request at a time, in the order of arrival; a request goes to the shorter queue of two that are
drawn (as Serve does; Mitzenmacher, 2001). Batching is left out, so the figures are on the safe
side. Autoscaling follows Serve: the wanted number is the requests in progress over the target, once
that has been above the number there is for `upscale_delay_s`, and a replica serves after its start.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil

UTILISATION = 0.6
"""Of a replica's core, that the number of replicas is chosen for."""
_LOOK_S = 1.0


@dataclass(frozen=True)
class Traffic:
    """What arrives."""

    requests_per_s: float
    service_s: Mapping[str, float]
    """By stage: mean seconds of a core for a request that passes it."""
    shares: Mapping[str, float]
    """By stage: the share of the requests that pass it."""


@dataclass(frozen=True)
class Autoscaling:
    """When replicas are added."""

    target_ongoing_requests: float = 16.0
    upscale_delay_s: float = 10.0
    start_s: float = 10.0
    """From the decision until the replica serves."""
    max_replicas: int = 10_000


@dataclass
class Latencies:
    """Seconds that requests took outside the engine, by when they arrived."""

    arrived_s: list[float] = field(default_factory=list)
    took_s: list[float] = field(default_factory=list)

    def quantile_ms(self, share: float, since_s: float = 0.0, until_s: float = 1e18) -> float:
        """A quantile of the requests that arrived in an interval, in milliseconds."""
        pairs = zip(self.arrived_s, self.took_s, strict=True)
        part = sorted(took for arrived, took in pairs if since_s <= arrived < until_s)
        return part[min(len(part) - 1, int(share * len(part)))] * 1e3 if part else 0.0


def replicas_for(traffic: Traffic, utilisation: float = UTILISATION) -> dict[str, int]:
    """Replicas of each stage that keep their cores at a utilisation."""
    return {
        stage: max(1, ceil(traffic.requests_per_s * traffic.shares[stage] * seconds / utilisation))
        for stage, seconds in traffic.service_s.items()
    }


@dataclass(slots=True)
class _Replica:
    free_s: float = 0.0
    """When it has done all that it has to do."""
    waiting: int = 0
    """Requests that it has to do."""


class _Stage:
    """The replicas of one stage."""

    def __init__(self, number: int) -> None:
        self.replicas = [_Replica() for _ in range(number)]
        self.coming = 0
        """Replicas that start."""
        self.above_since_s: float | None = None

    def lose(self, share: float) -> int:
        """Take replicas away, never all; returns how many. What they have in hand they still do."""
        number = min(len(self.replicas) - 1, max(1, round(share * len(self.replicas))))
        del self.replicas[len(self.replicas) - number :]
        return number


@dataclass(frozen=True)
class Change:
    """What happens while traffic arrives."""

    at_s: float
    rate_factor: float = 1.0
    """Of the rate from then on."""
    lost_share: float = 0.0
    """Of each stage's replicas, with the node that had them; they start again elsewhere."""


class _Run:
    """One simulation while it runs. What is to happen lies in a heap, by time."""

    def __init__(
        self,
        traffic: Traffic,
        replicas: Mapping[str, int],
        seconds: float,
        scaling: Autoscaling,
        seed: int,
    ) -> None:
        self._traffic, self._seconds, self._scaling = traffic, seconds, scaling
        self._random = random.Random(seed)
        self._route = [(name, _Stage(replicas[name])) for name in traffic.service_s]
        self._rate = traffic.requests_per_s
        self._due: list[tuple[float, int, Callable[[float], None]]] = []
        self._number = 0
        self.latencies = Latencies()

    def at(self, when_s: float, what: Callable[[float], None]) -> None:
        """Have something happen; it is told the time."""
        self._number += 1  # for a stable order
        heapq.heappush(self._due, (when_s, self._number, what))

    def run(self) -> dict[str, int]:
        """Until everything is served; the replicas of each stage at the end."""
        self.at(self._random.expovariate(self._rate), self._arrives)
        while self._due:
            now_s, _, what = heapq.heappop(self._due)
            what(now_s)
        return {name: len(stage.replicas) for name, stage in self._route}

    def _arrives(self, now_s: float) -> None:
        if now_s < self._seconds:
            self.at(now_s + self._random.expovariate(self._rate), self._arrives)
            self._enters(now_s, 0, now_s)

    def _enters(self, now_s: float, place: int, arrived_s: float) -> None:
        """A request comes to a stage, and goes on to the next where it does not pass this one."""
        shares = self._traffic.shares
        while place < len(self._route) and self._random.random() >= shares[self._route[place][0]]:
            place += 1
        if place == len(self._route):
            self.latencies.arrived_s.append(arrived_s)
            self.latencies.took_s.append(now_s - arrived_s)
            return
        name, stage = self._route[place]
        one, other = (self._random.choice(stage.replicas) for _ in range(2))
        replica = one if one.waiting <= other.waiting else other
        work_s = self._random.expovariate(1 / self._traffic.service_s[name])
        replica.free_s = max(now_s, replica.free_s) + work_s
        replica.waiting += 1

        def served(now_s: float) -> None:
            replica.waiting -= 1
            self._enters(now_s, place + 1, arrived_s)

        self.at(replica.free_s, served)

    def changes(self, change: Change) -> Callable[[float], None]:
        """What a change does when its time comes."""

        def happens(now_s: float) -> None:
            self._rate *= change.rate_factor
            for _, stage in self._route if change.lost_share else ():
                self._start(stage, stage.lose(change.lost_share), now_s)

        return happens

    def _start(self, stage: _Stage, number: int, now_s: float) -> None:
        def serves(now_s: float) -> None:
            stage.coming -= 1
            stage.replicas.append(_Replica(now_s))

        for _ in range(number):
            stage.coming += 1
            self.at(now_s + self._scaling.start_s, serves)

    def looks(self, now_s: float) -> None:
        """As Serve's controller: are there enough replicas?"""
        if now_s >= self._seconds:
            return
        self.at(now_s + _LOOK_S, self.looks)
        for _, stage in self._route:
            ongoing = sum(of.waiting for of in stage.replicas)
            wanted = ceil(ongoing / self._scaling.target_ongoing_requests)
            there = len(stage.replicas) + stage.coming
            if wanted <= there:
                stage.above_since_s = None
            elif stage.above_since_s is None:
                stage.above_since_s = now_s
            elif now_s - stage.above_since_s >= self._scaling.upscale_delay_s:
                self._start(stage, min(wanted, self._scaling.max_replicas) - there, now_s)
                stage.above_since_s = None


def simulate(
    traffic: Traffic,
    replicas: Mapping[str, int],
    seconds: float,
    autoscaling: Autoscaling | None = None,
    changes: Sequence[Change] = (),
    seed: int = 0,
) -> tuple[Latencies, dict[str, int]]:
    """Let traffic arrive.

    Args:
        traffic: What arrives.
        replicas: Of each stage, at the beginning.
        seconds: How long requests arrive.
        autoscaling: When replicas are added; `None`: never.
        changes: What happens meanwhile.
        seed: Of arrivals and service times, which are exponential.

    Returns:
        The latencies, and the replicas of each stage at the end.
    """
    run = _Run(traffic, replicas, seconds, autoscaling or Autoscaling(), seed)
    for change in changes:
        run.at(change.at_s, run.changes(change))
    if autoscaling is not None:
        run.at(_LOOK_S, run.looks)
    return run.latencies, run.run()
