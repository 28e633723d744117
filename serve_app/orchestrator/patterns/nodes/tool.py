"""`tool`: a call of a tool with arguments that are written down."""

from __future__ import annotations

from serve_app.config.patterns.language import ToolNode
from serve_app.orchestrator.patterns.view import NodeView, Result, by_deadline


async def run(node: ToolNode, view: NodeView) -> Result:
    """Call it.

    Raises:
        AtlasError: If the arguments are wrong, or the call fails.
    """
    tools, work = view.parts.pairs.parts.tools, view.tool_work(node.tool)
    called = tools.run(work, view.filled(node.arguments))
    result = await by_deadline(called, view.budget, f"the tool {node.tool!r}")
    return Result(
        text=result.text,
        data=result.data or None,
        sources=tuple(result.data.get("sources", ())),
        max_bytes=node.max_bytes,
    )
