"""Calls to model applications: deadlines, cancellation that reaches the engine, clear errors."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from serve_app.errors import AtlasError, DeadlineExceeded, EngineError
from serve_app.models.protocol import ChatBody, application_name

logger = logging.getLogger(__name__)


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


class ModelClients:
    """Handles to the model applications, made on first use."""

    def __init__(self) -> None:
        """Start with none."""
        self._handles: dict[str, Any] = {}

    async def complete(self, model_id: str, body: ChatBody, deadline: Deadline) -> dict[str, Any]:
        """One whole completion; see `ModelServer.complete`.

        Raises:
            InvalidRequest: If the engine refuses the request.
            EngineError: If the application is away or fails.
            DeadlineExceeded: If the answer comes too late.
        """
        answer: dict[str, Any] = await call(
            (await self._handle(model_id)).complete.remote(body), deadline
        )
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
            raise translated(error) from error
        except (asyncio.CancelledError, GeneratorExit):
            response.cancel()
            raise

    async def _handle(self, model_id: str) -> Any:
        handle = self._handles.get(model_id)
        if handle is None:
            try:
                # Blocking calls to the Serve controller; once per model and process.
                handle = await asyncio.to_thread(serve.get_app_handle, application_name(model_id))
            except (RayError, RayServeException) as error:
                raise EngineError("the model application is away") from error
            self._handles[model_id] = handle
        return handle
