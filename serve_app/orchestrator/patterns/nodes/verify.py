"""`verify`: checks of a result."""

from __future__ import annotations

from dataclasses import replace

import re2

from serve_app.config.patterns.language import VerifyNode
from serve_app.errors import EngineError, ToolRetry, ToolTimeout
from serve_app.models.verifier import read_score, scoring_body
from serve_app.orchestrator.patterns import facts
from serve_app.orchestrator.patterns.nodes.ask import read_json
from serve_app.orchestrator.patterns.view import NodeView, Result, Status, by_deadline
from serve_app.orchestrator.trace import SpanKind
from serve_app.tools.reports import code_in, trials_in

_FAULT = "fault"
"""Key in `data` of what is wrong with a result that is kept all the same."""


async def run(node: VerifyNode, view: NodeView) -> Result:
    """Check.

    Returns:
        The result that was checked, if nothing is wrong with it or the node keeps it all the same;
        else a refusal.

    Raises:
        EngineError: If something is wrong, and the node says so.
        AtlasError: If the check itself cannot be made.
    """
    checked = view.results[node.of]
    result, fault = await _check(node, checked, view)
    view.span.attributes["passed"] = fault is None
    if fault is None:
        return replace(result, fault=None)
    view.span.attributes["fault"] = fault[:200]
    if node.otherwise == "fail":
        raise EngineError(f"the answer does not pass the check {node.check!r}: {fault}")
    if node.otherwise == "refuse":
        return Result(Status.REFUSED, text=view.fill(node.say))
    return replace(checked, data={_FAULT: fault}, fault=fault)


async def _check(node: VerifyNode, checked: Result, view: NodeView) -> tuple[Result, str | None]:
    """The result, with what the check adds to it, and what is wrong with it."""
    text = checked.text.strip()
    num_citable = checked.num_citable if node.sources is None else None
    sources = checked.sources if node.sources is None else view.results[node.sources].sources
    fault: str | None = None
    match node.check:
        case "schema":
            assert node.output is not None
            data, fault = read_json(text, node.output)
            checked = replace(checked, data=data)
        case "pattern":
            if not re2.fullmatch(node.pattern, text):
                fault = "it does not match the pattern"
        case "length":
            if not node.min_chars <= len(text) <= node.max_chars:
                fault = f"it has {len(text)} characters"
        case "grounded":
            fault = facts.ungrounded(text, [source["text"] for source in sources])
        case "citations":
            count = len(sources) if num_citable is None else num_citable
            fault = facts.wrong_citations(text, count)
        case "examples":
            assert node.tool is not None
            fault = await failing_examples(text, node.tool, view)
        case "verifier":
            assert node.verifier is not None
            score = await score_of(checked.shown.strip(), node.verifier, view)
            view.span.attributes["score"] = round(score, 4)
            fault = None if score >= node.min_score else f"the verifier gives it {score:.2f}"
    return checked, fault


async def score_of(text: str, verifier: str, view: NodeView) -> float:
    """What a verifier gives an answer to the question, in [0, 1].

    Raises:
        AtlasError: If it gives no score.
    """
    models = view.parts.pairs.parts.models
    messages = scoring_body(view.question, text)["messages"]
    body = models.body(verifier, {}, messages)
    with view.span.child(SpanKind.VALIDATION, verifier) as span:
        asked = models.complete_all(view.work, verifier, [body], view.budget, span)
        (reply,) = await by_deadline(asked, view.budget, f"the verifier {verifier!r}")
    return read_score(reply)


async def failing_examples(text: str, tool: str, view: NodeView) -> str | None:
    """What the answer's code does other than the examples of the question say, in words.

    Returns:
        `None`: nothing, or there are no examples.

    Raises:
        AtlasError: If the tool cannot try them.
    """
    if not trials_in(view.question, code_in(text)):
        return None
    arguments = {"code": text, "report": view.question}
    ran = view.parts.pairs.parts.tools.run(view.tool_work(tool), arguments)
    try:
        said = await by_deadline(ran, view.budget, f"the tool {tool!r}")
    except (ToolRetry, ToolTimeout) as failure:  # the tool refuses the code, or it takes too long
        return failure.message
    works = said.data["kind"] == "none" and said.data["code"]
    return None if works else said.text
