"""The load of `benchmarks.chaos`: constant, open-loop, of several kinds, and never sent twice.

In: a `ChaosLoad` as JSON, one line on standard input. Out: one JSON object per answer on standard
output, as soon as it is there. It goes on until its standard input ends, in a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.client import Connection, KeptConnections, Load, build_request, unchunked
from benchmarks.open_loop import send_when_due

_MAX_IN_FLIGHT = 1024


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of request."""

    name: str
    model: str
    """As the API takes it: `atlas` routes, anything else pins."""
    streamed: bool


@dataclass(frozen=True, slots=True)
class ChaosLoad:
    """One run."""

    port: int
    rate: float
    """Requests per second."""
    deadline_s: float
    """Of each request, as the API takes it."""
    kinds: tuple[Kind, ...]
    """Sent in turn."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one request."""

    began_unix_s: float
    """When it was sent."""
    latency_ms: float
    """From then to its last byte."""
    kind: str
    streamed: bool
    ending: str
    """`whole`; `refused`: an error in OpenAI's shape instead of an answer; `error_event`: a stream
    that ends with one; `cut`: a connection that closed in the middle; `malformed`: anything else.
    """
    status: int = 0
    """Of HTTP; 0 without one."""
    detail: str = ""
    """What came instead of an answer."""

    @property
    def failed(self) -> bool:
        """Whether the caller did not get a whole answer."""
        return self.ending != "whole"

    @property
    def ended_unix_s(self) -> float:
        """When its last byte came."""
        return self.began_unix_s + self.latency_ms / 1e3


def read_answer(status: int, body: bytes, *, streamed: bool) -> tuple[str, str]:
    """How an answer ended, and what came instead of a whole one.

    Args:
        status: Of HTTP.
        body: Without transfer framing, as far as it came.
        streamed: Whether a stream was asked for.
    """
    shown = body[-300:].decode(errors="replace")
    try:
        if status == 200 and streamed:
            events = [line[6:] for line in body.splitlines() if line.startswith(b"data: ")]
            if events and events[-1] == b"[DONE]":
                return "whole", ""
            last = json.loads(events[-1]) if events else {}
            return ("error_event" if _is_error(last) else "cut"), shown
        said = json.loads(body)
        if status == 200:
            content = said["choices"][0]["message"]["content"]
            return ("whole", "") if isinstance(content, str) else ("malformed", shown)
        return ("refused" if _is_error(said) else "malformed"), shown
    except (ValueError, KeyError, IndexError, TypeError):
        return "malformed", shown


def _is_error(said: Any) -> bool:
    """Whether it is an error object in OpenAI's shape."""
    error = said.get("error") if isinstance(said, dict) else None
    return isinstance(error, dict) and {"message", "type", "param", "code"} <= error.keys()


class _Client:
    """Sends requests when they are due."""

    def __init__(self, load: ChaosLoad) -> None:
        self._load = load
        self._connections = KeptConnections(load.port)

    async def run(self, stop: asyncio.Event) -> None:
        await send_when_due(
            self._ask, self._left_out, rate=self._load.rate, max_in_flight=_MAX_IN_FLIGHT, stop=stop
        )

    def _kind(self, number: int) -> Kind:
        return self._load.kinds[number % len(self._load.kinds)]

    def _left_out(self, number: int, due_s: float) -> None:
        kind = self._kind(number)
        _write(Answer(time.time(), 0.0, kind.name, kind.streamed, "unsent"))

    async def _ask(self, number: int, due_s: float) -> None:
        kind = self._kind(number)
        options = {"deadline_s": self._load.deadline_s, "alpha": 0.0}
        body = {"model": kind.model, "max_tokens": 16, "temperature": 0, "atlas": options}
        load = Load("127.0.0.1", self._load.port, "/v1/chat/completions", "open", 0.0,
                    body=body, stream=kind.streamed)  # fmt: skip
        began_unix_s, began_s = time.time(), time.perf_counter()
        connection: Connection | None = None
        try:
            connection = await self._connections.take()
            status, answer = await connection.ask(build_request(load, number))
            ending, detail = read_answer(status, unchunked(answer), streamed=kind.streamed)
        except (OSError, TimeoutError) as error:
            received = connection.received if connection is not None else b""
            status = int(received[9:12]) if received[9:12].isdigit() else 0
            ending, detail = "cut", f"{type(error).__name__}: {error}"
            if kind.streamed and status == 200:
                _, _, answer = received.partition(b"\r\n\r\n")
                ending, said = read_answer(status, _unframed(answer), streamed=True)
                detail = f"{detail}; {said}"
        latency_ms = (time.perf_counter() - began_s) * 1e3
        _write(Answer(began_unix_s, latency_ms, kind.name, kind.streamed, ending, status, detail))
        if connection is not None:
            self._connections.give_back(connection)


def _unframed(body: bytes) -> bytes:
    """The lines of events in a chunked body that may be cut anywhere."""
    return b"\n".join(line for line in body.splitlines() if line.startswith(b"data: "))


def _write(answer: Answer) -> None:
    sys.stdout.write(json.dumps(asdict(answer)) + "\n")
    sys.stdout.flush()


async def _run(load: ChaosLoad) -> None:
    stop = asyncio.Event()

    async def watch() -> None:
        await asyncio.to_thread(sys.stdin.read)
        stop.set()

    watching = asyncio.create_task(watch())
    await _Client(load).run(stop)
    await watching


def main() -> None:
    """Read the load and run it."""
    said = json.loads(sys.stdin.readline())
    kinds = tuple(Kind(**kind) for kind in said.pop("kinds"))
    asyncio.run(_run(ChaosLoad(kinds=kinds, **said)))


if __name__ == "__main__":
    main()
