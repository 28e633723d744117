"""A load generator that costs little: HTTP/1.1 over raw keep-alive sockets, in its own process.

In: a `Load`. Out: a `Measurement`. `run_load` starts `python -m benchmarks.client`, which reads the
load as JSON from standard input and writes the measurement to standard output. Every request has
its own body, so no cache can answer it. A response that is not 200, is cut off or does not come in
time counts as an error and in no latency.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from benchmarks.open_loop import send_when_due

ASK_TIMEOUT_S = 30.0
_MAX_IDLE_S = 4.0
"""A connection is not used again after so long, as HTTP clients do: the other side may close it."""

OPENERS = ("what is", "work out", "tell me", "find", "please give")
SUBJECTS = ("{a} times {b}", "the sum of {a} and {b}", "{a} divided by {b}", "{a} percent of {b}")


def question(number: int) -> str:
    """A short question (about 10 tokens); the first 20 million numbers give as many questions."""
    rest, opener = divmod(number, len(OPENERS))
    rest, subject = divmod(rest, len(SUBJECTS))
    a, b = divmod(rest % 1_000_000, 1000)
    return f"{OPENERS[opener]} {SUBJECTS[subject].format(a=b, b=a)}?"


PROFILED = (
    "how far is it by {thing} from house {a} to house {b}",
    "which dish do i cook with {a} grams of {thing} in {b} minutes",
    "translate the word {thing} and the numbers {a} and {b} into French",
    "who sold {a} of the {thing} in the year {b}",
)
THINGS = ("train", "rice", "copper", "bicycle", "flour", "timber", "ferry", "sugar")


def profiled_question(number: int) -> str:
    """A question of the four kinds that `benchmarks.profiled` fits a router on."""
    rest, kind = divmod(number, len(PROFILED))
    rest, thing = divmod(rest, len(THINGS))
    a, b = divmod(rest % 1_000_000, 1000)
    return PROFILED[kind].format(thing=THINGS[thing], a=b, b=a)


@dataclass(frozen=True, slots=True)
class Load:
    """One run of load against one URL."""

    host: str
    port: int
    path: str
    mode: Literal["closed", "open"]
    """`closed`: each connection asks again when answered. `open`: arrivals at a fixed rate."""
    seconds: float
    concurrency: int = 1
    """Connections of a closed loop; upper bound of an open one."""
    rate: float = 0.0
    """Requests per second of an open loop."""
    body: dict[str, Any] | None = None
    """Fields of the JSON body beside `messages`; `None` sends GET."""
    stream: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    first_number: int = 0
    """Number of the first question, so that runs never share one."""
    profiled: bool = False
    """Whether the questions are of the profiled kinds."""


@dataclass(slots=True)
class Measurement:
    """What came back; latencies in milliseconds, in the order of completion."""

    latencies_ms: list[float] = field(default_factory=list)
    """Request sent (open loop: due) to last byte."""
    first_ms: list[float] = field(default_factory=list)
    """Streams only: request sent to the first event with content."""
    errors: int = 0
    error_sample: str | None = None
    seconds: float = 0.0
    client_cpu_s: float = 0.0
    """CPU time of the load generator itself."""


class Connection(asyncio.Protocol):
    """One keep-alive connection with one request at a time on it."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._buffer = bytearray()
        self._body_start = -1
        self._content_length = -1
        self.first_content_s: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail what was asked."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError("connection closed before the answer"))

    @property
    def usable(self) -> bool:
        """Whether another request can go out on it."""
        return self._transport is not None and not self._transport.is_closing()

    @property
    def received(self) -> bytes:
        """What came of the answer so far, its head included."""
        return bytes(self._buffer)

    def close(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Send a request; returns status and body bytes (chunked framing left in).

        Raises:
            ConnectionError: If the connection closes first, or is closed.
            TimeoutError: If the answer takes longer than `ASK_TIMEOUT_S`.
        """
        if self._transport is None or self._transport.is_closing():
            raise ConnectionError("the connection is closed")
        self._buffer.clear()
        self._body_start = self._content_length = -1
        self.first_content_s = None
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        async with asyncio.timeout(ASK_TIMEOUT_S):
            return await self._answer

    def data_received(self, data: bytes) -> None:
        """Collect, note the first content, and finish when the framing says so."""
        self._buffer += data
        if self._body_start < 0:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            self._body_start = end + 4
            self._content_length = _content_length(bytes(self._buffer[:end]).lower())
        if self.first_content_s is None and b'"content":"' in self._buffer.replace(b": ", b":"):
            self.first_content_s = time.perf_counter()
        if self._content_length >= 0:
            complete = len(self._buffer) - self._body_start >= self._content_length
        else:
            complete = self._buffer.endswith(b"0\r\n\r\n")
        if complete and self._answer is not None and not self._answer.done():
            status = int(self._buffer[9:12])
            self._answer.set_result((status, bytes(self._buffer[self._body_start :])))


class KeptConnections:
    """Connections to one port that are used again while they are fresh.

    A server closes those that idle: what is sent on one of them meanwhile has no answer.
    """

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        """Start with none."""
        self._host, self._port = host, port
        self._idle: list[tuple[float, Connection]] = []
        """Connections, and since when (monotonic clock) they have had nothing to do."""

    async def take(self) -> Connection:
        """A connection that is free, or a new one.

        Raises:
            OSError: If nobody listens.
        """
        while self._idle:
            since_s, connection = self._idle.pop()
            if connection.usable and time.monotonic() - since_s < _MAX_IDLE_S:
                return connection
            connection.close()
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self._host, self._port)
        return connection

    def close(self) -> None:
        """Close those that have nothing to do."""
        while self._idle:
            self._idle.pop()[1].close()

    def give_back(self, connection: Connection) -> None:
        """Keep a connection for the next request, unless it is closing."""
        if connection.usable:
            self._idle.append((time.monotonic(), connection))


def unchunked(body: bytes) -> bytes:
    """A body without the framing of chunked transfer; one without such framing as it is."""
    parts = []
    rest = body
    while rest:
        size, line_end, tail = rest.partition(b"\r\n")
        try:
            length = int(size, 16)
        except ValueError:
            return body
        if not line_end or len(tail) < length:
            return body
        parts.append(tail[:length])
        rest = tail[length + 2 :]
    return b"".join(parts)


def _content_length(head: bytes) -> int:
    """Content-Length of a lower-case head; -1 where the body is chunked."""
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name == b"content-length":
            return int(value)
    return -1


def build_request(load: Load, number: int) -> bytes:
    """The bytes of one request."""
    headers = {"host": f"{load.host}:{load.port}"} | load.headers
    payload = b""
    if load.body is not None:
        text = profiled_question(number) if load.profiled else question(number)
        messages = [{"role": "user", "content": text}]
        fields = load.body | {"messages": messages} | ({"stream": True} if load.stream else {})
        payload = json.dumps(fields).encode()
        headers |= {"content-type": "application/json", "content-length": str(len(payload))}
    lines = [f"{'GET' if load.body is None else 'POST'} {load.path} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + payload


class _Run:
    """One load while it runs."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._number = load.first_number
        self.measurement = Measurement()

    async def connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self._load.host, self._load.port)
        return connection

    async def one(self, connection: Connection, due_s: float | None = None) -> None:
        """Send the next question; `due_s` is when an open loop wanted it sent."""
        self._number += 1
        request = build_request(self._load, self._number)
        sent_s = time.perf_counter()
        try:
            status, body = await connection.ask(request)
        except (ConnectionError, TimeoutError) as error:
            connection.close()
            self._fail(f"{type(error).__name__}: {error}")
            return
        done_s = time.perf_counter()
        if status != 200 or (self._load.stream and b"[DONE]" not in body):
            self._fail(f"{status}: {body[:300].decode(errors='replace')}")
            return
        self.measurement.latencies_ms.append((done_s - (due_s or sent_s)) * 1e3)
        if self._load.stream and connection.first_content_s is not None:
            self.measurement.first_ms.append((connection.first_content_s - sent_s) * 1e3)

    def _fail(self, sample: str) -> None:
        self.measurement.errors += 1
        self.measurement.error_sample = self.measurement.error_sample or sample

    async def closed(self) -> None:
        """Every connection asks again as soon as it is answered."""
        end_s = time.perf_counter() + self._load.seconds

        async def ask_on() -> None:
            connection = await self.connect()
            while time.perf_counter() < end_s:
                if not connection.usable:
                    connection = await self.connect()
                await self.one(connection)
            connection.close()

        await asyncio.gather(*(ask_on() for _ in range(self._load.concurrency)))

    async def open(self) -> None:
        """Requests fall due at a fixed rate, whether or not earlier ones are answered."""
        kept = KeptConnections(self._load.port, self._load.host)

        async def serve(number: int, due_s: float) -> None:
            connection = await kept.take()
            await self.one(connection, due_s)
            kept.give_back(connection)

        await send_when_due(
            serve,
            lambda number, due_s: self._fail("the open loop's bound on requests was reached"),
            rate=self._load.rate,
            max_in_flight=self._load.concurrency,
            requests=int(self._load.rate * self._load.seconds),
        )
        kept.close()


async def measure(load: Load) -> Measurement:
    """Run a load in this process."""
    run = _Run(load)
    loop: Callable[[], Coroutine[Any, Any, None]] = (
        run.closed if load.mode == "closed" else run.open
    )
    cpu_s, began_s = time.process_time(), time.perf_counter()
    await loop()
    run.measurement.seconds = time.perf_counter() - began_s
    run.measurement.client_cpu_s = time.process_time() - cpu_s
    return run.measurement


async def run_load(load: Load) -> Measurement:
    """Run a load in a process of its own.

    Raises:
        RuntimeError: If that process fails; the message holds what it wrote.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.client",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate(json.dumps(asdict(load)).encode())
    if process.returncode:
        raise RuntimeError(f"the load generator failed: {err.decode(errors='replace')[-2000:]}")
    return Measurement(**json.loads(out))


def main() -> None:
    """Read a load, run it, write the measurement."""
    load = Load(**json.loads(sys.stdin.read()))
    sys.stdout.write(json.dumps(asdict(asyncio.run(measure(load)))))


if __name__ == "__main__":
    main()
