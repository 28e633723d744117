"""What leaves a model's process can be read by a process that has no engine."""

from __future__ import annotations

import pickle
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest
from ray import cloudpickle

from serve_app.errors import AtlasError, EngineError, InvalidRequest
from serve_app.models.boundary import guarded

BODY: dict[str, Any] = {"messages": [], "max_tokens": 1}
ANSWER = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "yes"}}]}
CHUNK = {"choices": [{"index": 0, "delta": {"content": "yes"}}]}


class EngineDead(Exception):
    """An engine's own error."""


class OwnInvalid(InvalidRequest):
    """One of ours, by a class that only the engine's process has."""


class Server:
    """Fails as it is told."""

    def __init__(self, failure: Exception | None) -> None:
        self.failure = failure
        self.closed = False

    async def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        if self.failure is not None:
            raise self.failure
        return ANSWER

    async def stream(self, body: dict[str, Any]) -> AsyncGenerator[list[dict[str, Any]], None]:
        try:
            yield [CHUNK]
            if self.failure is not None:
                raise self.failure
            yield [CHUNK]
        finally:
            self.closed = True

    def check_health(self) -> None:
        if self.failure is not None:
            raise self.failure


async def left(server: Any, method: str) -> tuple[list[Any], AtlasError | None]:
    """What a caller gets of a method: pieces, and the error that ends it."""
    pieces: list[Any] = []
    try:
        if method == "stream":
            async for piece in server.stream(BODY):
                pieces.append(piece)
        else:
            pieces.append(await getattr(server, method)(*([BODY] if method == "complete" else [])))
    except AtlasError as error:
        return pieces, error
    return pieces, None


@pytest.mark.parametrize("method", ["complete", "stream", "check_health"])
@pytest.mark.parametrize(
    "failure", [EngineDead("of /a/path"), OwnInvalid("of /a/path"), ValueError("of /a/path")]
)
async def test_foreign_error_leaves_as_an_engine_error(method: str, failure: Exception) -> None:
    _, error = await left(guarded(Server)(failure), method)
    assert type(error) is EngineError
    assert error.args == ("the engine failed",)
    assert b"EngineDead" not in pickle.dumps(error)


@pytest.mark.parametrize("method", ["complete", "stream", "check_health"])
async def test_own_error_leaves_as_it_is(method: str) -> None:
    refusal = InvalidRequest("too long", "messages")
    assert (await left(guarded(Server)(refusal), method))[1] is refusal


async def test_stream_that_only_hands_on_a_generator_is_guarded_too() -> None:
    class HandsOn(Server):
        def stream(self, body: dict[str, Any]) -> AsyncGenerator[list[dict[str, Any]], None]:
            return super().stream(body)

    _, error = await left(guarded(HandsOn)(EngineDead()), "stream")
    assert type(error) is EngineError


async def test_pieces_before_the_failure_arrive() -> None:
    pieces, error = await left(guarded(Server)(EngineDead()), "stream")
    assert pieces == [[CHUNK]]
    assert error is not None


async def test_answers_pass() -> None:
    server = guarded(Server)(None)
    assert await server.complete(BODY) == ANSWER
    assert await left(server, "stream") == ([[CHUNK], [CHUNK]], None)
    assert await left(server, "check_health") == ([None], None)


@pytest.mark.parametrize("method", ["complete", "stream"])
async def test_an_answer_that_is_none_leaves_as_an_engine_error(method: str) -> None:
    class Confused(Server):
        async def complete(self, body: dict[str, Any]) -> dict[str, Any]:
            return {"choices": "none"}

        async def stream(self, body: dict[str, Any]) -> AsyncGenerator[list[dict[str, Any]], None]:
            yield [{"choices": "none"}]

    _, error = await left(guarded(Confused)(None), method)
    assert type(error) is EngineError
    assert "no chat completion" in error.message


async def test_stream_that_is_left_is_closed_at_once() -> None:
    server = guarded(Server)(None)
    async with aclosing(server.stream(BODY)) as pieces:
        await anext(pieces)
    assert server.closed


async def test_guarded_class_keeps_its_name_and_is_guarded_in_other_processes_too() -> None:
    guard = pickle.loads(cloudpickle.dumps(guarded(Server)))
    assert (guard.__name__, guard.__doc__) == (Server.__name__, Server.__doc__)
    _, error = await left(guard(EngineDead()), "complete")
    assert type(error) is EngineError
