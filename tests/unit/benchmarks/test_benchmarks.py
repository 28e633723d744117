"""The benchmark's own parts: load generator, statistics, targets, and the figure."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.client import (
    KeptConnections,
    Load,
    Measurement,
    build_request,
    measure,
    question,
)
from benchmarks.engines import InstantModel, Upstream
from benchmarks.figure import draw
from benchmarks.stats import Summary, Target, merge, percentile, summarise


@pytest.fixture
async def upstream_port() -> AsyncIterator[int]:
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def _load(port: int, **changes: Any) -> Load:
    fields: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": port,
        "path": "/v1/chat/completions",
        "mode": "closed",
        "seconds": 0.2,
        "body": {"model": "instant"},
    }
    return Load(**(fields | changes))


def test_questions_are_distinct() -> None:
    assert len({question(number) for number in range(5000)}) == 5000


def test_a_request_carries_its_question_and_its_length() -> None:
    head, _, body = build_request(_load(80, stream=True), 7).partition(b"\r\n\r\n")
    parsed = json.loads(body)
    assert parsed["messages"] == [{"role": "user", "content": question(7)}]
    assert parsed["stream"] is True
    assert f"content-length: {len(body)}".encode() in head


async def test_closed_loop_counts_every_answer(upstream_port: int) -> None:
    measured = await measure(_load(upstream_port, concurrency=4))
    assert measured.errors == 0, measured.error_sample
    assert len(measured.latencies_ms) > 20
    assert min(measured.latencies_ms) > 0


async def test_open_loop_sends_at_its_rate(upstream_port: int) -> None:
    load = _load(upstream_port, mode="open", rate=100.0, concurrency=16, seconds=0.5)
    measured = await measure(load)
    assert len(measured.latencies_ms) + measured.errors == 50
    assert measured.seconds == pytest.approx(0.5, abs=0.3)


async def test_streams_report_their_first_content(upstream_port: int) -> None:
    measured = await measure(_load(upstream_port, stream=True))
    assert measured.errors == 0, measured.error_sample
    assert len(measured.first_ms) == len(measured.latencies_ms) > 0


async def test_errors_are_counted_and_not_timed() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(b"HTTP/1.1 503 Gone\r\ncontent-length: 4\r\n\r\nbusy")

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    async with server:
        load = Load("127.0.0.1", server.sockets[0].getsockname()[1], "/", "closed", 0.1)
        measured = await measure(load)
    assert measured.latencies_ms == []
    assert measured.errors > 0
    assert measured.error_sample == "503: busy"


async def test_a_connection_that_the_server_closed_is_not_asked_again() -> None:
    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi")
        writer.close()

    server = await asyncio.start_server(close, "127.0.0.1", 0)
    async with server:
        kept = KeptConnections(server.sockets[0].getsockname()[1])
        first = await kept.take()
        assert await first.ask(b"GET / HTTP/1.1\r\n\r\n") == (200, b"hi")
        kept.give_back(first)
        async with asyncio.timeout(10):
            while first.usable:
                await asyncio.sleep(0.01)
        with pytest.raises(ConnectionError):
            await first.ask(b"GET / HTTP/1.1\r\n\r\n")
        second = await kept.take()
        assert second is not first
        assert await second.ask(b"GET / HTTP/1.1\r\n\r\n") == (200, b"hi")
        kept.close()


async def test_the_instant_model_speaks_the_model_protocol() -> None:
    model = InstantModel()
    answer = await model.complete({})
    assert answer["choices"][0]["message"]["content"]
    pieces = [piece async for batch in model.stream({}) for piece in batch]
    assert pieces[-1]["usage"] == answer["usage"]
    text = "".join(p["choices"][0]["delta"].get("content", "") for p in pieces if p["choices"])
    assert text.strip() == answer["choices"][0]["message"]["content"]


def test_summary_of_merged_rounds() -> None:
    rounds = [
        Measurement(latencies_ms=[1.0, 2.0, 3.0], seconds=1.0, client_cpu_s=0.003),
        Measurement(latencies_ms=[4.0, 5.0], errors=1, error_sample="408", seconds=1.5),
    ]
    summary = summarise(merge(rounds))
    assert (summary.requests, summary.errors, summary.error_sample) == (5, 1, "408")
    assert summary.p50_ms == 3.0
    assert summary.requests_per_s == 2.0
    assert summary.client_cpu_ms == pytest.approx(0.6)
    assert summary.first_p50_ms is None


def test_nothing_measured_gives_no_figures() -> None:
    summary = summarise(Measurement(errors=3, seconds=1.0))
    assert summary.p50_ms is None
    assert summary.requests_per_s == 0.0
    assert percentile([], 50) is None


@pytest.mark.parametrize(
    ("value", "relation", "holds"),
    [(8.0, "<=", True), (8.1, "<=", False), (8.0, ">=", True), (7.9, ">=", False)],
)
def test_a_target_holds_up_to_its_bound(value: float, relation: Any, holds: bool) -> None:
    assert Target("a figure", value, relation, 8.0).holds is holds


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    summary = summarise(Measurement(latencies_ms=[1.0, 2.0], seconds=1.0))
    rows: dict[str, Summary] = dict.fromkeys(("noop", "routed", "litellm"), summary)
    targets = [{"name": "x", "value": 1.0, "target": "<= 2", "holds": True}]
    draw({"closed_1": rows, "closed_16": rows}, targets, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
