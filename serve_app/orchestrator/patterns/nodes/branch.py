"""`branch`: the first way whose predicate holds."""

from __future__ import annotations

from serve_app.config.patterns.language import BranchNode
from serve_app.orchestrator.patterns.chain import run_chain
from serve_app.orchestrator.patterns.view import NodeView, Result


async def run(node: BranchNode, view: NodeView) -> Result:
    """Run that way; with none, the result is empty."""
    for number, case in enumerate(node.cases):
        if view.holds(case.when):
            view.span.attributes["way"] = number
            return await run_chain(case.do, view)
    view.span.attributes["way"] = "else"
    return await run_chain(node.otherwise, view) if node.otherwise else Result()
