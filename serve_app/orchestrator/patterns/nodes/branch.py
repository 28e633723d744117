"""`branch`: the first way whose predicate holds."""

from __future__ import annotations

from serve_app.config.patterns.language import BranchNode
from serve_app.orchestrator.patterns.chain import run_chain
from serve_app.orchestrator.patterns.scope import Result, Scope


async def run(node: BranchNode, scope: Scope) -> Result:
    """Run that way; with none, the result is empty."""
    for number, case in enumerate(node.cases):
        if scope.holds(case.when):
            scope.span.attributes["way"] = number
            return await run_chain(case.do, scope)
    scope.span.attributes["way"] = "else"
    return await run_chain(node.otherwise, scope) if node.otherwise else Result()
