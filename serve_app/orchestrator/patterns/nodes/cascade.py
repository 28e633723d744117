"""`cascade`: cheap to dear, until an answer is good enough."""

from __future__ import annotations

import math
from dataclasses import replace

import re2

from serve_app.config.patterns.language import AskNode, CascadeNode
from serve_app.errors import AtlasError
from serve_app.orchestrator.patterns.chain import run_node
from serve_app.orchestrator.patterns.nodes.verify import failing_examples, score_of
from serve_app.orchestrator.patterns.view import NodeView, Result, Status, failed
from serve_app.tools.builtin.best_of import answer_key


async def run(node: CascadeNode, view: NodeView) -> Result:
    """Ask rung after rung.

    Returns:
        The first answer that is accepted, or the last one. Where a cap keeps the next rung from
        answering, the last answer there is, as partial.

    Raises:
        AtlasError: What the last rung failed with, where no rung gave an answer.
    """
    earlier: list[Result] = []
    result = failed(AtlasError("no rung was asked"))
    wants_logprobs = node.accept.min_logprob is not None
    for number, rung in enumerate(node.of):
        is_last = number == len(node.of) - 1
        inner = replace(view, streams=view.streams and is_last)
        result = await run_node(rung, inner, wants_logprobs=wants_logprobs and not is_last)
        view.span.attributes["rung"] = number
        if result.is_sent:
            return result
        if not result.is_usable and not (is_last and result.status is Status.REFUSED):
            continue
        if is_last or await _is_accepted(node, rung, result, earlier, view):
            return result
        earlier.append(result)
    if earlier:  # the dear one failed: a doubtful answer is better than none
        return replace(earlier[-1], status=Status.PARTIAL, failure=result.failure)
    return result


async def _is_accepted(
    node: CascadeNode, rung: AskNode, result: Result, earlier: list[Result], view: NodeView
) -> bool:
    accept, key = node.accept, answer_key(result.text)
    if result.status is not Status.OK or key is None:
        return False
    logprob = -math.inf if result.mean_logprob is None else result.mean_logprob
    if accept.min_logprob is not None and logprob < accept.min_logprob:
        return False
    if accept.agrees and key not in {answer_key(before.text) for before in earlier}:
        return False
    shown = result.shown.strip()
    if accept.pattern is not None and not re2.fullmatch(accept.pattern, shown):
        return False
    if accept.unless is not None and re2.fullmatch(accept.unless, shown):
        return False
    try:
        if accept.verifier is not None:
            score = await score_of(shown, accept.verifier, view)
            view.span.attributes["score"] = round(score, 4)
            if score < accept.min_score:
                return False
        if accept.examples is not None:
            return await failing_examples(shown, accept.examples, view) is None
    except AtlasError:
        return False
    return True
