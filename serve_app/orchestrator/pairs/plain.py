"""Models without a tool of the pair's: plain generation, or the caller's own tools."""

from __future__ import annotations

from serve_app.models.reply import Choice
from serve_app.orchestrator.pairs.base import PairWork
from serve_app.orchestrator.pairs.function import with_callers_tools
from serve_app.orchestrator.pairs.join import JoinParts


async def run(work: PairWork, parts: JoinParts) -> list[Choice]:
    """Have the model answer."""
    work.add_note()
    call = work.call
    if call.tools and call.tool_choice != "none":
        return await with_callers_tools(work, parts)
    body = parts.models.body(work.pair.model_id, call.sampling, work.messages)
    if call.tools:
        body |= {"tools": list(call.tools), "tool_choice": "none"}
    return await parts.models.generate(work, body, lambda: work.send)
