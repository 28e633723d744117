"""The console: one page per question that an operator has.

A handler reads and renders. What a page changes, it changes as any other client does, over the
endpoints below `/v1`: the browser's session stands for the key there too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from serve_app.config import AtlasConfig
from serve_app.errors import InvalidRequest, NotFound, Unauthorized
from serve_app.gateway.admin.pool import PoolAdmin
from serve_app.gateway.console.assets import read_assets
from serve_app.gateway.console.clusters import SnapshotReader, clusters_of
from serve_app.gateway.console.evaluations import (
    comparison,
    pareto_chart,
    reason_of,
    standing,
    training_charts,
)
from serve_app.gateway.console.queries import (
    DAY_WINDOWS,
    OVERVIEW_WINDOWS,
    SINCE,
    RequestQuery,
    whole_number,
    window_of,
)
from serve_app.gateway.console.rendering import Renderer
from serve_app.gateway.console.shaping import (
    calibration_chart,
    served,
    traffic_charts,
    waterfall,
    with_intervals,
)
from serve_app.gateway.console.spending import MAX_LIMITS, limits_left, saving
from serve_app.gateway.edge.exchange import Exchange
from serve_app.gateway.edge.routes import PUBLIC, Endpoint, Handler
from serve_app.gateway.edge.sessions import SESSION_S, session_cookie, session_of
from serve_app.gateway.handlers import Handlers
from serve_app.jobs import Jobs
from serve_app.schemas import DecidedBy
from serve_app.store import (
    Mode,
    Policy,
    Scope,
    Store,
    begin_session,
    end_session,
    find_policy,
    list_keys,
    list_policies,
    list_snapshots,
    read_trace,
    serving_policies,
    trial_policies,
)
from serve_app.store.choices import (
    ShadowChoices,
    choices_by_cluster,
    choices_by_policy,
    shadow_choices,
    versions_of,
)
from serve_app.store.limit_lists import limited_usage
from serve_app.store.neighbours import neighbours_of
from serve_app.store.request_lists import listed_requests
from serve_app.store.sums import DAY_S
from serve_app.store.traffic import (
    calibration,
    evaluated_versions,
    latency_over_time,
    policy_changes,
    policy_report,
    profile_by_domain,
    profile_means,
    traffic_by_candidate,
    traffic_over_time,
    usage_by,
    win_rates,
)

_PAGE_ROWS = 50
_POLICIES = 50
_JOBS = 20
_NEIGHBOURS = 5


class Console:
    """The handlers of `/console`."""

    def __init__(
        self, api: Handlers, pool: PoolAdmin, jobs: Jobs, store: Store, config: AtlasConfig
    ) -> None:
        """Of a gateway.

        Args:
            api: Knows the pool.
            pool: Knows its tools' pins.
            jobs: Of the learning loop.
            store: Where all the rest is.
            config: The deployment.
        """
        self._api = api
        self._pool = pool
        self._jobs = jobs
        self._store = store
        self._asks_for_keys = config.gateway.auth.mode == "required"
        self._default_alpha = config.router.default_alpha
        self._encoder = config.embedder.model
        self._snapshots = SnapshotReader(config.snapshots_path())
        self._assets = read_assets()
        self._renderer = Renderer(self._assets, asks_for_keys=self._asks_for_keys)

    def endpoints(self) -> list[Endpoint]:
        """The rows of the table of routes."""
        pages: list[tuple[str, Handler, Scope]] = [
            ("/console", self.overview, Scope.ADMIN),
            ("/console/requests", self.requests, Scope.ADMIN),
            ("/console/requests/{request_id}", self.request, Scope.ADMIN),
            ("/console/routing", self.routing, Scope.ADMIN),
            ("/console/policies", self.policies, Scope.ADMIN),
            ("/console/pool", self.pool, Scope.ADMIN),
            ("/console/spend", self.spend, Scope.ADMIN),
            ("/console/ask", self.ask, Scope.CHAT),
        ]
        refusal = self._renderer.refusal
        return [
            *(
                Endpoint("GET", path, page, scope, None, refusal=refusal)
                for path, page, scope in pages
            ),
            Endpoint("GET", "/", self.root, PUBLIC, None),
            Endpoint("POST", "/console/session", self.log_in, Scope.ADMIN, None),
            Endpoint("DELETE", "/console/session", self.log_out, Scope.ADMIN, None),
            *(
                Endpoint("GET", asset.path, asset.handle, PUBLIC, None)
                for asset in self._assets.values()
            ),
        ]

    async def root(self, request: Request) -> Response:
        """`GET /`: people are led to the console; programs find nothing there."""
        if "text/html" not in request.headers.get("accept", ""):
            raise NotFound("there is nothing at this path; see /openapi.json")
        return RedirectResponse("/console", 303)

    async def log_in(self, request: Request) -> Response:
        """`POST /console/session`: begin a session for the key that is sent."""
        exchange: Exchange = request.scope["atlas"]
        if not self._asks_for_keys:
            return Response(status_code=204)
        if "authorization" not in request.headers:
            raise Unauthorized("a session begins with a key, and not with another session")
        if exchange.held_key is not None:  # the cookie would be kept with the answer
            raise InvalidRequest("a session takes no Idempotency-Key", "Idempotency-Key")
        token = await begin_session(self._store, exchange.owner, SESSION_S)
        return _with_cookie(request, token)

    async def log_out(self, request: Request) -> Response:
        """`DELETE /console/session`: end the session."""
        token = session_of(request.headers.get("cookie", "").encode("latin-1"))
        if token is not None:
            await end_session(self._store, token)
        return _with_cookie(request, "")

    async def overview(self, request: Request) -> Response:
        """`GET /console`."""
        window, now_s = window_of(request.query_params, OVERVIEW_WINDOWS, 1), time.time()
        since_s = window.began_s(now_s)
        traffic = await traffic_over_time(self._store, since_s, window.width_s)
        latencies, took = await latency_over_time(self._store, since_s, window.width_s)
        return self._page(
            request,
            "overview",
            window=window,
            windows=OVERVIEW_WINDOWS,
            hours=window.length_s / 3600,
            requests=sum(row.requests for row in traffic),
            errors=sum(row.errors for row in traffic),
            cost_usd=sum(row.cost_usd for row in traffic),
            out_of_distribution=sum(row.out_of_distribution for row in traffic),
            took=took,
            candidates=await traffic_by_candidate(self._store, since_s),
            charts=traffic_charts(
                window, now_s, traffic, latencies, await policy_changes(self._store, since_s)
            ),
        )

    async def requests(self, request: Request) -> Response:
        """`GET /console/requests`."""
        wanted = RequestQuery.of(request.query_params)
        rows, after = await listed_requests(self._store, wanted.filter(), _PAGE_ROWS)
        return self._page(
            request,
            "requests",
            wanted=wanted,
            rows=rows,
            is_full=len(rows) == _PAGE_ROWS,
            next=None if after is None else wanted.address(after),
            keys=await self._key_names(),
            candidates=[str(pair) for pair in self._api.pool_view().pool.candidates()],
            paths=[(str(path), str(path).replace("_", " ")) for path in DecidedBy],
            windows=SINCE,
        )

    async def request(self, request: Request) -> Response:
        """`GET /console/requests/{request_id}`."""
        request_id = request.path_params["request_id"]
        trace = await read_trace(self._store, request_id, None)
        return self._page(
            request,
            "request",
            trace=trace,
            policy=await find_policy(self._store, trace.policy_version),
            bars=waterfall(trace.spans, trace.seconds),
            neighbours=await neighbours_of(self._store, request_id, self._encoder, _NEIGHBOURS),
            keys=await self._key_names(),
            again={"model": "atlas", "messages": [{"role": "user", "content": trace.query}]}
            | ({} if trace.alpha is None else {"atlas": {"alpha": trace.alpha}}),
        )

    async def routing(self, request: Request) -> Response:
        """`GET /console/routing`."""
        window, now_s = window_of(request.query_params, DAY_WINDOWS, 1), time.time()
        since_s = window.began_s(now_s)
        serving = next(iter(await serving_policies(self._store, 1)), None)
        snapshot_id = None if serving is None else serving.snapshot_id
        snapshot, choices = None, []
        if snapshot_id is not None:
            snapshot = await self._snapshots.read(snapshot_id)
            versions = await versions_of(self._store, snapshot_id)
            choices = await choices_by_cluster(self._store, since_s, versions)
        clusters = [] if snapshot is None else clusters_of(snapshot, choices)
        wanted = whole_number(request.query_params, "cluster")
        shown = next((one for one in clusters if wanted in (None, one.index)), None)
        if wanted is not None and shown is None:
            raise NotFound(f"the policy that serves has no cluster {wanted}", "cluster")
        tenths = await calibration(self._store, since_s)
        return self._page(
            request,
            "routing",
            window=window,
            windows=DAY_WINDOWS,
            snapshot_id=snapshot_id,
            is_readable=snapshot is not None,
            clusters=clusters,
            shown=shown,
            rates=with_intervals(await win_rates(self._store, since_s)),
            tenths=tenths,
            calibration=calibration_chart(tenths),
            drifts=[drift for drift in await self._api.drifts() if drift.has_left],
            domains=await profile_by_domain(self._store),
        )

    async def policies(self, request: Request) -> Response:
        """`GET /console/policies`."""
        policies = await list_policies(self._store, _POLICIES)
        evaluated = await evaluated_versions(self._store, [p.policy_version for p in policies])
        serving = next(iter(await serving_policies(self._store, 1)), None)
        judged = whole_number(request.query_params, "version")
        if judged is None:
            judged = next(iter(evaluated), None)
        report = {} if judged is None else await policy_report(self._store, judged)
        jobs = (await self._jobs.list())[:_JOBS]
        trials = await trial_policies(self._store)
        return self._page(
            request,
            "policies",
            services=served(policies, evaluated),
            serving=serving,
            snapshots=await list_snapshots(self._store),
            judged=judged,
            reason=reason_of(report),
            contenders=comparison(report),
            pareto=pareto_chart(report),
            jobs=jobs,
            trainings=training_charts(jobs),
            **await self._side_by_side(serving, trials),
        )

    async def _side_by_side(self, serving: Policy | None, trials: list[Policy]) -> dict[str, Any]:
        """What serves and the trials beside it, since the day on which the first trial began."""
        if not trials:
            return {"standings": [], "shadowed": []}
        running = [*([] if serving is None else [serving]), *reversed(trials)]
        began_s = min(trial.created_unix_s for trial in trials) // DAY_S * DAY_S
        chosen = await choices_by_policy(
            self._store, began_s, [policy.policy_version for policy in running]
        )
        shadowed: list[ShadowChoices] = []
        standings = []
        for policy in running:
            version = policy.policy_version
            if policy.mode is Mode.SHADOW:
                shadowed = await shadow_choices(self._store, began_s, version)
            standings.append(standing(policy, chosen.get(version), shadowed))
        return {"standings": standings, "shadowed": shadowed}

    async def pool(self, request: Request) -> Response:
        """`GET /console/pool`."""
        view, load = self._api.pool_view(), await self._api.load()
        return self._page(
            request,
            "pool",
            pool=view.pool,
            models=view.admin_models(),
            breakers=self._api.breakers(),
            ongoing={} if load is None else load.ongoing,
            away=None if load is None else load.away,
            tools=await self._pool.tool_rows(view),
            patterns=view.admin_patterns(),
        )

    async def spend(self, request: Request) -> Response:
        """`GET /console/spend`."""
        window, now_s = window_of(request.query_params, DAY_WINDOWS, 1), time.time()
        since_s = window.began_s(now_s)
        days = await usage_by(self._store, since_s, "day")
        candidates = await usage_by(self._store, since_s, "candidate")
        limits = limits_left(await limited_usage(self._store))
        pairs = frozenset(self._api.pool_view().pool.pairs)
        return self._page(
            request,
            "spend",
            window=window,
            windows=DAY_WINDOWS,
            days=days,
            owners=await usage_by(self._store, since_s, "owner"),
            candidates=candidates,
            limits=limits[:MAX_LIMITS],
            num_limits=len(limits),
            saving=saving(candidates, await profile_means(self._store), pairs),
            keys=await self._key_names(),
            total_usd=sum(day.cost_usd for day in days),
            chart={
                "title": "Dollars per day",
                "unit": "$",
                "times": [int(day.of) for day in reversed(days)],
                "series": [
                    {"label": "dollars", "values": [day.cost_usd for day in reversed(days)]}
                ],
                "lines": [],
            },
        )

    async def ask(self, request: Request) -> Response:
        """`GET /console/ask`."""
        names = [entry["id"] for entry in self._api.pool_view().entries()]
        return self._page(request, "ask", models=names, default_alpha=self._default_alpha)

    def _page(self, request: Request, name: str, **values: Any) -> Response:
        address = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        return self._renderer.page(name, address=address, now_s=time.time(), **values)

    async def _key_names(self) -> Mapping[str, str]:
        """Names of the keys by id; of one that is not there, the id is shown."""
        return {key.key_id: key.name for key in await list_keys(self._store)}


def _with_cookie(request: Request, token: str) -> Response:
    cookie = session_cookie(token, is_https=request.url.scheme == "https")
    return Response(status_code=204, headers={"set-cookie": cookie})
