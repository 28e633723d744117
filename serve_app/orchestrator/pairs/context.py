"""Models with a context tool: it runs first, and what it finds goes before the question."""

from __future__ import annotations

from serve_app.errors import ToolRetry, UnfitForPair
from serve_app.orchestrator.answer import Choice
from serve_app.orchestrator.pairs import plain
from serve_app.orchestrator.pairs.base import PairWork
from serve_app.orchestrator.pairs.join import Parts
from serve_app.tools.builtin.retrieval import MAX_QUERY_CHARS, query_line, with_question


async def run(work: PairWork, parts: Parts) -> list[Choice]:
    """Put what the tool finds for the query in the last user message, and have the model answer.

    Raises:
        UnfitForPair: If the query holds nothing that can be looked for.
    """
    query = work.call.query[:MAX_QUERY_CHARS]
    try:
        result = await parts.tools.run(work, {"query": query})
    except ToolRetry:
        # The query is the caller's, and no model can mend it.
        raise UnfitForPair(
            "messages: the last user message holds nothing to look for; say it in words, or "
            "name a pair without retrieval",
            "messages",
        ) from None
    found = result.text.removesuffix(query_line(query))
    work.change_question(lambda _: with_question(found, work.call.query))
    return await plain.run(work, parts)
