"""An OpenTelemetry collector on loopback: takes OTLP over HTTP, and keeps every span."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Span:
    """One span as it arrived."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    """Empty: it has none."""
    kind: str
    attributes: dict[str, Any]
    began_ns: int
    ended_ns: int
    failed: bool
    events: dict[str, dict[str, Any]]


class Collector:
    """What arrived.

    Attributes:
        spans: Every span.
        resources: Attributes of every resource.
        requests: How many requests brought them.
        is_away: Whether it answers with an error from now on.
    """

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resources: list[dict[str, Any]] = []
        self.requests = 0
        self.is_away = False
        self.url = ""

    def take(self, body: bytes) -> None:
        message = ExportTraceServiceRequest.FromString(body)
        self.requests += 1
        for resource in message.resource_spans:
            self.resources.append(_attributes(resource.resource.attributes))
            for scope in resource.scope_spans:
                self.spans += [_span(span) for span in scope.spans]

    def named(self, name: str) -> Span:
        (found,) = (span for span in self.spans if span.name == name)
        return found

    def tree(self, root: Span, depth: int = 0) -> list[str]:
        """The names of a span and of all below it, each indented below its parent."""
        below = sorted(
            (span for span in self.spans if span.parent_id == root.span_id),
            key=lambda span: (span.began_ns, span.name),
        )
        lines = [line for span in below for line in self.tree(span, depth + 1)]
        return ["  " * depth + root.name, *lines]

    def until(self, claim: Callable[[], bool]) -> None:
        ends_s = time.monotonic() + 60
        while not claim():
            assert time.monotonic() < ends_s, [span.name for span in self.spans]
            time.sleep(0.02)


def _span(span: Any) -> Span:
    kinds = {1: "internal", 2: "server", 3: "client"}
    return Span(
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        kinds[span.kind],
        _attributes(span.attributes),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        span.status.code == 2,
        {event.name: _attributes(event.attributes) for event in span.events},
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


@contextmanager
def collector() -> Iterator[Collector]:
    """A running collector."""
    kept = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            if not kept.is_away:
                kept.take(body)
            self.send_response(503 if kept.is_away else 200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    kept.url = f"http://127.0.0.1:{server.server_address[1]}/v1/traces"
    try:
        yield kept
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
