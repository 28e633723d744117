"""What the gateway is compared with: Serve doing nothing, and a model behind a thin ingress."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import orjson
from ray import serve
from ray.serve.deployment import Application
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.pool.applications import model_applications
from serve_app.telemetry import SERVE_LOGGING

_OPTIONS: dict[str, Any] = {
    "max_ongoing_requests": 1024,
    "ray_actor_options": {"num_cpus": 0},
    "logging_config": SERVE_LOGGING,
}


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


@serve.ingress()
class Noop:
    """Reads the request and answers two bytes."""

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Serve asks for the application after the constructor."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "lifespan":
                return await _lifespan(receive, send)
            await Request(scope, receive).body()
            await Response(b"ok")(scope, receive, send)

        return app


@serve.ingress()
class Direct:
    """Hands the body to a model's application and its answer back."""

    def __init__(self, application: str) -> None:
        self._handle: Any = serve.get_app_handle(application)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Serve asks for the application after the constructor."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "lifespan":
                return await _lifespan(receive, send)
            body = orjson.loads(await Request(scope, receive).body())
            body.pop("model", None)
            response = (
                StreamingResponse(self._stream(body), media_type="text/event-stream")
                if body.pop("stream", False)
                else Response(orjson.dumps(await self._handle.complete.remote(body)))
            )
            await response(scope, receive, send)

        return app

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        async for pieces in self._handle.options(stream=True).stream.remote(body):
            yield b"".join(b"data: " + orjson.dumps(piece) + b"\n\n" for piece in pieces)
        yield b"data: [DONE]\n\n"


def noop_application() -> Application:
    """Serve's own cost."""
    return serve.deployment(Noop, **_OPTIONS).bind()


def direct_application(model_id: str) -> Application:
    """A running model's application behind an ingress of a few lines."""
    names = [a.name for a in model_applications().values() if a.model_id == model_id]
    return serve.deployment(Direct, **_OPTIONS).bind(names[0])
