"""`retrieve`: sentences of a corpus, as far as they are near enough to the query."""

from __future__ import annotations

from typing import Any

from serve_app.config.patterns.language import RetrieveNode
from serve_app.errors import ToolFailed, ToolRetry
from serve_app.orchestrator.patterns.facts import names_in, words_in
from serve_app.orchestrator.patterns.view import NodeView, Result, by_deadline
from serve_app.tools.builtin.retrieval import MAX_QUERY_CHARS


async def run(node: RetrieveNode, view: NodeView) -> Result:
    """Look sentences up; a query without a word finds nothing.

    Raises:
        ToolFailed: If the search fails, or similarity counts and the tool has no encoder.
    """
    tools, work = view.parts.pairs.parts.tools, view.tool_work(node.corpus)
    query = view.fill(node.query)[:MAX_QUERY_CHARS]
    searched = tools.run(work, {"query": query})
    try:
        found = await by_deadline(searched, view.budget, f"the tool {node.corpus!r}")
    except ToolRetry:
        return Result(max_bytes=node.max_bytes)
    sources: list[dict[str, Any]] = found.data.get("sources", [])
    if node.min_score > -1.0:
        if any(source.get("similarity") is None for source in sources):
            raise ToolFailed(f"min_score: the tool {node.corpus!r} has no encoder")
        sources = [source for source in sources if source["similarity"] >= node.min_score]
    if node.has_names:
        names = {name.casefold() for name in names_in(query)}
        sources = [
            source
            for source in sources
            if names <= words_in(f"{source.get('title', '')} {source['text']}")
        ]
    kept = tuple(sources[: node.top_k])
    view.span.attributes["sources"] = len(kept)
    lines = [f"[{number}] {source['text']}" for number, source in enumerate(kept, start=1)]
    return Result(text="\n".join(lines), sources=kept, max_bytes=node.max_bytes)
