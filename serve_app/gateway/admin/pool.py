"""The pool over HTTP: admins add, change and remove models, tools, patterns and rules.

A handler only writes what is wanted to the store; the controller brings it about. So a change is
taken in milliseconds, and how far it is stands at `GET /v1/admin/models`. What a model or tool may
name here is up to the configuration file (`serve_app.pool.allow_list`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from serve_app.config import AtlasConfig, ModelConfig, PriceConfig
from serve_app.config.patterns.language import PatternConfig
from serve_app.config.rules import RulesSubmission
from serve_app.errors import InvalidRequest
from serve_app.gateway.chat.parsing import parse_json, validate
from serve_app.gateway.chat.pool_view import PoolView
from serve_app.gateway.chat.wire import ModelSubmission, ToolAcceptance, ToolSubmission
from serve_app.gateway.edge.errors import JsonResponse
from serve_app.pool.desired import DesiredPool
from serve_app.store import Store, accept_definition, mcp_definitions

Json = dict[str, Any]


class PoolAdmin:
    """The handlers of `/v1/admin/models`, `…/tools`, `…/patterns` and `…/rules`."""

    def __init__(
        self,
        config: AtlasConfig,
        store: Store,
        view: Callable[[], PoolView],
        breakers: Callable[[], Mapping[str, str]],
    ) -> None:
        """Of a deployment.

        Args:
            config: As in its file.
            store: Holds the desired pool.
            view: The pool as it is now.
            breakers: Of the models whose breaker is not closed in this process: where it stands.
        """
        self._breakers = breakers
        self._store = store
        self._pool = DesiredPool(config, store)
        self._max_depth = config.gateway.limits.max_json_depth
        self._view = view

    async def models(self, request: Request) -> Response:
        """`GET /v1/admin/models`."""
        view, breakers = self._view(), self._breakers()
        rows = view.admin_models()
        return _listed(
            view, [{**r, "breaker": breakers.get(r["model_id"], "closed")} for r in rows]
        )

    async def tools(self, request: Request) -> Response:
        """`GET /v1/admin/tools`."""
        view = self._view()
        return _listed(view, await self.tool_rows(view))

    async def tool_rows(self, view: PoolView) -> list[Json]:
        """Each tool; of an MCP server its functions, with the hashes that they are pinned by."""
        rows = view.admin_tools()
        servers = {row["tool_id"]: row for row in rows if row.get("type") == "mcp"}
        for row in servers.values():
            row["functions"] = []
        for seen in await mcp_definitions(self._store) if servers else []:
            if seen.tool_id in servers:
                told = {"name": seen.function, "state": seen.state, "sha256": seen.seen}
                told["description"] = seen.description
                servers[seen.tool_id]["functions"].append(told)
        return rows

    async def accept_tool(self, request: Request) -> Response:
        """`POST /v1/admin/tools/{tool_id}/accept`."""
        tool_id = request.path_params["tool_id"]
        said = validate(ToolAcceptance, self._body(request), strict=True)
        await accept_definition(self._store, tool_id, said.function, said.sha256)
        return _taken("tool", tool_id, "accepted", self._view().pool.revision or 0, 202)

    async def add_model(self, request: Request) -> Response:
        """`POST /v1/admin/models`."""
        model = self._model(request)
        revision = await self._pool.add_model(model)
        return _taken("model", model.model_id, "added", revision, 202)

    async def update_model(self, request: Request) -> Response:
        """`PUT /v1/admin/models/{model_id}`."""
        model, model_id = self._model(request), request.path_params["model_id"]
        if model.model_id != model_id:
            raise InvalidRequest(
                f"the path names model {model_id!r}, the body {model.model_id!r}", "model_id"
            )
        revision = await self._pool.update_model(model)
        return _taken("model", model_id, "changed", revision, 202)

    async def set_price(self, request: Request) -> Response:
        """`PATCH /v1/admin/models/{model_id}`."""
        model_id = request.path_params["model_id"]
        price = validate(PriceConfig, self._body(request), strict=True)
        revision = await self._pool.set_price(model_id, price)
        return _taken("model", model_id, "changed", revision, 200)

    async def remove_model(self, request: Request) -> Response:
        """`DELETE /v1/admin/models/{model_id}`."""
        model_id = request.path_params["model_id"]
        revision = await self._pool.remove_model(model_id)
        return _taken("model", model_id, "removed", revision, 202)

    async def add_tool(self, request: Request) -> Response:
        """`POST /v1/admin/tools`."""
        said = validate(ToolSubmission, self._body(request), strict=True)
        model_ids = None if said.models is None else tuple(said.models)
        revision = await self._pool.add_tool(said.tool, model_ids)
        return _taken("tool", said.tool.tool_id, "added", revision, 202)

    async def remove_tool(self, request: Request) -> Response:
        """`DELETE /v1/admin/tools/{tool_id}`."""
        tool_id = request.path_params["tool_id"]
        revision = await self._pool.remove_tool(tool_id)
        return _taken("tool", tool_id, "removed", revision, 202)

    async def patterns(self, request: Request) -> Response:
        """`GET /v1/admin/patterns`."""
        view = self._view()
        return _listed(view, view.admin_patterns())

    async def put_pattern(self, request: Request) -> Response:
        """`POST /v1/admin/patterns`."""
        pattern = validate(PatternConfig, self._body(request), strict=True)
        revision, is_new = await self._pool.put_pattern(pattern)
        change = "added" if is_new else "changed"
        return _taken("pattern", pattern.name, change, revision, 202)

    async def remove_pattern(self, request: Request) -> Response:
        """`DELETE /v1/admin/patterns/{name}`."""
        name = request.path_params["name"]
        revision = await self._pool.remove_pattern(name)
        return _taken("pattern", name, "removed", revision, 202)

    async def rules(self, request: Request) -> Response:
        """`GET /v1/admin/rules`."""
        view = self._view()
        return _listed(view, view.admin_rules())

    async def put_rules(self, request: Request) -> Response:
        """`PUT /v1/admin/rules`."""
        said = validate(RulesSubmission, self._body(request), strict=True)
        revision = await self._pool.put_rules(said.rules)
        body = {"object": "atlas.rules", "count": len(said.rules), "revision": revision}
        return JsonResponse(body, 202)

    def _body(self, request: Request) -> Json:
        return parse_json(request.scope["atlas"].body, self._max_depth)

    def _model(self, request: Request) -> ModelConfig:
        return validate(ModelSubmission, self._body(request), strict=True).root


def _listed(view: PoolView, rows: list[Json]) -> JsonResponse:
    versions = {"pool_version": view.pool.pool_version, "revision": view.pool.revision}
    return JsonResponse({"object": "list", "data": rows, **versions})


def _taken(kind: str, name: str, change: str, revision: int, status: int) -> JsonResponse:
    body = {
        "object": f"atlas.{kind}",
        "name" if kind == "pattern" else f"{kind}_id": name,
        "change": change,
        "revision": revision,
    }
    return JsonResponse(body, status)
