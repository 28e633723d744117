"""`parallel`: nodes side by side, put together; without waiting for more than are needed."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from serve_app.config.patterns.check import WORD_BYTES
from serve_app.config.patterns.language import AskNode, ParallelNode
from serve_app.errors import AtlasError, EngineError, ServiceError
from serve_app.orchestrator.patterns.chain import run_node
from serve_app.orchestrator.patterns.view import (
    NodeView,
    Result,
    Status,
    by_deadline,
    end,
    is_cap,
)


async def run(node: ParallelNode, view: NodeView) -> Result:
    """Run them until enough have succeeded, end the others, and join the results.

    Where the same result is wanted again, all are waited for.

    Returns:
        The joined result. It is partial where a cap kept some from ending.

    Raises:
        AtlasError: What one failed with, where too few succeeded.
    """
    inner = replace(view, streams=False)
    if node.each is None:
        works = [run_node(branch, inner) for branch in node.do]
    else:
        (branch,) = node.do
        works = [run_node(branch, inner.seeing(item=Result(text=item))) for item in node.each]
    needed = 1 if node.join == "first" else node.quorum or len(works)
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        running = set(tasks)
        while running and (good := sum(map(_succeeded, tasks))) < needed <= good + len(running):
            _, running = await asyncio.wait(running, return_when=view.until)
    finally:
        await end(*tasks)
    results = [task.result() for task in tasks if task.done() and not task.cancelled()]
    usable = [result for result in results if result.is_usable]
    view.span.attributes |= {"succeeded": len(usable), "of": len(tasks)}
    failures = [result.failure for result in results if result.status is Status.FAILED]
    enough = len(usable) >= needed
    if not enough and not (usable and any(is_cap(failure) for failure in failures)):
        refused = next((r for r in results if r.status is Status.REFUSED), None)
        if refused is not None:
            return refused
        raise next((f for f in failures if f is not None), EngineError("too few succeeded"))
    joined = await _joined(node, usable, view)
    is_whole = enough and all(result.status is Status.OK for result in usable)
    if is_whole or joined.status is not Status.OK:
        return joined
    failure = next((result.failure for result in usable if result.failure), None)
    cap = next((f for f in failures if is_cap(f)), failure)
    return replace(joined, status=Status.PARTIAL, failure=cap)


def _succeeded(task: asyncio.Future[Result]) -> bool:
    return task.done() and not task.cancelled() and task.result().status is Status.OK


async def _joined(node: ParallelNode, results: Sequence[Result], view: NodeView) -> Result:
    if node.function is not None:
        texts = [result.shown for result in results]
        called = asyncio.to_thread(_call, node.function, texts)
        return Result(text=await by_deadline(called, view.budget, "the function"))
    if isinstance(node.join, AskNode):
        joined = await run_node(node.join, view.seeing(answers=together(results)))
        if joined.status is Status.FAILED and is_cap(joined.failure) and not joined.is_sent:
            return replace(together(results), status=Status.PARTIAL, failure=joined.failure)
        return joined
    if node.join == "first":
        return next((r for r in results if r.status is Status.OK), results[0])
    joined = together(results)
    return replace(joined, max_bytes=sum(result.max_bytes for result in results))


def together(results: Sequence[Result]) -> Result:
    """Results line by line."""
    return Result(
        text="\n".join(result.shown for result in results),
        data=[result.shown for result in results],
        sources=tuple(source for result in results for source in result.sources),
        max_bytes=WORD_BYTES,
    )


def _call(path: str, texts: list[str]) -> str:
    """What a Python function makes of the texts.

    Raises:
        ServiceError: If it cannot be found, fails, or gives no text.
    """
    module, _, name = path.partition(":")
    try:
        function: Callable[[list[str]], str] = getattr(importlib.import_module(module), name)
        said = function(texts)
    except AtlasError:
        raise
    except Exception as error:
        raise ServiceError(f"the function {path!r} failed: {type(error).__name__}") from error
    if not isinstance(said, str):
        raise ServiceError(f"the function {path!r} gave no text")
    return said
