"""The load of `benchmarks.swap`: constant, open-loop, streamed and not, of one step and of more.

In: a `SwapLoad` as JSON on standard input. Out: one JSON object per answer on standard output, as
soon as it is there, with which policy served it. It runs until its time is over, in a process of
its own.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.client import KeptConnections, Load, build_request, unchunked
from benchmarks.open_loop import send_when_due
from serve_app.schemas import NO_TOOL

_MAX_IN_FLIGHT = 512


@dataclass(frozen=True, slots=True)
class SwapLoad:
    """One run."""

    port: int
    rate: float
    """Requests per second."""
    seconds: float
    max_steps: tuple[int, ...]
    """Steps that requests may take, in turn; each in turn whole and streamed."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one request."""

    began_unix_s: float
    """When it was due."""
    latency_ms: float
    """From then to its last byte."""
    streamed: bool
    error: str | None
    policy_version: int | None = None
    step_versions: tuple[int, ...] = ()
    pairs: tuple[str, ...] = ()
    """Of its steps."""


def extension_of(body: bytes, *, streamed: bool) -> dict[str, Any]:
    """The `atlas` object of an answer.

    Raises:
        ValueError: If it is cut off or not there.
    """
    if not streamed:
        found: dict[str, Any] = json.loads(body)["atlas"]
        return found
    events = [line[6:] for line in body.splitlines() if line.startswith(b"data: ")]
    if not events or events[-1] != b"[DONE]":
        raise ValueError("the stream is cut off")
    found = json.loads(events[-2])["atlas"]
    return found


class _Client:
    """Sends requests when they are due."""

    def __init__(self, load: SwapLoad) -> None:
        self._load = load
        self._connections = KeptConnections(load.port)
        self._shapes = [(steps, s) for steps in load.max_steps for s in (False, True)]

    async def run(self) -> None:
        load = self._load
        await send_when_due(
            self._ask,
            lambda number, due_s: _write(
                Answer(time.time(), 0.0, False, "too many requests in flight")
            ),
            rate=load.rate,
            max_in_flight=_MAX_IN_FLIGHT,
            requests=round(load.rate * load.seconds),
        )

    async def _ask(self, number: int, due_s: float) -> None:
        max_steps, streamed = self._shapes[number % len(self._shapes)]
        # Without a tool every model does the same work, whichever a policy takes first.
        options: dict[str, Any] = {"max_steps": max_steps, "alpha": 0.0, "tools": [NO_TOOL]}
        body = {"model": "atlas", "max_tokens": 16, "temperature": 0, "atlas": options}
        load = Load("127.0.0.1", self._load.port, "/v1/chat/completions", "open", 0.0,
                    body=body, stream=streamed)  # fmt: skip
        began_unix_s = time.time() - (time.perf_counter() - due_s)
        try:
            connection = await self._connections.take()
            status, answer = await connection.ask(build_request(load, number))
            latency_ms = (time.perf_counter() - due_s) * 1e3
            self._connections.give_back(connection)
            _write(_read(began_unix_s, latency_ms, streamed, status, unchunked(answer)))
        except (OSError, TimeoutError) as error:
            _write(Answer(began_unix_s, 0.0, streamed, f"{type(error).__name__}: {error}"))


def _read(
    began_unix_s: float, latency_ms: float, streamed: bool, status: int, body: bytes
) -> Answer:
    if status != 200:
        return Answer(began_unix_s, latency_ms, streamed, f"{status}: {body[:200]!r}")
    try:
        said = extension_of(body, streamed=streamed)
        return Answer(
            began_unix_s,
            latency_ms,
            streamed,
            None,
            said["policy_version"],
            tuple(step["policy_version"] for step in said["steps"]),
            tuple(step["pair"] for step in said["steps"]),
        )
    except (ValueError, KeyError, IndexError, TypeError) as error:
        return Answer(began_unix_s, latency_ms, streamed, f"{type(error).__name__}: {error}")


def _write(answer: Answer) -> None:
    sys.stdout.write(json.dumps(asdict(answer)) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Read the load and run it."""
    load = SwapLoad(**json.loads(sys.stdin.read()))
    asyncio.run(_Client(load).run())


if __name__ == "__main__":
    main()
