"""The real pair runner and tool runner, in front of a scripted model; tools run in this process."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serve_app.budget import Budget, Deadline
from serve_app.config import AtlasConfig
from serve_app.orchestrator.answer import text_of
from serve_app.orchestrator.pairs.base import PairWork
from serve_app.orchestrator.pairs.runner import PairRunner
from serve_app.orchestrator.pairs.selection import Embed
from serve_app.orchestrator.recovery import Recovery
from serve_app.orchestrator.trace import Trace
from serve_app.schemas import ChatCall, Limits, Pair, ToolCall
from serve_app.tools.base import ToolResult
from serve_app.tools.runner import ToolRunner
from tests.path2_fakes import Engines

CALCULATOR = {"type": "calculator", "tool_id": "calculator", "price_usd_per_call": 0.5}
NOTES = {
    "type": "custom",
    "tool_id": "notes",
    "import_path": "tests.own_tools:Notes",
    "price_usd_per_call": 2.0,
}
DESK = {
    "type": "toolset",
    "tool_id": "desk",
    "description": "sums and notes",
    "members": ["calculator", "notes"],
}


def reply(*calls: tuple[str, Any], text: str | None = None) -> dict[str, Any]:
    """A completion with calls of functions, each with its arguments or their text; or an answer."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [
            {
                "id": f"call_{number}",
                "type": "function",
                "function": {
                    "name": name,
                    "arguments": given if isinstance(given, str) else json.dumps(given),
                },
            }
            for number, (name, given) in enumerate(calls)
        ]
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if calls else "stop"}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    return {"choices": [choice], "usage": usage}


class LocalTools(ToolRunner):
    """Checks, queues and counts as ever, but runs calls here.

    Attributes:
        does: What happens instead of a call, given function and arguments; `None`: the call.
        ran: Tool and function of every call, as they begin.
    """

    def __init__(self, config: AtlasConfig) -> None:
        super().__init__(config.tools)
        self.does: Callable[[str, Any], Any] | None = None
        self.ran: list[tuple[str, str]] = []

    async def _dispatch(
        self, entry: Any, function: str, arguments: Any, deadline_s: float
    ) -> ToolResult:
        self.ran.append((entry.tool.tool_id, function))
        try:
            if self.does is None:
                result: ToolResult = entry.tool.call(function, arguments, deadline_s)
                return result
            said = self.does(function, arguments)
            said = await said if inspect.isawaitable(said) else said
            if isinstance(said, Exception):
                raise said
            return ToolResult(str(said))
        finally:
            entry.leave()


async def _on_record() -> None:
    """The request has an idempotency key."""


class ToolsetBench:
    """One model with tools of many functions."""

    def __init__(
        self,
        folder: Path,
        *replies: Any,
        tools: tuple[dict[str, Any], ...] = (CALCULATOR, NOTES, DESK),
        embed: Embed | None = None,
        **limits: int,
    ) -> None:
        self.config = AtlasConfig.model_validate(
            {
                "models": [
                    {
                        "type": "remote",
                        "base_url": "http://127.0.0.1:1/v1",
                        "remote_model": "x",
                        "model_id": "m",
                        "tools": ["none", *(str(tool["tool_id"]) for tool in tools)],
                    }
                ],
                "tools": list(tools),
                "gateway": {"limits": limits},
                "data_dir": str(folder),
            }
        )
        self.replies = list(replies)
        self.engines = Engines(says={"m": lambda body: self.replies.pop(0)})
        self.tools = LocalTools(self.config)
        self.pairs = PairRunner(self.config, self.engines, self.tools, embed)
        self.trace = Trace("req_1")
        self.recovery = Recovery()

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """What is on record of the calls."""
        return self.trace.root.tool_calls()

    def told(self, number: int = 1) -> list[str]:
        """What the model was told of its calls when it was asked for the so-many-th time again."""
        messages = self.engines.asked("m")[number]["messages"]
        last = max(n for n, message in enumerate(messages) if message["role"] == "assistant")
        return [message["content"] for message in messages[last + 1 :]]

    def offered(self, number: int = 0) -> list[str]:
        """The functions of the so-many-th request."""
        return [tool["function"]["name"] for tool in self.engines.asked("m")[number]["tools"]]

    async def run(
        self, tool: str = "desk", query: str = "What is it?", budget: Budget | None = None
    ) -> str | None:
        """The model's answer with a tool."""
        call = ChatCall(
            request_id="req_1",
            model=f"m@{tool}",
            messages=({"role": "user", "content": query},),
            limits=Limits(alpha=0.0, deadline_s=60),
            sampling={},
            begin_effect=_on_record,
        )
        work = PairWork(
            Pair("m", tool),
            call,
            budget or Budget(Deadline.after(60)),
            self.trace.root,
            recovery=self.recovery,
        )
        return text_of(await self.pairs.run(work))
