"""The load of `benchmarks.overload`: open-loop, streamed and not, of short and of long answers.

In: an `OverloadLoad` as JSON on standard input. Out: a JSON list of `Answer`s on standard output,
once all are there. In a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass

from benchmarks.client import KeptConnections, Load, build_request
from benchmarks.open_loop import send_when_due

LENGTHS = (16,) * 9 + (64,)
"""Tokens of the answers, in turn."""
_MAX_IN_FLIGHT = 2000


@dataclass(frozen=True, slots=True)
class OverloadLoad:
    """One run."""

    port: int
    rate: float
    """Requests per second."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one request."""

    due_s: float
    """When it was due, from the beginning of the run."""
    latency_ms: float
    """From then to its last byte."""
    status: int
    """Of HTTP; 0 where none came."""
    says_when: bool
    """Whether it has a Retry-After."""


class _Client:
    """Sends requests when they are due."""

    def __init__(self, load: OverloadLoad) -> None:
        self._load = load
        self._connections = KeptConnections(load.port)
        self.answers: list[Answer] = []

    async def run(self) -> None:
        load = self._load
        began_s = time.perf_counter()

        def left_out(number: int, due_s: float) -> None:
            self.answers.append(Answer(due_s - began_s, 0.0, 0, says_when=False))

        await send_when_due(
            lambda number, due_s: self._ask(number, began_s, due_s),
            left_out,
            rate=load.rate,
            max_in_flight=_MAX_IN_FLIGHT,
            requests=round(load.rate * load.seconds),
        )

    async def _ask(self, number: int, began_s: float, due_s: float) -> None:
        max_tokens = LENGTHS[number % len(LENGTHS)]
        load = Load(
            "127.0.0.1",
            self._load.port,
            "/v1/chat/completions",
            "open",
            0.0,
            body={"model": "slots", "max_tokens": max_tokens, "atlas": {"deadline_s": 25}},
            stream=number // len(LENGTHS) % 2 == 1,
        )
        status, says_when = 0, False
        try:
            connection = await self._connections.take()
            status, _ = await connection.ask(build_request(load, number))
            head = connection.received.partition(b"\r\n\r\n")[0].lower()
            says_when = b"\r\nretry-after:" in head
            if b"\r\nconnection: close" in head:
                connection.close()
            self._connections.give_back(connection)
        except (OSError, TimeoutError):
            pass
        latency_ms = (time.perf_counter() - due_s) * 1e3
        self.answers.append(Answer(due_s - began_s, latency_ms, status, says_when))


def main() -> None:
    """Read the load and run it."""
    client = _Client(OverloadLoad(**json.loads(sys.stdin.read())))
    asyncio.run(client.run())
    json.dump([asdict(answer) for answer in client.answers], sys.stdout)


if __name__ == "__main__":
    main()
