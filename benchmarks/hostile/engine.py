"""A stub engine on loopback: an OpenAI-compatible server that answers as badly as it is asked to.

The last user message names the behaviour. How to run: `python -m benchmarks.hostile.engine PORT`.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

Json = dict[str, Any]
MIB = 1 << 20

USAGE: Json = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}


def answer(content: Any = "4", **message: Any) -> Json:
    """A whole completion."""
    said = {"role": "assistant", "content": content, **message}
    choice = {"index": 0, "message": said, "finish_reason": "stop"}
    head = {"id": "x", "object": "chat.completion", "created": 1, "model": "m"}
    return {**head, "choices": [choice], "usage": USAGE}


def calling(arguments: Any, **call: Any) -> Json:
    """A completion that calls the calculator."""
    function = {"name": "calculator", "arguments": arguments}
    return answer(None, tool_calls=[{"id": "c1", "type": "function", "function": function, **call}])


CALL: Json = calling("{}")["choices"][0]["message"]["tool_calls"][0]


def chunk(delta: Any, **fields: Any) -> bytes:
    """One streamed event."""
    head = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    choice = {"index": 0, "delta": delta, "finish_reason": None}
    return b"data: " + json.dumps({**head, "choices": [choice], **fields}).encode() + b"\n\n"


def tool_piece(index: Any, **fields: Any) -> bytes:
    """A streamed piece of a tool call."""
    call = {"index": index, "function": {"name": "calculator", "arguments": "{"}, **fields}
    return chunk({"tool_calls": [call]})


def _without(*path: str | int) -> Json:
    """A tool call that lacks one field."""
    completion = calling("{}")
    place: Any = completion
    for step in path[:-1]:
        place = place[step]
    del place[path[-1]]
    return completion


_MESSAGE = ("choices", 0, "message")
_CALL = (*_MESSAGE, "tool_calls", 0)

WHOLE: dict[str, Callable[[], Json | bytes]] = {
    "good": lambda: answer("The answer is 4."),
    "30k blanks": lambda: answer("#### a" + " " * 30_000 + "b"),
    "30k blanks in code": lambda: answer("def f():\n    x" + " " * 30_000 + "y"),
    "30k blanks before a unit": lambda: answer("#### 5" + " " * 30_000 + "%x"),
    "marks on one letter": lambda: answer("a" + "\u0300\u0316" * 15_000),
    "100k digits": lambda: answer("#### " + "9" * 100_000),
    "arguments nested 100000 deep": lambda: calling('{"expression":' + "[" * 100_000),
    "a number of 5000 digits": lambda: calling('{"expression":' + "9" * 5000 + "}"),
    "arguments that are an object": lambda: calling({"expression": "1"}),
    "1 MiB of arguments": lambda: calling('{"expression":"' + "1+" * (MIB // 2) + '"}'),
    "no message": lambda: _without(*_MESSAGE),
    "no id of a call": lambda: _without(*_CALL, "id"),
    "no function": lambda: _without(*_CALL, "function"),
    "1000 calls": lambda: answer(None, tool_calls=[CALL] * 1000),
    "content that is a number": lambda: answer(4),
    "a surrogate": lambda: answer("\ud800"),
    "usage that is text": lambda: answer() | {"usage": {"prompt_tokens": "ten"}},
    "usage of 10**30": lambda: answer() | {"usage": USAGE | {"completion_tokens": 10**30}},
    "usage that is NaN": lambda: json.dumps(
        answer() | {"usage": {"prompt_tokens": float("nan")}}
    ).encode(),
    "no choices": lambda: answer() | {"choices": []},
    "choices that are an object": lambda: answer() | {"choices": {}},
    "1,000 choices": lambda: answer() | {"choices": answer()["choices"] * 1_000},
    "a list": lambda: b"[]",
    "nothing": lambda: b"",
    "HTML": lambda: b"<html>" + b"x" * MIB,
    "JSON nested 100000 deep": lambda: b"[" * 100_000,
    "100 MiB": lambda: json.dumps(answer("x" * (100 * MIB))).encode(),
    "1 MiB of empty lists": lambda: b'{"x":[' + b"[]," * (MIB // 3) + b"[]]}",
}


async def _endless(piece: bytes) -> AsyncIterator[bytes]:
    while True:
        yield piece
        await asyncio.sleep(0)  # else nobody hears that the other side has left


async def _pieces(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


STREAMS: dict[str, Callable[[], AsyncIterator[bytes]]] = {
    "a call of index 10**9": lambda: _pieces(tool_piece(10**9), b"data: [DONE]\n\n"),
    "a call of negative index": lambda: _pieces(tool_piece(-1), b"data: [DONE]\n\n"),
    "a choice of index 10**9": lambda: _pieces(
        chunk({"content": "x"}).replace(b'"index": 0', b'"index": 1000000000')
    ),
    "a delta that is a list": lambda: _pieces(chunk([1])),
    "a chunk of 16 MiB": lambda: _pieces(chunk({"content": "x" * (16 * MIB)})),
    "endless small chunks": lambda: _endless(chunk({"content": "x"})),
    "endless empty deltas": lambda: _endless(chunk({})),
    "endless arguments": lambda: _endless(tool_piece(0)),
    "endless chunks of 64 KiB": lambda: _endless(chunk({"content": "x" * 65536})),
    "endless comments": lambda: _endless(b": ping\n\n" * 100),
    "a line without end": lambda: _endless(b"data: " + b"x" * 65536),
    "chunks that are no JSON": lambda: _pieces(b"data: {\n\n"),
    "usage that is text, streamed": lambda: _pieces(
        chunk({"content": "x"}, usage={"prompt_tokens": "x"})
    ),
}

ERRORS: dict[str, Callable[[], Response]] = {
    "a 400 of 10 MiB": lambda: Response(
        json.dumps({"error": {"message": "x" * (10 * MIB)}}), 400, media_type="application/json"
    ),
    "a 500": lambda: Response("{}", 500, media_type="application/json"),
    "a redirect": lambda: Response("", 302, {"location": "http://127.0.0.1:1/"}),
    "a gzip bomb": lambda: Response(
        gzip.compress(json.dumps(answer("x" * (64 * MIB))).encode()),
        200,
        {"content-encoding": "gzip"},
        media_type="application/json",
    ),
}


async def chat(request: Request) -> Response:
    """Misbehave as asked."""
    body = json.loads(await request.body())
    name = body["messages"][-1]["content"]
    if name in ERRORS:
        return ERRORS[name]()
    if name in STREAMS:
        return StreamingResponse(STREAMS[name](), media_type="text/event-stream")
    said = WHOLE.get(name, WHOLE["good"])()
    if isinstance(said, dict) and body.get("n", 1) > 1:
        said["choices"] = [c | {"index": i} for i in range(body["n"]) for c in said["choices"]]
    raw = said if isinstance(said, bytes) else json.dumps(said).encode()
    if body.get("stream") and isinstance(said, dict):
        content = str(said["choices"][0]["message"]["content"])
        return StreamingResponse(_pieces(chunk({"content": content}), b"data: [DONE]\n\n"))
    return Response(raw, media_type="application/json")


def main() -> None:
    """Serve on a port of loopback."""
    app = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])
    # Without a limit, an endless answer outlives SIGTERM.
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        log_level="critical",
        timeout_graceful_shutdown=1,
    )


if __name__ == "__main__":
    main()
