"""The HTTP API: the table of routes and its handlers, behind the edge.

`build_api` returns an ASGI app that needs no Ray: a Serve deployment mounts it, and tests run it
on a loopback server. A request passes the edge first (`edge.Edge`), which hands on the whole body
and the key's owner.
"""

from __future__ import annotations

import asyncio
from functools import cache
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from serve_app.config import AtlasConfig
from serve_app.gateway.admin.pool import PoolAdmin
from serve_app.gateway.console.pages import Console
from serve_app.gateway.edge.auth import Authenticator
from serve_app.gateway.edge.edge import Edge
from serve_app.gateway.edge.errors import JsonResponse
from serve_app.gateway.edge.hosts import HostCheck
from serve_app.gateway.edge.idempotency import Idempotency
from serve_app.gateway.edge.routes import RouteTable
from serve_app.gateway.handlers import Handlers, RequestRunner
from serve_app.gateway.openapi import openapi_document
from serve_app.gateway.purses import Purses
from serve_app.gateway.table import endpoints
from serve_app.jobs import Jobs
from serve_app.store import OutcomeLog, Store
from serve_app.telemetry import NoMetrics, ToldMetrics
from serve_app.telemetry.tracing import NoTracing, Tracing

if TYPE_CHECKING:
    from serve_app.gateway.mcp.server import McpServer


def build_api(
    orchestrator: RequestRunner,
    store: Store,
    outcomes: OutcomeLog,
    jobs: Jobs,
    config: AtlasConfig,
    metrics: ToldMetrics | None = None,
    purses: Purses | None = None,
    tracing: Tracing | None = None,
) -> Starlette:
    """The whole HTTP API as an ASGI app.

    Args:
        orchestrator: Runs requests.
        store: Has the keys, takes the feedback, keeps the answers of idempotency keys.
        outcomes: Where the orchestrator's reports go; feedback has it flushed first.
        jobs: Takes the jobs of the learning loop.
        config: Limits, authentication, prices.
        metrics: Where counts go.
        purses: Pay for the requests of keys with limits; `None` makes them.
        tracing: Where traces go; `None`: nowhere.
    """
    metrics = metrics or NoMetrics()
    gateway = config.gateway
    purses = purses or Purses(store, outcomes, gateway.limits.max_deadline_s)
    api = Handlers(orchestrator, store, outcomes, jobs, config, metrics)
    pool = PoolAdmin(config, store, api.pool_view, api.breakers)

    @cache
    def document() -> bytes:
        written = openapi_document(routes.endpoints, gateway.limits, gateway.auth.mode)
        return bytes(JsonResponse(written).body)

    async def openapi(request: Request) -> Response:
        """`GET /openapi.json`; the document is written for the first who asks."""
        return Response(await asyncio.to_thread(document), media_type="application/json")

    @cache
    def mcp_server() -> McpServer:
        from serve_app.gateway.mcp.server import McpServer  # loads the SDK

        return McpServer(api, orchestrator, config, hosts, metrics)

    async def mcp(request: Request) -> Response:
        """`POST /mcp`; the server is made for the first who asks."""
        server = await asyncio.to_thread(mcp_server)
        return await server.handle(request)

    hosts = HostCheck(gateway.auth.mode, gateway.allowed_hosts)
    console = Console(api, pool, jobs, store, config) if gateway.console else None
    routes = RouteTable(endpoints(api, pool, openapi, mcp if gateway.mcp else None, console))
    edge = Middleware(
        Edge,
        routes=routes,
        hosts=hosts,
        limits=gateway.limits,
        authenticator=Authenticator(gateway.auth.mode, store),
        idempotency=Idempotency(store, gateway.idempotency, gateway.limits.max_json_depth),
        purses=purses,
        metrics=metrics,
        tracing=tracing or NoTracing(),
    )
    # The edge calls the handlers itself; Serve reads the routes for the names in its metrics.
    app = Starlette(routes=routes.endpoints, middleware=[edge])
    app.router.redirect_slashes = False
    return app
