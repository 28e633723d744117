"""`refuse`: an end without an answer."""

from __future__ import annotations

from serve_app.config.patterns.language import RefuseNode
from serve_app.orchestrator.patterns.view import NodeView, Result, Status


async def run(node: RefuseNode, view: NodeView) -> Result:
    """Refuse where the predicate holds; else nothing."""
    if node.when is not None and not view.holds(node.when):
        return Result()
    return Result(Status.REFUSED, text=view.fill(node.say))
