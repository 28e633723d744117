"""An admin's request ends, whatever it waits for."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response

from serve_app.errors import DeadlineExceeded
from serve_app.gateway import shapes
from serve_app.gateway.edge import routes
from serve_app.gateway.edge.operation import DocumentedAnswer, Operation
from serve_app.gateway.edge.routes import Endpoint
from serve_app.store import Scope

OPERATION = Operation("wait", "Waits.", DocumentedAnswer("It waited.", shapes.STATUS))


async def waits(request: Request) -> Response:
    await asyncio.Event().wait()
    return Response()


async def times_out_itself(request: Request) -> Response:
    raise TimeoutError


async def test_an_admin_request_that_waits_too_long_is_told_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(routes, "ADMIN_TIMEOUT_S", 0.05)
    endpoint: Any = Endpoint("GET", "/v1/admin/x", waits, Scope.ADMIN, OPERATION).endpoint
    with pytest.raises(DeadlineExceeded, match="did not end within"):
        await endpoint(None)
    endpoint = Endpoint("GET", "/v1/admin/x", times_out_itself, Scope.ADMIN, OPERATION).endpoint
    with pytest.raises(TimeoutError):
        await endpoint(None)


def test_other_routes_keep_their_own_deadlines() -> None:
    assert Endpoint("GET", "/v1/x", waits, Scope.CHAT, OPERATION).endpoint is waits
