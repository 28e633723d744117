"""What may leave a model's process: checked answers, and errors that any process can read at once.

An exception crosses a process border by pickle, and whoever receives it imports what it is made of.
One of vLLM's brings in vLLM and torch, on the event loop of the gateway that asked and of Ray
Serve's controller that looked after it: measured here, nobody was answered for 15 to 20 s after an
engine had died.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, TypeVar

from serve_app.errors import AtlasError, EngineError
from serve_app.models.engine_output import StreamChecker, checked_completion
from serve_app.models.protocol import ChatBody
from serve_app.trace_context import CURRENT, TRACE_FIELD

logger = logging.getLogger(__name__)

_METHODS = ("complete", "stream", "ready", "check_health")

Server = TypeVar("Server", bound=type)


def guarded(server: Server) -> Server:
    """The same server, from which only OpenAI completions and errors of `serve_app.errors` come.

    Any other error is logged where it happened and leaves as an `EngineError` without its text,
    which may hold a path or a part of a request. An answer that is no completion, or is larger than
    what was asked for, is an `EngineError` too (`engine_output`).

    Args:
        server: A class with methods of `ModelServer`, and of a Serve deployment.

    Returns:
        A subclass of the same name.
    """
    methods = {
        name: _GUARDS.get(name, _guarded)(getattr(server, name))
        for name in _METHODS
        if hasattr(server, name)
    }
    names = {name: getattr(server, name) for name in ("__module__", "__qualname__", "__doc__")}
    guard: Any = type(server.__name__, (server,), methods | names)
    return guard  # type: ignore[no-any-return]


def _guarded_pieces(method: Any) -> Any:
    @functools.wraps(method)
    async def pieces(self: Any, body: ChatBody) -> AsyncIterator[Any]:
        try:
            body = _within_its_trace(body)
            checker = StreamChecker(body)
            async with aclosing(method(self, body)) as inner:
                async for batch in inner:
                    yield checker.checked(batch)
            checker.end()
        except Exception as error:
            raise _ours(error) from None

    return pieces


def _guarded_answer(method: Any) -> Any:
    @functools.wraps(method)
    async def answer(self: Any, body: ChatBody) -> Any:
        try:
            body = _within_its_trace(body)
            return checked_completion(await method(self, body), body)
        except Exception as error:
            raise _ours(error) from None

    return answer


def _guarded(method: Any) -> Any:
    @functools.wraps(method)
    async def whole(*args: Any, **kwargs: Any) -> Any:
        try:
            result = method(*args, **kwargs)
            return await result if inspect.isawaitable(result) else result
        except Exception as error:
            raise _ours(error) from None

    return whole


def _within_its_trace(body: ChatBody) -> ChatBody:
    """The request without its trace, which is from now on that of the calls that it makes."""
    if TRACE_FIELD not in body:
        return body
    CURRENT.set(body[TRACE_FIELD])
    return {name: value for name, value in body.items() if name != TRACE_FIELD}


_GUARDS = {"complete": _guarded_answer, "stream": _guarded_pieces}


def _ours(error: Exception) -> AtlasError:
    """An error whose class is defined in `serve_app.errors`."""
    if isinstance(error, AtlasError) and type(error).__module__ == AtlasError.__module__:
        return error
    logger.error("the engine failed", exc_info=error)
    return EngineError("the engine failed")
