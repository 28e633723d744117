"""Calls to model applications: deadlines, cancellation that reaches the engine, clear errors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from serve_app.budget import Deadline
from serve_app.errors import (
    AtlasError,
    DeadlineExceeded,
    EngineBusy,
    EngineError,
    ReplicaDied,
)
from serve_app.models.protocol import ChatBody
from serve_app.trace_context import CURRENT, TRACE_FIELD

logger = logging.getLogger(__name__)

_FIND_TIMEOUT_S = 10.0
"""How long the Serve controller may take to name a model's application."""


def translated(error: BaseException) -> AtlasError:
    """What a failed call to another deployment means, as one of our errors."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, AtlasError):
        return cause
    if isinstance(cause, TimeoutError):
        return DeadlineExceeded("the answer did not come within the deadline")
    if isinstance(error, RayActorError):
        return ReplicaDied("the replica that worked on it is no more")
    if not isinstance(error, RayError | RayServeException):
        # Serve hands on whatever a replica raised as it is: a bug of an engine, as a rule.
        logger.warning("a deployment failed: %r", error)
    return EngineError("the model application failed")


async def call(response: Any, deadline: Deadline) -> Any:
    """Await a deployment response within the deadline; cancels the work it gives up on.

    Raises:
        AtlasError: The error of the other side, translated.
    """
    try:
        async with asyncio.timeout(deadline.remaining_s()):
            return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
    except Exception as error:
        response.cancel()
        raise translated(error) from error


def _traced(body: ChatBody) -> ChatBody:
    """The request with the trace that the call is part of, where it is part of one."""
    carrier = CURRENT.get()
    return body if carrier is None else body | {TRACE_FIELD: dict(carrier)}


class ModelClients:
    """Handles to the model applications, made on first use."""

    def __init__(self, on_failure: Callable[[str], None] | None = None) -> None:
        """Start with none.

        Args:
            on_failure: Told the id of a model whose application failed.
        """
        self._applications: dict[str, str] = {}
        self._handles: dict[str, Any] = {}
        """By application."""
        self._searches: dict[str, asyncio.Task[Any]] = {}
        """By application; one at a time, because each holds a thread."""
        self._on_failure = on_failure

    def use(self, applications: Mapping[str, str]) -> None:
        """Send calls from now on to these applications, by model id."""
        self._applications = dict(applications)
        in_use = set(applications.values())
        self._handles = {name: held for name, held in self._handles.items() if name in in_use}

    async def complete(
        self, model_id: str, body: ChatBody, deadline: Deadline, session: str = ""
    ) -> dict[str, Any]:
        """One whole completion; see `ModelServer.complete`.

        Args:
            model_id: The model.
            body: The request.
            deadline: When the answer must be there.
            session: Calls of the same one go to the same replica; empty: to any.

        Raises:
            InvalidRequest: If the engine refuses the request.
            EngineError: If the application is away or fails.
            DeadlineExceeded: If the answer comes too late.
        """
        handle, body = await self._handle(model_id, deadline), _traced(body)
        try:
            of = handle.options(session_id=session) if session else handle
            answer: dict[str, Any] = await call(of.complete.remote(body), deadline)
        except EngineError as failure:
            self._tell(model_id, failure)
            raise
        return answer

    async def stream(
        self, model_id: str, body: ChatBody, deadline: Deadline, session: str = ""
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of one completion; arguments and errors as `complete`, at any point."""
        handle, body = await self._handle(model_id, deadline), _traced(body)
        of = {"session_id": session} if session else {}
        response = handle.options(stream=True, **of).stream.remote(body)
        chunks = aiter(response)
        try:
            while True:
                async with asyncio.timeout(deadline.remaining_s()):
                    batch = await anext(chunks)
                for chunk in batch:
                    yield chunk
        except StopAsyncIteration:
            return
        except Exception as error:
            response.cancel()
            failure = translated(error)
            if isinstance(failure, EngineError):
                self._tell(model_id, failure)
            raise failure from error
        except (asyncio.CancelledError, GeneratorExit):
            response.cancel()
            raise

    def _tell(self, model_id: str, failure: EngineError) -> None:
        # One that is busy answers again by itself, and a probe would only be one more request.
        if self._on_failure is not None and not isinstance(failure, EngineBusy):
            self._on_failure(model_id)

    async def _handle(self, model_id: str, deadline: Deadline) -> Any:
        name = self._applications.get(model_id)
        if name is None:
            raise EngineError("the model application is away")
        if name in self._handles:
            return self._handles[name]
        search = self._searches.get(name)
        if search is None:
            # Blocking calls to the Serve controller; once per application and process.
            search = asyncio.ensure_future(asyncio.to_thread(serve.get_app_handle, name))
            self._searches[name] = search
            search.add_done_callback(lambda done: self._found(name, done))
        try:
            async with asyncio.timeout(min(_FIND_TIMEOUT_S, deadline.remaining_s())):
                return await asyncio.shield(search)
        except TimeoutError:
            raise EngineError("Serve's controller does not say where the model runs") from None
        except (RayError, RayServeException) as error:
            failure = EngineError("the model application is away")
            self._tell(model_id, failure)
            raise failure from error

    def _found(self, name: str, search: asyncio.Task[Any]) -> None:
        del self._searches[name]
        if not search.cancelled() and search.exception() is None:
            self._handles[name] = search.result()
