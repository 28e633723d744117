"""`refuse`: an end without an answer."""

from __future__ import annotations

from serve_app.config.patterns.language import RefuseNode
from serve_app.orchestrator.patterns.scope import Result, Scope, Status


async def run(node: RefuseNode, scope: Scope) -> Result:
    """Refuse where the predicate holds; else nothing."""
    if node.when is not None and not scope.holds(node.when):
        return Result()
    return Result(Status.REFUSED, text=scope.fill(node.say))
