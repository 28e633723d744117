"""How many requests are taken at once: as many as are worked on, not as many as would wait.

By Little's law, N requests in flight that take R each leave at N / R a second. On an idle
deployment they take R0, so N * R0 / R of them are worked on and the others wait. A limit a little
above that number keeps every worker busy and bounds the wait, whatever the workers are: so BBR sets
TCP's window (Cardwell et al., ACM Queue 14(5), 2016), from the rate and the round trip without
queues, and so do Envoy's adaptive concurrency and Netflix' concurrency-limits for servers.

R and R0 are medians over requests of one kind, because answers differ in length. Answers that take
a few milliseconds would make for a limit that every pause of the machine meets, so R may be
`soon_enough_s` in any case.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from statistics import median

from serve_app.config import LimitsConfig
from serve_app.errors import RateLimited

_CALM = 4
"""A request that finds fewer in flight tells how long one takes on an idle deployment."""
_CALM_SAMPLES = 64
"""Of each kind, the newest."""
_MIN_CALM_SAMPLES = 3
_MAX_KINDS = 256
"""Kinds of requests remembered; the one seen longest ago is forgotten first."""
_WINDOW = 32
"""Requests, as a rule, between two changes of the limit."""
_MAX_WINDOWS_AT_FLOOR = 3
"""In a row; then it is measured anew what an idle deployment takes."""


@dataclass(slots=True)
class InFlight:
    """One request in flight."""

    began_s: float
    """By the limit's clock."""
    others: int
    """Requests that were in flight when it came."""


class AdmissionLimit:
    """The limit of one gateway replica; used from one event loop.

    Invariants:
        - The limit changes only while requests meet it: light traffic is never refused because
          its answers grow longer.
        - It lies between `min_ongoing_requests` and `max_ongoing_requests`, but for the moment in
          which an idle deployment is measured anew.
        - Where what is known of an idle deployment is of other days, the limit falls to its floor,
          and from there the way back is to measure.
    """

    def __init__(self, limits: LimitsConfig, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with the configured limit.

        Args:
            limits: Bounds, and the slow-down that is put up with.
            clock: Seconds from any fixed point.
        """
        self._limits = limits
        self._clock = clock
        self._limit = self._within(limits.initial_ongoing_requests)
        self._ongoing = 0
        self._calm: OrderedDict[Hashable, deque[float]] = OrderedDict()
        self._good: list[float] = []
        """For each request of the window, how many in flight would have been good."""
        self._was_met = False
        self._windows_at_floor = 0
        self._window_began_s = clock()

    @property
    def limit(self) -> int:
        """Requests that may be in flight now."""
        return self._limit

    def enter(self) -> InFlight:
        """Take a request.

        Raises:
            RateLimited: If as many as are good are in flight.
        """
        if self._ongoing >= self._limit:
            self._was_met = True
            raise RateLimited("more requests are coming than can be answered; try again")
        place = InFlight(self._clock(), self._ongoing)
        self._ongoing += 1
        return place

    def leave(self, place: InFlight, kind: Hashable, *, answered: bool | None) -> None:
        """A request has ended.

        Args:
            place: What `enter` gave.
            kind: What the request is compared with.
            answered: `False` for one that was given up and would have taken longer; `None` for one
                whose time tells nothing of the deployment.
        """
        self._ongoing -= 1
        if answered is None:
            return
        seconds = self._clock() - place.began_s
        calm = self._calm_samples(kind)
        if answered and place.others < _CALM:
            calm.append(seconds)
        if place.began_s < self._window_began_s or len(calm) < _MIN_CALM_SAMPLES:
            return
        idle_s = max(median(calm), 1e-6)
        slowdown = max(seconds, 1e-6) / idle_s
        if answered or slowdown > 1:
            worked_on = (1 + place.others) / slowdown
            allowed = max(self._limits.max_slowdown, self._limits.soon_enough_s / idle_s)
            self._good.append(allowed * worked_on)
            if len(self._good) >= self._window():
                self._close_window()

    def _calm_samples(self, kind: Hashable) -> deque[float]:
        """Seconds that requests of a kind took while little else was going on."""
        if kind not in self._calm:
            self._calm[kind] = deque(maxlen=_CALM_SAMPLES)
            if len(self._calm) > _MAX_KINDS:
                self._calm.popitem(last=False)
        self._calm.move_to_end(kind)
        return self._calm[kind]

    def _window(self) -> int:
        """Requests that are looked at before the limit changes; few where few are let in."""
        return max(min(_WINDOW, 2 * self._limit), self._limit // 2)

    def _close_window(self) -> None:
        """Set the limit by what the last requests showed, and begin anew."""
        if self._was_met:
            self._limit = self._within(int(1 + median(self._good)))
            is_at_floor = self._limit <= self._limits.min_ongoing_requests
            self._windows_at_floor = self._windows_at_floor + 1 if is_at_floor else 0
            if self._windows_at_floor > _MAX_WINDOWS_AT_FLOOR:
                self._windows_at_floor = 0
                self._calm.clear()
                self._limit = min(self._limit, _CALM)
        self._good = []
        self._was_met = False
        self._window_began_s = self._clock()

    def _within(self, limit: int) -> int:
        limits = self._limits
        return min(max(limit, limits.min_ongoing_requests), limits.max_ongoing_requests)
