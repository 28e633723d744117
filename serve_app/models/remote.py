"""Remote models: any OpenAI-compatible HTTP endpoint behind the same two methods as a local one.

One owner of retries: `openai`'s own are off; connection errors, 408, 429 and 5xx are tried again
with back-off and jitter, honouring `Retry-After`, and only before the first byte of an answer.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import openai

from serve_app.config import RemoteModelConfig
from serve_app.errors import EngineError, InvalidRequest
from serve_app.models.boundary import guarded
from serve_app.models.protocol import ChatBody

_T = TypeVar("_T")
_MAX_BACKOFF_S = 8.0
_READ_TIMEOUT_S = 600.0
"""Upper bound of one answer; the gateway's deadline is the one that counts and cancels earlier."""


@guarded
class RemoteModel:
    """A model elsewhere."""

    def __init__(self, config: RemoteModelConfig) -> None:
        """Prepare the client; asks nothing yet.

        Raises:
            EngineError: If the key's environment variable is empty.
        """
        key = os.environ.get(config.api_key_env, "") if config.api_key_env else "none"
        if not key:
            raise EngineError(f"environment variable {config.api_key_env!r} holds no API key")
        self._config = config
        timeout = openai.Timeout(_READ_TIMEOUT_S, connect=config.connect_timeout_s)
        self._client = openai.AsyncOpenAI(
            api_key=key, base_url=config.base_url, max_retries=0, timeout=timeout
        )

    async def check_health(self) -> None:
        """Always well: a restart here would not bring an endpoint back that is away."""

    async def complete(self, body: ChatBody) -> dict[str, Any]:
        """Answer a request whole; see `ModelServer.complete`."""
        completion = await self._with_retries(
            lambda: self._client.chat.completions.create(
                model=self._config.remote_model, stream=False, **body
            )
        )
        answer: dict[str, Any] = completion.model_dump(mode="json", exclude_none=True)
        return answer

    async def stream(self, body: ChatBody) -> AsyncIterator[list[dict[str, Any]]]:
        """Answer a request piece by piece; see `ModelServer.stream`."""
        chunks = await self._with_retries(
            lambda: self._client.chat.completions.create(
                model=self._config.remote_model,
                stream=True,
                stream_options={"include_usage": True},
                **body,
            )
        )
        try:
            async for chunk in chunks:
                yield [chunk.model_dump(mode="json", exclude_none=True)]
        except openai.OpenAIError as error:
            raise EngineError("the remote model broke off its answer") from error
        finally:
            await chunks.close()

    async def ready(self) -> None:
        """Ask the endpoint for a sign of life.

        Raises:
            EngineError: If it does not give one.
        """
        if self._config.health_path is not None:
            await self._with_retries(
                lambda: self._client.get(self._config.health_path or "", cast_to=object)
            )

    async def _with_retries(self, call: Callable[[], Awaitable[_T]]) -> _T:
        for attempt in range(self._config.max_retries + 1):
            try:
                return await call()
            except openai.APIStatusError as error:
                status = error.status_code
                if status not in (408, 429) and status < 500:
                    raise _refusal(status, error) from None
                failure, wait_s = (
                    EngineError(f"the remote model answered {status}"),
                    _retry_after_s(error),
                )
            except openai.APIConnectionError:
                failure, wait_s = EngineError("the remote model cannot be reached"), None
            except openai.OpenAIError as error:
                raise EngineError(
                    f"the remote model's answer is no chat completion: {type(error).__name__}"
                ) from None
            if attempt < self._config.max_retries:
                backoff = min(_MAX_BACKOFF_S, 0.25 * 2**attempt) * (1 + random.random())
                await asyncio.sleep(min(_MAX_BACKOFF_S, wait_s) if wait_s is not None else backoff)
        raise failure


def _refusal(status: int, error: openai.APIStatusError) -> Exception:
    """A 4xx that trying again does not change: bad keys are ours, bad requests the caller's."""
    if status in (401, 403, 404):
        return EngineError(f"the remote model refuses our access ({status})")
    message = error.body.get("message") if isinstance(error.body, dict) else None
    return InvalidRequest(str(message or f"the remote model refuses the request ({status})"))


def _retry_after_s(error: openai.APIStatusError) -> float | None:
    try:
        return max(0.0, float(error.response.headers["retry-after"]))
    except (KeyError, ValueError):
        return None
