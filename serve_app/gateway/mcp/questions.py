"""`ask` and `route`: the pool's chat API as two MCP tools.

A call runs what `POST /v1/chat/completions` or `POST /v1/route` run, with one user message, so the
answer, the limits, the outcome and the request id are those of any other request.
"""

from __future__ import annotations

import json
from typing import Any

from mcp_types import CallToolResult, Tool
from pydantic import BaseModel, Field
from pydantic_core import CoreSchema

from serve_app.gateway.chat.parsing import validate
from serve_app.gateway.chat.wire import (
    ROUTED_MODEL,
    Alpha,
    DeadlineS,
    MaxCostUsd,
    ModelName,
    Wire,
)
from serve_app.gateway.edge.exchange import Exchange
from serve_app.gateway.handlers import Handlers
from serve_app.gateway.json_schema import DescribedSchema
from serve_app.gateway.mcp.tool import ExposedTool, Json, hints, result
from serve_app.schemas import PATTERN_PREFIX, Effects, MemberState, PoolState

OPTIONS = ("alpha", "max_cost_usd", "deadline_s")
"""Arguments that are fields of the `atlas` object in a chat's body."""

_MAX_NAMES = 32


class QuestionArguments(Wire):
    """The arguments of `ask` and `route`."""

    question: str = Field(min_length=1)
    """The whole question; nothing of an earlier call is remembered."""
    model: ModelName = ROUTED_MODEL
    """Who answers."""
    alpha: Alpha | None = None
    """Cost-quality dial: 0 = quality only, 1 = cost only; `null`: the server's default."""
    max_cost_usd: MaxCostUsd | None = None
    """Dollars that the answer may cost."""
    deadline_s: DeadlineS | None = None
    """Seconds that the answer may take."""

    def chat(self) -> Json:
        """The question as a body of `POST /v1/chat/completions`."""
        options = {name: value for name in OPTIONS if (value := getattr(self, name)) is not None}
        messages = [{"role": "user", "content": self.question}]
        return {"model": self.model, "messages": messages, "atlas": options}


class Answered(BaseModel):
    """The structured result of `ask`."""

    answer: str
    pair: str
    """Model and tool, or pattern, that answered."""
    path: str
    """Who decided on the pair."""
    request_id: str
    """Names the request in `GET /v1/trajectories/{request_id}` and `POST /v1/feedback`."""
    cost_usd: float
    seconds: float
    finish_reason: str | None
    partial: bool
    """Whether a limit cut the answer off."""
    stopped_by: str | None
    """The limit that did."""
    sources: list[dict[str, Any]]
    """What the answer cites."""


class _Untitled(DescribedSchema):
    """A schema without a title for each field: a title repeats the field's name."""

    def field_title_should_be_set(self, schema: CoreSchema | Any) -> bool:
        return False


def _schema(model: type[BaseModel]) -> Json:
    schema = model.model_json_schema(schema_generator=_Untitled)
    del schema["title"], schema["description"]
    return schema


_ARGUMENTS = _schema(QuestionArguments)
_RESULT = _schema(Answered)


class Questions:
    """Makes the two tools; both ask the gateway's own handlers."""

    def __init__(self, api: Handlers) -> None:
        """Ask these handlers."""
        self._api = api

    def tools(self, pool: PoolState, effects: Effects) -> list[ExposedTool]:
        """The tools as they are now.

        Args:
            pool: Names who can answer.
            effects: The strongest that a tool of the pool may have, and so `ask`.
        """
        arguments = _naming(pool)
        ask = Tool(
            name="ask",
            description="Ask the pool of models a question. A router chooses the model and the "
            "tool, or the pattern of calls, that answer best at the lowest cost.",
            input_schema=arguments,
            output_schema=_RESULT,
            annotations=hints("Ask", effects),
        )
        route = Tool(
            name="route",
            description="Say who would answer a question and why, with the scores of every "
            "candidate. Nothing is asked.",
            input_schema=arguments,
            annotations=hints("Route", Effects.NONE),
        )
        return [ExposedTool(ask, self._ask), ExposedTool(route, self._route)]

    async def _ask(self, exchange: Exchange, arguments: Json) -> CallToolResult:
        answer, told = await self._api.complete(
            exchange, validate(QuestionArguments, arguments).chat()
        )
        choice = answer.choices[0]
        answered = Answered(
            answer=choice.text or "",
            pair=told["pair"],
            path=told["path"],
            request_id=told["request_id"],
            cost_usd=told["cost_usd"],
            seconds=told["seconds"],
            finish_reason=choice.finish_reason,
            partial=told.get("partial", False),
            stopped_by=told.get("stopped_by"),
            sources=told.get("sources", []),
        )
        return result(exchange, answered.answer, answered.model_dump())

    async def _route(self, exchange: Exchange, arguments: Json) -> CallToolResult:
        decision = await self._api.decide(exchange, validate(QuestionArguments, arguments).chat())
        return result(exchange, json.dumps(decision, ensure_ascii=False), decision)


def _naming(pool: PoolState) -> Json:
    """The schema of the arguments, with the names of those who can answer now."""
    models = [m.model_id for m in pool.models if m.state is MemberState.READY]
    names = [*models, *(f"{PATTERN_PREFIX}{name}" for name in pool.ready_patterns())]
    shown = ", ".join(names[:_MAX_NAMES]) + (", …" if len(names) > _MAX_NAMES else "")
    told = f"Who answers: '{ROUTED_MODEL}' lets the router choose; or one of: {shown}."
    properties = _ARGUMENTS["properties"]
    model = properties["model"] | {"description": told}
    return _ARGUMENTS | {"properties": properties | {"model": model}}
