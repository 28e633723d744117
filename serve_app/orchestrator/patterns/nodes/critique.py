"""`critique`: a draft, critics side by side, and at most one revision."""

from __future__ import annotations

from dataclasses import replace

from serve_app.config.patterns.check import WORD_BYTES
from serve_app.config.patterns.language import AskNode, CritiqueNode, VerifyNode
from serve_app.orchestrator.patterns.chain import run_node
from serve_app.orchestrator.patterns.view import NodeView, Result, Status, is_cap, side_by_side

_CONTENT = "ok"
"""How a critic's answer begins that has nothing to object to."""


async def run(node: CritiqueNode, view: NodeView) -> Result:
    """Draft, criticise, revise.

    Returns:
        The draft where nobody objects; else the revision, unless checks object to more of it than
        of the draft. A draft that could not be criticised or revised for lack of time or money is
        returned as partial.

    Raises:
        AtlasError: If there is no draft.
    """
    inner = replace(view, streams=False)
    draft = await run_node(node.draft, inner)
    if not draft.is_usable:
        return draft
    objections, before, cap = await _objections(node, draft, inner)
    view.span.attributes["objections"] = len(objections)
    if cap is not None:
        return replace(draft, status=Status.PARTIAL, failure=cap.failure)
    if not objections:
        return draft
    told = Result(text="\n".join(objections), max_bytes=WORD_BYTES)
    revised = await run_node(node.revise, inner.seeing(draft=draft, objections=told))
    if not revised.is_usable:
        if revised.status is Status.FAILED and not is_cap(revised.failure):
            return draft  # the reviser failed, and the draft is an answer all the same
        return replace(draft, status=Status.PARTIAL, failure=revised.failure)
    checks = [critic for critic in node.critics if isinstance(critic, VerifyNode)]
    after = await _failed_checks(checks, revised, inner)
    view.span.attributes["objections_after"] = after
    return draft if after > before else revised


async def _objections(
    node: CritiqueNode, draft: Result, view: NodeView
) -> tuple[list[str], int, Result | None]:
    """What the critics object to, how many of those are checks, and the critic that a cap ended.

    `None`: a cap ended none.
    """
    seen = view.seeing(draft=draft)
    works = {str(n): _criticise(critic, draft, seen) for n, critic in enumerate(node.critics)}
    said = list((await side_by_side(works)).values())
    checks = sum(
        isinstance(of, VerifyNode)
        for of, (_, words) in zip(node.critics, said, strict=True)
        if words
    )
    cap = next((result for result, _ in said if is_cap(result.failure)), None)
    return [words for _, words in said if words], checks, cap


async def _criticise(
    critic: AskNode | VerifyNode, draft: Result, view: NodeView
) -> tuple[Result, str | None]:
    """What one critic came to, and its objection; one that fails has none."""
    if isinstance(critic, VerifyNode):
        result = await run_node(critic.model_copy(update={"otherwise": "keep"}), view)
        return result, result.fault
    result = await run_node(critic, view)
    if not result.is_usable or result.text.strip().casefold().startswith(_CONTENT):
        return result, None
    return result, result.shown


async def _failed_checks(checks: list[VerifyNode], revised: Result, view: NodeView) -> int:
    seen = view.seeing(draft=revised)
    works = {str(n): _criticise(check, revised, seen) for n, check in enumerate(checks)}
    return sum(words is not None for _, words in (await side_by_side(works)).values())
