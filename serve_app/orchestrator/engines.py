"""Calls to model applications: deadlines, cancellation that reaches the engine, clear errors."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from serve_app.errors import AtlasError, DeadlineExceeded, EngineError, ReplicaDied
from serve_app.models.protocol import ChatBody

logger = logging.getLogger(__name__)

SEND_AGAIN_S = 0.05
"""From the death of a replica until what it worked on is sent to another."""


@dataclass(frozen=True)
class Deadline:
    """A point in time by which something must be done."""

    at_s: float
    """Monotonic clock."""

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """The deadline that many seconds from now."""
        return cls(time.monotonic() + seconds)

    def remaining_s(self) -> float:
        """Seconds left.

        Raises:
            DeadlineExceeded: If none are.
        """
        left = self.at_s - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded("the request's deadline has passed")
        return left

    def sooner(self, seconds: float) -> Deadline:
        """This deadline, or the one that many seconds from now if that comes first."""
        return Deadline(min(self.at_s, time.monotonic() + seconds))


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


async def call_again(send: Callable[[], Any], deadline: Deadline) -> Any:
    """As `call`, sent again as often as the replica that works on it dies.

    Args:
        send: Makes the call; what it asks for has no effect, so that twice is as good as once.
        deadline: When the answer must be there.
    """
    while True:
        try:
            return await call(send(), deadline)
        except ReplicaDied:
            logger.warning("a replica died over a call; sending it again")
            await asyncio.sleep(SEND_AGAIN_S)


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
        self._on_failure = on_failure

    def use(self, applications: Mapping[str, str]) -> None:
        """Send calls from now on to these applications, by model id."""
        self._applications = dict(applications)
        in_use = set(applications.values())
        self._handles = {name: held for name, held in self._handles.items() if name in in_use}

    async def complete(self, model_id: str, body: ChatBody, deadline: Deadline) -> dict[str, Any]:
        """One whole completion; see `ModelServer.complete`.

        Raises:
            InvalidRequest: If the engine refuses the request.
            EngineError: If the application is away or fails.
            DeadlineExceeded: If the answer comes too late.
        """
        handle = await self._handle(model_id)
        try:
            answer: dict[str, Any] = await call(handle.complete.remote(body), deadline)
        except EngineError:
            self._tell(model_id)
            raise
        return answer

    async def stream(
        self, model_id: str, body: ChatBody, deadline: Deadline
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of one completion; errors as `complete`, at any point."""
        response = (await self._handle(model_id)).options(stream=True).stream.remote(body)
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
                self._tell(model_id)
            raise failure from error
        except (asyncio.CancelledError, GeneratorExit):
            response.cancel()
            raise

    def _tell(self, model_id: str) -> None:
        if self._on_failure is not None:
            self._on_failure(model_id)

    async def _handle(self, model_id: str) -> Any:
        name = self._applications.get(model_id)
        if name is None:
            raise EngineError("the model application is away")
        handle = self._handles.get(name)
        if handle is None:
            try:
                # Blocking calls to the Serve controller; once per application and process.
                handle = await asyncio.to_thread(serve.get_app_handle, name)
            except (RayError, RayServeException) as error:
                self._tell(model_id)
                raise EngineError("the model application is away") from error
            self._handles[name] = handle
        return handle
