"""Models with a context tool: it runs first, and what it finds goes before the question."""

from __future__ import annotations

from serve_app.config.tools import OcrConfig
from serve_app.content import pictures_of, text_of_content, with_pictures
from serve_app.errors import ToolRetry, UnfitForPair
from serve_app.models.reply import Choice
from serve_app.orchestrator.pairs import plain
from serve_app.orchestrator.pairs.base import PairWork
from serve_app.orchestrator.pairs.join import JoinParts
from serve_app.tools.builtin.retrieval import MAX_QUERY_CHARS, query_line, with_question


async def run(work: PairWork, parts: JoinParts) -> list[Choice]:
    """Put what the tool finds for the query in the last user message, and have the model answer.

    Raises:
        UnfitForPair: If the query holds nothing that can be looked for.
    """
    if isinstance(parts.tools.tool(work.pair.tool_id).config, OcrConfig):
        await _read_pictures(work, parts)
        return await plain.run(work, parts)
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


async def _read_pictures(work: PairWork, parts: JoinParts) -> None:
    """Put the text of every picture before its question, in its place if the model sees nothing.

    Raises:
        UnfitForPair: If the request has no picture.
    """
    urls = [
        picture["image_url"]["url"]
        for message in work.messages
        for picture in pictures_of(message.get("content"))
    ]
    if not urls:
        raise UnfitForPair("messages: there is no picture to read", "messages")
    result = await parts.tools.run(work, {"pictures": urls})
    texts, sees = iter(result.data["texts"]), parts.models.sees(work.pair.model_id)
    for message in work.messages:
        content = message.get("content")
        found = [next(texts) for _ in pictures_of(content)]
        if found:
            text = with_question("\n\n".join(found), text_of_content(content))
            message["content"] = with_pictures(text, pictures_of(content) if sees else [])
