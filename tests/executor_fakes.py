"""The real pair runner in front of engines and tools that do as they are told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serve_app.budget import Budget, Deadline
from serve_app.config import AtlasConfig
from serve_app.models.reply import Choice, ChoicePiece
from serve_app.orchestrator.answer import text_of
from serve_app.orchestrator.pairs.base import PairWork
from serve_app.orchestrator.pairs.runner import PairRunner
from serve_app.orchestrator.recovery import Recovery
from serve_app.orchestrator.trace import Trace
from serve_app.schemas import ChatCall, Limits, Pair, ToolCall, Usage
from serve_app.tools.base import ToolResult
from serve_app.tools.runner import ToolRunner
from tests.path2_fakes import Engines

USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}


def reply(
    content: str | None = None,
    calls: tuple[str, ...] = (),
    usage: Any = USAGE,
    **message: Any,
) -> dict[str, Any]:
    """A whole completion that calls the calculator with each of these arguments, or answers."""
    if calls:
        message["tool_calls"] = [
            {
                "id": f"call_{number}",
                "type": "function",
                "function": {"name": "calculator", "arguments": arguments},
            }
            for number, arguments in enumerate(calls)
        ]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": content, **message},
        "finish_reason": "tool_calls" if calls else "stop",
    }
    return {"choices": [choice], "usage": usage}


class Tools(ToolRunner):
    """Tools whose results are told, at the prices that are configured.

    Attributes:
        says: A text, or an error.
        arguments: Of every call.
    """

    def __init__(self, config: AtlasConfig) -> None:
        super().__init__(config.tools)
        self.says: Any = "100"
        self.arguments: list[Any] = []

    async def run(
        self, tool_id: str, arguments: Any, *, deadline_s: float, function: str | None = None
    ) -> ToolResult:
        self.arguments.append(arguments)
        if isinstance(self.says, Exception):
            raise self.says
        price_usd = self.tool(tool_id).config.price_usd_per_call
        texts = [self.says] * len(arguments.get("pictures", ()))
        return ToolResult(self.says, {"texts": texts} if texts else {}, cost_usd=price_usd)


class Result:
    """What runs of a pair came to."""

    def __init__(self) -> None:
        self.trace = Trace("req_1")
        self.choices: list[Choice] = []

    @property
    def answer(self) -> str | None:
        return text_of(self.choices)

    @property
    def usage(self) -> Usage:
        return self.trace.root.usage

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        return self.trace.root.tool_calls()


class Bench:
    """One model with every kind of tool, and a judge."""

    def __init__(self, folder: Path, *replies: Any, **tools: Any) -> None:
        remote = {"type": "remote", "base_url": "http://127.0.0.1:1/v1", "remote_model": "x"}
        price = {"usd_per_1m_prompt_tokens": 1e3, "usd_per_1m_completion_tokens": 1e4}
        judge = {"role": "verifier", "max_completion_tokens": 100}
        pair_tools = ["none", "calculator", "lookup", "ocr", "best_of", "judged"]
        corpus = {
            "type": "retrieval",
            "tool_id": "lookup",
            "corpus": str(folder),
            "kind": "context",
        }
        judged = {"vote": "verifier", "verifier": "judge", "num_samples": 3}
        self.config = AtlasConfig.model_validate(
            {
                "models": [
                    remote | {"model_id": "m", "tools": pair_tools, "price": price},
                    remote | {"model_id": "judge", "price": price} | judge,
                ],
                "tools": [
                    {"type": "calculator", "tool_id": "calculator"} | tools,
                    corpus | tools,
                    {"type": "ocr", "tool_id": "ocr"} | tools,
                    {"type": "best_of", "tool_id": "best_of", "num_samples": 4} | tools,
                    {"type": "best_of", "tool_id": "judged"} | judged | tools,
                ],
                "data_dir": str(folder),
            }
        )
        self.replies = list(replies)
        self.engines = Engines(says={"m": lambda body: self._next(), "judge": "0.5"})
        self.tools = Tools(self.config)
        self.pairs = PairRunner(self.config, self.engines, self.tools)
        self.result = Result()
        self.recovery = Recovery()

    def _next(self) -> Any:
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]

    async def run(
        self,
        tool: str = "calculator",
        *,
        stream: bool = False,
        budget: Budget | None = None,
        query: str = "What is 20 * 5?",
        **call: Any,
    ) -> tuple[str, list[ChoicePiece]]:
        """Run the model with a tool.

        Returns:
            The text, as the pieces of the stream say it or the result, and all pieces.
        """
        chat = ChatCall(
            request_id="req_1",
            model=f"m@{tool}",
            limits=Limits(alpha=0.0, deadline_s=30),
            **({"messages": ({"role": "user", "content": query},), "sampling": {}} | call),
        )
        pieces: list[ChoicePiece] = []

        async def emit(choices: Sequence[ChoicePiece]) -> None:
            pieces.extend(choices)

        work = PairWork(
            Pair("m", tool),
            chat,
            budget or Budget(Deadline.after(30)),
            self.result.trace.root,
            emit if stream else None,
            self.recovery,
        )
        self.result.choices = []
        self.result.choices = await self.pairs.run(work)
        if not stream:
            return self.result.answer or "", pieces
        return "".join(piece.text or "" for piece in pieces), pieces
