"""Remote models against a real server on loopback that answers as it is told."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from serve_app.config import RemoteModelConfig
from serve_app.errors import (
    AtlasError,
    ContextTooLong,
    EngineBusy,
    EngineError,
    EngineUnavailable,
    InvalidRequest,
)
from serve_app.models import remote
from serve_app.models.remote import RemoteModel
from serve_app.orchestrator.recovery import TABLE, Move, fault_of
from serve_app.schemas import Effects

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
ANSWER = {
    "id": "x",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}
    ],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}


def response(
    status: int, body: Any = None, kind: str = "application/json", **headers: Any
) -> bytes:
    """An HTTP response; underscores in the names of headers are dashes."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} X", f"content-type: {kind}", f"content-length: {len(raw)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "connection: close", "", ""]).encode() + raw


def error(status: int, message: str = "no", code: str | None = None, **headers: Any) -> bytes:
    return response(status, {"error": {"message": message, "code": code}}, **headers)


GOOD = response(200, ANSWER)


class Endpoint:
    """Answers with each response once, and with the last one from then on.

    Attributes:
        arrived_s: When each request came, by the monotonic clock.
    """

    def __init__(self, *responses: bytes) -> None:
        self.responses = list(responses)
        self.arrived_s: list[float] = []
        self.paths: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.arrived_s.append(time.monotonic())
        self.paths.append(head.split(b" ")[1].decode())
        said = self.responses.pop(0) if len(self.responses) > 1 else self.responses[0]
        try:
            writer.write(said)
            await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()


@asynccontextmanager
async def model(*responses: bytes, **settings: Any) -> AsyncIterator[tuple[RemoteModel, Endpoint]]:
    endpoint = Endpoint(*responses)
    server = await asyncio.start_server(endpoint.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    config = RemoteModelConfig(
        model_id="m", base_url=f"http://127.0.0.1:{port}/v1", remote_model="m", **settings
    )
    served = RemoteModel(config)
    try:
        yield served, endpoint
    finally:
        await served._client.close()
        server.close()


async def refused(served: RemoteModel) -> AtlasError:
    with pytest.raises(AtlasError) as caught:
        await served.complete(BODY)
    return caught.value


async def test_an_answer_comes_through() -> None:
    async with model(GOOD) as (served, _):
        assert (await served.complete(BODY))["choices"] == ANSWER["choices"]


@pytest.mark.parametrize("status", [408, 500, 502, 503])
async def test_a_failure_that_may_pass_is_said_to_and_nothing_is_tried_again(status: int) -> None:
    async with model(error(status), GOOD) as (served, endpoint):
        assert type(await refused(served)) is EngineUnavailable
        assert len(endpoint.arrived_s) == 1


async def test_an_endpoint_that_cannot_be_reached_may_come_back() -> None:
    config = RemoteModelConfig(
        model_id="m", base_url="http://127.0.0.1:1/v1", remote_model="m", health_path=None
    )
    away = RemoteModel(config)
    assert type(await refused(away)) is EngineUnavailable
    await away._client.close()


async def test_retry_after_is_a_minimum_for_every_request() -> None:
    async with model(error(429, retry_after="0.3"), GOOD) as (served, endpoint):
        failure = await refused(served)
        assert isinstance(failure, EngineBusy)
        assert failure.retry_after_s == 0.3
        await asyncio.gather(served.complete(BODY), served.complete(BODY))
        began_s, *later_s = endpoint.arrived_s
        assert len(later_s) == 2
        assert min(later_s) - began_s >= 0.3


@pytest.mark.parametrize("status", [429, 503])
async def test_a_long_pause_is_kept_and_nobody_waits_for_it(status: int) -> None:
    async with model(error(status, retry_after="60"), GOOD) as (served, endpoint):
        for _ in range(3):
            busy = await refused(served)
            assert isinstance(busy, EngineBusy)
            assert 50 < (busy.retry_after_s or 0) <= 60
        assert len(endpoint.arrived_s) == 1


async def test_who_learns_of_a_pause_without_a_retry_says_how_long_it_is() -> None:
    async with model(error(429, retry_after="60"), max_retries=0) as (served, _):
        busy = await refused(served)
        assert isinstance(busy, EngineBusy)
        assert busy.retry_after_s == 60


async def test_a_429_without_a_pause_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_COOLDOWN_S", 60.0)
    async with model(error(429), GOOD) as (served, endpoint):
        assert isinstance(await refused(served), EngineBusy)
        assert len(endpoint.arrived_s) == 1


async def test_what_the_caller_did_wrong_is_said_short_and_not_tried_again() -> None:
    async with model(error(400, "x" * 5000 + "\nsecond line")) as (served, endpoint):
        failure = await refused(served)
        assert type(failure) is InvalidRequest
        assert failure.message == "x" * 300
        assert len(endpoint.arrived_s) == 1


async def test_a_refusal_has_no_control_characters() -> None:
    async with model(error(400, "no\x1b[31m\x00 such\x7f thing")) as (served, _):
        assert (await refused(served)).message == "no[31m such thing"


@pytest.mark.parametrize(
    "said",
    [
        error(400, "too many", "context_length_exceeded"),
        error(400, "This model's maximum context length is 4096 tokens."),
    ],
)
async def test_a_conversation_that_is_too_long_is_told_apart(said: bytes) -> None:
    async with model(said) as (served, _):
        assert isinstance(await refused(served), ContextTooLong)


@pytest.mark.parametrize(
    ("status", "code", "moves"),
    [
        (400, None, ()),
        (413, None, ()),
        (422, None, ()),
        (400, "context_length_exceeded", (Move.ANOTHER,)),
        (401, None, (Move.ANOTHER,)),
        (403, None, (Move.ANOTHER,)),
        (404, None, (Move.ANOTHER,)),
        (429, "insufficient_quota", (Move.ANOTHER,)),
        (408, None, (Move.AGAIN, Move.ANOTHER)),
        (429, None, (Move.AGAIN, Move.ANOTHER)),
        (500, None, (Move.AGAIN, Move.ANOTHER)),
        (529, None, (Move.AGAIN, Move.ANOTHER)),
    ],
)
async def test_each_status_has_its_row_in_the_table_of_recovery(
    status: int, code: str | None, moves: tuple[Move, ...]
) -> None:
    async with model(error(status, "no", code)) as (served, endpoint):
        failure = await refused(served)
        assert len(endpoint.arrived_s) == 1
    fault = fault_of(failure)
    assert TABLE[fault, Effects.NONE, False] == moves
    assert TABLE[fault, Effects.NONE, True] == ()


async def test_a_spent_quota_asks_for_no_pause() -> None:
    async with model(error(429, code="insufficient_quota"), GOOD) as (served, _):
        assert type(await refused(served)) is EngineError
        assert await served.complete(BODY)


async def test_a_pause_may_be_said_as_a_date() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    for said, least_s in ((date, 50), ("soon", 0)):
        async with model(error(503, retry_after=said)) as (served, _):
            assert (getattr(await refused(served), "retry_after_s", None) or 0) >= least_s


async def test_a_redirect_is_not_followed() -> None:
    elsewhere = response(307, {}, location="/elsewhere")
    async with model(elsewhere, GOOD) as (served, endpoint):
        assert type(await refused(served)) is EngineError
        assert endpoint.paths == ["/v1/chat/completions"]


@pytest.mark.parametrize(
    "said",
    [
        response(200, {"choices": "none"}),
        response(200, {"choices": [{"index": 0, "message": {"tool_calls": [{"id": 3}]}}]}),
        response(200, []),
        response(200, "text"),
        response(200, b"not json"),
        response(200, b"<html>", kind="text/html"),
        response(200, b"[" * 100_000),
        response(200, gzip.compress(b"x" * 100_000), content_encoding="gzip"),
    ],
)
async def test_an_answer_that_is_none_is_an_engine_error(said: bytes) -> None:
    async with model(said) as (served, _):
        assert type(await refused(served)) is EngineError


async def test_an_answer_that_is_too_large_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MAX_ANSWER_BYTES", 10_000)
    async with model(response(200, b"x" * 20_000_000)) as (served, endpoint):
        assert "too large" in (await refused(served)).message
        assert len(endpoint.arrived_s) == 1


def chunk(**changes: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": "yes"}, "finish_reason": None} | changes
    return {**ANSWER, "object": "chat.completion.chunk", "choices": [choice]}


def events(*chunks: Any) -> bytes:
    lines = b"".join(b"data: " + json.dumps(part).encode() + b"\n\n" for part in chunks)
    return response(200, lines + b"data: [DONE]\n\n", kind="text/event-stream")


async def streamed(served: RemoteModel) -> list[Any]:
    return [part async for batch in served.stream(BODY) for part in batch]


async def test_a_stream_comes_through() -> None:
    async with model(events(chunk(), chunk())) as (served, _):
        assert [c["choices"][0]["delta"]["content"] for c in await streamed(served)] == ["yes"] * 2


@pytest.mark.parametrize(
    "said",
    [
        events(chunk(), chunk(index=10**9)),
        events(chunk(), chunk(delta={"tool_calls": [{"index": 10**9, "id": "c"}]})),
        events(chunk(), chunk(delta={"content": ["yes"]})),
        events(chunk(), "text"),
        events({"error": {"message": "broken"}}),
        response(200, b"data: " + b"x" * 20_000_000, kind="text/event-stream"),
    ],
)
async def test_a_stream_that_is_none_is_an_engine_error(
    said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "MAX_ANSWER_BYTES", 100_000)
    async with model(said) as (served, _):
        with pytest.raises(EngineError):
            await streamed(served)
