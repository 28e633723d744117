"""Remote models: any OpenAI-compatible HTTP endpoint behind the same two methods as a local one.

Nothing is tried again here: connection errors, 408, 429 and 5xx are `EngineUnavailable`, or
`EngineBusy` with the pause asked for, and the orchestrator's table of recovery says what follows.
`Retry-After` holds for every request to the endpoint: requests wait for a pause of up to
`_MAX_WAIT_S`; during a longer one they fail at once, so that other models take over.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx2
import openai

from serve_app.config import RemoteModelConfig
from serve_app.errors import EngineBusy, EngineError, EngineUnavailable, InvalidRequest
from serve_app.models.boundary import guarded
from serve_app.models.engine_output import MAX_ANSWER_BYTES
from serve_app.models.protocol import ChatBody, refusal
from serve_app.trace_context import CURRENT

_T = TypeVar("_T")
_SPREAD_S = 0.25
"""Requests that waited for a pause go on within this time after it."""
_MAX_WAIT_S = 4.0
"""Longest pause that a request waits for."""
_COOLDOWN_S = 1.0
"""Pause after a 429 that names none."""
_NO_QUOTA = "insufficient_quota"
"""`error.code`, or `error.type`, of a 429 that no pause ends."""
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
            api_key=key,
            base_url=config.base_url,
            max_retries=0,
            timeout=timeout,
            # A redirect would carry the prompt to an address that nobody configured.
            http_client=openai.DefaultAsyncHttpxClient(
                follow_redirects=False, timeout=timeout, event_hooks={"response": [_bound]}
            ),
            default_headers={"accept-encoding": "identity"},
        )
        self._busy_until_s = 0.0
        """Until when the endpoint asked to be left alone; monotonic clock."""

    async def check_health(self) -> None:
        """Always well: a restart here would not bring an endpoint back that is away."""

    async def complete(self, body: ChatBody) -> dict[str, Any]:
        """Answer a request whole; see `ModelServer.complete`."""
        completion = await self._ask(
            lambda: self._client.chat.completions.create(
                model=self._config.remote_model,
                stream=False,
                extra_headers=CURRENT.get(),
                **body,
            )
        )
        answer: dict[str, Any] = completion.model_dump(
            mode="json", exclude_none=True, warnings=False
        )
        return answer

    async def stream(self, body: ChatBody) -> AsyncIterator[list[dict[str, Any]]]:
        """Answer a request piece by piece; see `ModelServer.stream`."""
        chunks = await self._ask(
            lambda: self._client.chat.completions.create(
                model=self._config.remote_model,
                stream=True,
                stream_options={"include_usage": True},
                extra_headers=CURRENT.get(),
                **body,
            )
        )
        try:
            async for chunk in chunks:
                yield [chunk.model_dump(mode="json", exclude_none=True, warnings=False)]
        except (openai.OpenAIError, httpx2.HTTPError) as error:
            raise EngineError("the remote model broke off its answer") from error
        finally:
            await chunks.close()

    async def ready(self) -> None:
        """Ask the endpoint for a sign of life.

        Raises:
            EngineError: If it does not give one.
        """
        if self._config.health_path is not None:
            await self._ask(
                lambda: self._client.get(self._config.health_path or "", cast_to=object)
            )

    async def _ask(self, call: Callable[[], Awaitable[_T]]) -> _T:
        await self._pause()
        try:
            return await call()
        except openai.APIStatusError as error:
            status = error.status_code
            if status not in (408, 429) and status < 500:
                raise _refusal(status, error) from None
            if status == 429 and _NO_QUOTA in (error.code, error.type):
                raise EngineError("the remote model's quota is spent") from None
            pause_s = _retry_after_s(error) or (_COOLDOWN_S if status == 429 else 0.0)
            self._busy_until_s = max(self._busy_until_s, time.monotonic() + pause_s)
            said = f"the remote model answered {status}"
            if pause_s:
                raise EngineBusy(said, None, pause_s) from None
            raise EngineUnavailable(said) from None
        except openai.APIConnectionError as error:
            if isinstance(error.__cause__, EngineError):  # `_bound` ended the answer
                raise error.__cause__ from None
            raise EngineUnavailable("the remote model cannot be reached") from None
        except openai.OpenAIError as error:
            raise EngineError(
                f"the remote model's answer is no chat completion: {type(error).__name__}"
            ) from None

    async def _pause(self) -> None:
        """Wait as long as the endpoint asked for.

        Raises:
            EngineBusy: If that is too long.
        """
        left_s = self._busy_until_s - time.monotonic()
        if left_s > _MAX_WAIT_S:
            raise EngineBusy(
                f"the remote model asks for a pause of {left_s:.0f} s more", None, left_s
            )
        if left_s > 0:
            # Not all that wait at once, when the pause is over.
            await asyncio.sleep(left_s + random.uniform(0, _SPREAD_S))


async def _bound(response: httpx2.Response) -> None:
    """Have an answer end that is longer than any that is taken; counted before it is parsed.

    Raises:
        EngineError: If the answer is compressed. No compression was asked for, and a short
            compressed answer can be a long one.
    """
    if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise EngineError("the remote model's answer is compressed")
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    response.stream = _BoundedStream(response.stream)


class _BoundedStream(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        taken = 0
        async for part in self._stream:
            taken += len(part)
            if taken > MAX_ANSWER_BYTES:
                raise EngineError("the remote model's answer is too large")
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()


def _refusal(status: int, error: openai.APIStatusError) -> EngineError | InvalidRequest:
    """A 4xx that trying again does not change: bad keys are ours, bad requests the caller's."""
    if status < 400 or status in (401, 403, 404):
        return EngineError(f"the remote model refuses our access ({status})")
    body: dict[str, Any] = error.body if isinstance(error.body, dict) else {}
    message = body.get("message")
    return refusal(
        message if isinstance(message, str) else f"the remote model refuses the request ({status})",
        body.get("code"),
    )


def _retry_after_s(error: openai.APIStatusError) -> float | None:
    """Seconds that the endpoint asks to wait, said as such or as a date; `None` if it says none."""
    said = error.response.headers.get("retry-after", "")
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(said).timestamp() - time.time()
        except ValueError:
            return None
    return seconds if 0 < seconds < float("inf") else None
