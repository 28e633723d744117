"""Engines that answer at once or at a given pace: what is measured is everything around an engine.

`InstantModel` and `PacedModel` are custom model classes (`serve_app.models.protocol`); `python -m
benchmarks.engines --port N` is an OpenAI-compatible HTTP upstream with the same answers, for
proxies to stand before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from serve_app.models.protocol import ChatBody

MODEL_ID = "instant"
ANSWER_WORDS = ("the", "answer", "is", "here", "and", "it", "is", "short")


def completion(words: tuple[str, ...] = ANSWER_WORDS) -> dict[str, Any]:
    """An OpenAI `chat.completion` object."""
    return _envelope("chat.completion") | {
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": " ".join(words)},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": _usage(words),
    }


def chunks(words: tuple[str, ...] = ANSWER_WORDS) -> list[dict[str, Any]]:
    """OpenAI `chat.completion.chunk` objects: one per word, then the end with `usage`."""
    deltas: list[tuple[dict[str, str], str | None]] = [
        ({"role": "assistant", "content": ""}, None),
        *(({"content": f"{word} "}, None) for word in words),
        ({}, "stop"),
    ]
    pieces: list[dict[str, Any]] = [
        _envelope("chat.completion.chunk")
        | {"choices": [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}]}
        for delta, reason in deltas
    ]
    pieces.append(_envelope("chat.completion.chunk") | {"choices": [], "usage": _usage(words)})
    return pieces


def _envelope(kind: str) -> dict[str, Any]:
    return {"id": "chatcmpl-instant", "object": kind, "created": 1, "model": MODEL_ID}


def _usage(words: tuple[str, ...]) -> dict[str, int]:
    prompt_tokens = 12
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": len(words),
        "total_tokens": prompt_tokens + len(words),
    }


class InstantModel:
    """Answers every request with the same words and no work."""

    async def complete(self, body: ChatBody) -> dict[str, Any]:
        """See `ModelServer.complete`."""
        return completion()

    async def stream(self, body: ChatBody) -> AsyncIterator[list[dict[str, Any]]]:
        """See `ModelServer.stream`: the first word alone, then the rest."""
        pieces = chunks()
        yield pieces[:2]
        yield pieces[2:]


class PacedModel:
    """Answers in the same words over a given time, after the tool it is offered, if any."""

    def __init__(self, seconds: float, expression: str = "6 * 7") -> None:
        """Set the pace.

        Args:
            seconds: From the first word to the last, or to the whole answer.
            expression: What it asks the calculator.
        """
        self._seconds = seconds
        self._expression = expression

    async def complete(self, body: ChatBody) -> dict[str, Any]:
        """See `ModelServer.complete`."""
        await asyncio.sleep(self._seconds)
        answer = completion()
        if body.get("tools") and body["messages"][-1]["role"] != "tool":
            name = body["tools"][0]["function"]["name"]
            arguments = json.dumps({"expression": self._expression})
            function = {"name": name, "arguments": arguments}
            call = {"id": "call_1", "type": "function", "function": function}
            answer["choices"][0] |= {
                "message": {"role": "assistant", "content": None, "tool_calls": [call]},
                "finish_reason": "tool_calls",
            }
        return answer

    async def stream(self, body: ChatBody) -> AsyncIterator[list[dict[str, Any]]]:
        """See `ModelServer.stream`: word after word at an even pace."""
        pieces = chunks()
        for piece in pieces[:-1]:
            yield [piece]
            await asyncio.sleep(self._seconds / len(pieces))
        yield pieces[-1:]


class Upstream(asyncio.Protocol):
    """The answers over HTTP/1.1 with keep-alive, at the least cost Python allows."""

    _models = json.dumps({"object": "list", "data": [{"id": MODEL_ID, "object": "model"}]}).encode()
    _whole = json.dumps(completion()).encode()
    _stream = b"".join(b"data: " + json.dumps(piece).encode() + b"\n\n" for piece in chunks())

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer each request once its body is here."""
        assert self._transport is not None
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._buffer[:end]).lower()
            _, _, tail = head.partition(b"content-length:")
            length = int(tail.split(b"\r\n", 1)[0]) if tail else 0
            if len(self._buffer) < end + 4 + length:
                return
            body = bytes(self._buffer[end + 4 : end + 4 + length])
            del self._buffer[: end + 4 + length]
            self._transport.write(self._answer(head, body))

    def _answer(self, head: bytes, body: bytes) -> bytes:
        if head.startswith(b"get"):
            return _http(b"application/json", self._models)
        if b'"stream":true' in body.replace(b" ", b""):
            return _http(b"text/event-stream", self._stream + b"data: [DONE]\n\n")
        return _http(b"application/json", self._whole)


def _http(content_type: bytes, payload: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b" % (
        content_type,
        len(payload),
        payload,
    )


async def serve_upstream(port: int) -> None:
    """Serve on loopback until cancelled."""
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", port)
    await server.serve_forever()


def main() -> None:
    """Run the HTTP upstream."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    asyncio.run(serve_upstream(parser.parse_args().port))


if __name__ == "__main__":
    main()
