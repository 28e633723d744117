"""Nodes one after the other, each on record and within its time."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from serve_app.budget import Deadline
from serve_app.config.patterns.check import max_bytes_of
from serve_app.config.patterns.language import (
    AskNode,
    NodeBase,
    RefuseNode,
    RetrieveNode,
    ToolNode,
    VerifyNode,
)
from serve_app.errors import AtlasError, KeyRequired, ServiceError
from serve_app.orchestrator.patterns.view import NodeView, Result, Status, failed, is_cap
from serve_app.orchestrator.trace import SpanKind

logger = logging.getLogger(__name__)

RunNode = Callable[..., Awaitable[Result]]
NODES: dict[type[NodeBase], RunNode] = {}
"""How each kind of node runs; filled by `nodes`."""


async def run_node(node: NodeBase, view: NodeView, **options: Any) -> Result:
    """Run one node; whatever happens to it is its result, unless the caller has to be told.

    Only faults of ours are logged: a failure that is foreseen is on record in the trace.

    Args:
        node: The node.
        view: What it is given.
        options: Of its kind, for whoever knows it.

    Raises:
        KeyRequired: If a call in it acts once, and the request has no idempotency key.
    """
    budget = view.budget
    if node.seconds is not None:
        budget = budget.child(Deadline.after(node.seconds))
    name = node.kind if node.id is None else f"{node.kind} {node.id}"
    with view.span.child(SpanKind.NODE, name) as span:
        try:
            result = await NODES[type(node)](
                node, replace(view, budget=budget, span=span), **options
            )
        except KeyRequired:
            raise
        except AtlasError as failure:
            result = failed(failure)
        except Exception:
            logger.exception("request %s: %s failed", view.work.call.request_id, name)
            result = failed(ServiceError(f"the node {name!r} failed"))
        span.attributes["status"] = result.status.value
        if result.failure is not None:
            span.error = result.failure.message
    return replace(result, max_bytes=min(result.max_bytes, max_bytes_of(node)))


async def run_chain(
    nodes: Sequence[NodeBase], view: NodeView, *, answer: str | None = None
) -> Result:
    """Run nodes in their order until one refuses, fails or is cut short by a cap.

    Args:
        nodes: At least one.
        view: What they see first; each sees the results of those before it.
        answer: Id of the one whose result is the chain's; `None`: the last, a `refuse` that did
            not refuse left out.

    Returns:
        The result of that node. If a cap ended the chain before it was done, what there was of an
        answer, as partial.
    """
    wanted = answer or nodes[-1].id
    results: dict[str, Result] = {}
    last = said = Result()
    spoiled: Result | None = None
    for number, node in enumerate(nodes):
        inner = replace(
            view,
            results={**view.results, **results},
            streams=view.streams and number == len(nodes) - 1 and wanted in (None, node.id),
        )
        result = await run_node(node, inner)
        if result.status is Status.REFUSED:
            return result
        if result.status is Status.FAILED:
            return _cut_short(result, results.get(answer or "") or said)
        if spoiled is None and result.status is Status.PARTIAL:
            spoiled = result
        if not isinstance(node, RefuseNode):
            last = result
        if _speaks(node):
            said = result
        if node.id is not None:
            results[node.id] = result
    found = results[answer] if answer is not None else last
    if spoiled is not None and found.status is Status.OK:
        return replace(found, status=Status.PARTIAL, failure=spoiled.failure)
    return found


def _speaks(node: NodeBase) -> bool:
    """Whether a node's text may stand in for an answer: no source, no label, no verdict."""
    silent = ToolNode | RetrieveNode | RefuseNode | VerifyNode
    return not isinstance(node, silent) and not (isinstance(node, AskNode) and node.output)


def _cut_short(result: Result, there: Result) -> Result:
    """What a chain comes to whose node failed, with what there was of an answer before."""
    if not is_cap(result.failure) or result.is_sent:
        return result
    if not there.text:
        return result
    return replace(there, status=Status.PARTIAL, failure=result.failure)
