"""The one fake of the serve tests: an engine that does as it is told, behind the real protocol in a
real Serve app."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

from serve_app.errors import EngineError, InvalidRequest


class ScriptedModel:
    """An engine with one behaviour.

    Behaviours:
        echo: answers with the JSON of the request body it got.
        fail: raises.
        refuse: says the request is wrong.
        hang: never answers.
        break: streams two pieces, then raises.
        drip: streams for ever, ten pieces a second.
        loop: calls the tool it is offered for ever.
        bad_call: calls the tool with arguments that are not JSON, then reports what came back.
        die: ends its own process.
    """

    def __init__(self, behaviour: str) -> None:
        self._behaviour = behaviour

    async def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        if body["messages"][-1]["content"] == "Hello.":  # the controller's warm-up
            return _completion({"content": "Hello."})
        match self._behaviour:
            case "fail" | "break":
                raise EngineError("scripted failure")
            case "refuse":
                raise InvalidRequest("scripted refusal")
            case "hang":
                await asyncio.sleep(3600)
            case "die":
                os._exit(1)
            case "loop":
                return _completion(_call(body, '{"expression": "1 + 1"}'))
            case "bad_call" if body["messages"][-1]["role"] != "tool":
                return _completion(_call(body, "{not json"))
            case "bad_call":
                return _completion({"content": body["messages"][-1]["content"]})
        return _completion({"content": json.dumps(body)})

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[list[dict[str, Any]]]:
        if self._behaviour == "break":
            yield [_chunk({"role": "assistant", "content": ""}), _chunk({"content": "one "})]
            yield [_chunk({"content": "two "})]
            raise EngineError("scripted break")
        while self._behaviour == "drip":
            yield [_chunk({"role": "assistant", "content": "drop "})]
            await asyncio.sleep(0.1)
        completion = await self.complete(body)
        choice = completion["choices"][0]
        message = choice["message"]
        calls = [{"index": i, **call} for i, call in enumerate(message.get("tool_calls", ()))]
        yield [
            _chunk({"content": message.get("content"), **({"tool_calls": calls} if calls else {})})
        ]
        yield [_chunk({}, choice["finish_reason"]), {"choices": [], "usage": completion["usage"]}]


class NeedsFile(ScriptedModel):
    """An engine that does not start without a file."""

    def __init__(self, path: str) -> None:
        if not os.path.exists(path):
            raise RuntimeError(f"it needs what is not there: {path}")
        super().__init__("echo")


class WithHelper(ScriptedModel):
    """An engine with a process of its own, as vLLM's, that outlives it and heeds no SIGTERM."""

    def __init__(self) -> None:
        program = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"
        self._helper = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
        super().__init__("echo")


def _call(body: dict[str, Any], arguments: str) -> dict[str, Any]:
    name = body["tools"][0]["function"]["name"]
    call = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"content": None, "tool_calls": [call]}


def _completion(message: dict[str, Any]) -> dict[str, Any]:
    finish_reason = "tool_calls" if message.get("tool_calls") else "stop"
    choice = {
        "index": 0,
        "message": {"role": "assistant", **message},
        "finish_reason": finish_reason,
    }
    return {
        "choices": [choice],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }


def _chunk(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}
