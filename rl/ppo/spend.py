"""What a live training buys of the pool: within its caps, on record line by line, nothing twice.

The `Ledger` stands between the rollouts and the gateway. Its file, one JSON object per paid
request, lies in the run's folder; a run that was killed reads it and goes on as if it had not been.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pydantic import TypeAdapter

from rl.profile.measure import Run
from serve_app.errors import AtlasError, InvalidRequest, TrainingStopped
from serve_app.schemas import ChatCall, Report

LEDGER_FILE = "bought.jsonl"
"""Of a run's folder."""

_MAX_FAILED_IN_A_ROW = 32
"""After so many requests that could not be had the pool counts as away: learning from them would
teach that every pair fails."""

_REPORT: TypeAdapter[Report] = TypeAdapter(Report)
_Answer = tuple[Report, AtlasError | None]


class CapReached(TrainingStopped):
    """A live training may not buy any more; the message says which cap it reached."""


@dataclass(frozen=True)
class Spent:
    """What a live training came to so far, from its very beginning."""

    usd: float
    """Of everything the pool reported: pairs, planner and judge, answered or not."""
    requests: int
    """That were paid for; equal ones are sent once."""
    seconds: float
    """That the run was under way."""


class Ledger:
    """Buys each request once, and no more than the caps allow.

    Invariants:
        - A request is sent only if what is spent, what is under way and the dearest request known
          of its pair stay within the dollars. What is under way when a cap is reached comes to its
          end.
        - What came back is on record before it is used.
        - Equal requests (model, messages, sampling, note) have one answer: rollouts ask at
          temperature 0. One that failed is asked again.
        - One event loop at a time.
    """

    def __init__(
        self,
        path: Path,
        run: Run,
        *,
        max_cost_usd: float,
        max_seconds: float,
        expected_usd: Mapping[str, float],
    ) -> None:
        """Name the file; `opened` reads it.

        Args:
            path: The file, in a folder that is there when it is opened.
            run: What sends requests.
            max_cost_usd: Of the whole run, in dollars.
            max_seconds: Of the whole run.
            expected_usd: What a request to a pair costs at most, as far as is known before; by the
                pair's name.
        """
        self._path, self._run = path, run
        self._max_cost_usd, self._max_seconds = max_cost_usd, max_seconds
        self._dearest = dict(expected_usd)
        self._known: dict[str, _Answer] = {}
        self._under_way: dict[str, asyncio.Future[_Answer]] = {}
        self._usd = self._reserved_usd = self._seconds_before = 0.0
        self._requests = self._failed_in_a_row = 0
        self._began_s = time.monotonic()
        self._file: IO[str] | None = None
        self._should_stop: Callable[[], bool] = lambda: False

    @property
    def spent(self) -> Spent:
        """So far."""
        return Spent(self._usd, self._requests, self._seconds)

    @contextmanager
    def opened(self, should_stop: Callable[[], bool]) -> Iterator[None]:
        """Take up what was bought before, and the run's time.

        Args:
            should_stop: Asked before every request.
        """
        self._read()
        self._began_s = time.monotonic()
        self._should_stop = should_stop
        with self._path.open("a", encoding="utf-8") as self._file:
            yield

    def check(self, usd: float = 0.0) -> None:
        """See that the run may go on, and buy something.

        Args:
            usd: What it costs at most.

        Raises:
            CapReached: If a cap does not allow it.
            TrainingStopped: If the run was told to stop, or the pool does not answer any more.
        """
        if self._should_stop():
            raise TrainingStopped("training was told to stop; it can go on")
        if self._failed_in_a_row >= _MAX_FAILED_IN_A_ROW:
            raise TrainingStopped(
                f"the pool is away: the last {self._failed_in_a_row} requests could not be had; "
                "training can go on"
            )
        if self._seconds >= self._max_seconds:
            raise CapReached(f"the cap of {self._max_seconds:g} s is reached")
        bound_usd = self._usd + self._reserved_usd
        if bound_usd + usd > self._max_cost_usd:
            raise CapReached(
                f"the cap of {self._max_cost_usd:g} USD is reached: {bound_usd:.6f} are spent or "
                "under way, and the next request could exceed it"
            )

    async def __call__(self, call: ChatCall) -> _Answer:
        """Send a request, unless an equal one was answered: a `rl.profile.measure.Run`.

        Raises:
            CapReached: If a cap does not allow it.
            TrainingStopped: See `check`.
            AtlasError: As of the wrapped `Run`.
            TimeoutError: As of the wrapped `Run`.
        """
        key = _key(call)
        if key in self._known:
            return self._known[key]
        under_way = self._under_way.get(key)
        if under_way is None:
            dearest_usd = self._dearest.get(call.model, 0.0)
            self.check(dearest_usd)
            self._reserved_usd += dearest_usd
            under_way = asyncio.ensure_future(self._buy(key, call, dearest_usd))
            self._under_way[key] = under_way
        return await under_way

    async def _buy(self, key: str, call: ChatCall, dearest_usd: float) -> _Answer:
        answered = False
        try:
            report, failure = await self._run(call)
            # A refusal is an answer; whatever else failed may go better the next time.
            answered = failure is None or isinstance(failure, InvalidRequest)
        finally:
            self._failed_in_a_row = 0 if answered else self._failed_in_a_row + 1
            self._reserved_usd -= dearest_usd
            del self._under_way[key]
        usd = report.usage.cost_usd
        self._dearest[call.model] = max(usd, dearest_usd)
        self._usd += usd
        self._requests += 1
        line: dict[str, Any] = {"usd": usd, "seconds": self._seconds}
        if answered:
            refused = None if failure is None else failure.message
            line |= {"key": key, "report": _REPORT.dump_python(report, mode="json")}
            line |= {"refused": refused}
            self._known[key] = report, failure
        assert self._file is not None, "the ledger is not open"
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        return report, failure

    @property
    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._began_s

    def _read(self) -> None:
        """What is on record; a line that a kill cut off is taken away."""
        if not self._path.exists():
            return
        whole = 0
        with self._path.open("rb") as file:
            for raw in file:
                if not raw.endswith(b"\n"):
                    break
                whole += len(raw)
                line = json.loads(raw)
                self._usd += line["usd"]
                self._requests += 1
                self._seconds_before = line["seconds"]
                if "key" in line:
                    refused = line["refused"]
                    failure = None if refused is None else InvalidRequest(refused)
                    report = _REPORT.validate_python(line["report"])
                    self._known[line["key"]] = report, failure
        os.truncate(self._path, whole)


def _key(call: ChatCall) -> str:
    """Equal for requests that ask the same of the same."""
    asked = [call.model, call.messages, call.sampling, call.note]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]
