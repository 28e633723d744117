"""What each route does with the orchestrator, the store and the jobs.

A handler gets the whole body and the key's owner from the edge, in `request.scope["atlas"]`; errors
raised here become responses there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from serve_app.config import AtlasConfig
from serve_app.errors import AtlasError, DeadlineExceeded, InvalidRequest, NotFound
from serve_app.gateway.admin.job_events import JobEvents
from serve_app.gateway.chat.chat_call import to_chat_call
from serve_app.gateway.chat.chunk_shaper import ChunkShaper
from serve_app.gateway.chat.extension import completion_extension, decision_object
from serve_app.gateway.chat.parsing import parse_json, validate
from serve_app.gateway.chat.pool_view import PoolView
from serve_app.gateway.chat.streaming import EventStream
from serve_app.gateway.chat.trajectory import Trajectory
from serve_app.gateway.chat.wire import ChatRequest, FeedbackRequest
from serve_app.gateway.chat.writing import ChunkWriter, completion
from serve_app.gateway.edge.errors import JsonResponse
from serve_app.gateway.edge.exchange import Exchange, looks_like_request_id
from serve_app.gateway.edge.rate import RateLimiter
from serve_app.gateway.usage import KeyUsage
from serve_app.jobs import Jobs, JobSubmission
from serve_app.orchestrator.answer import Answer
from serve_app.orchestrator.direct import DirectTools
from serve_app.orchestrator.run import Piece
from serve_app.schemas import AccessLists, ChatCall, Decision, Drift, PoolLoad, PoolState, Report
from serve_app.store import (
    Job,
    OutcomeLog,
    Store,
    StoredTrace,
    add_feedback,
    list_policies,
    list_snapshots,
    read_trace,
    storable_query,
    usage_of,
)
from serve_app.store.sums import WIN
from serve_app.telemetry import FEEDBACK_VERDICTS, GATEWAY_FIRST_PIECE_SECONDS, ToldMetrics
from serve_app.telemetry.projection import VerdictView

T = TypeVar("T")

Json = dict[str, Any]

DEADLINE_GRACE_S = 0.25
"""Seconds that the orchestrator has after a deadline to answer with its own, fuller error."""

PATIENCE_S = 1.0
"""Outcomes are written behind the response: how long feedback, and who wants to see a request's
trace, waits for the request to appear."""

_POLL_S = 0.05


class RequestRunner(Protocol):
    """What runs a request, and puts its report into the outcome log, answered or not."""

    async def complete(self, call: ChatCall) -> tuple[Answer, Report]:
        """Run a request whole.

        Raises:
            AtlasError: If it cannot be answered.
        """
        ...

    def stream(self, call: ChatCall) -> AsyncGenerator[Piece | Report, None]:
        """Run a request piece by piece; closed early when the client leaves.

        Yields:
            Pieces of the answer, then the report; between the pieces, where the call wants events,
            those without choices that tell of one.

        Raises:
            AtlasError: Before the first piece as `complete`; after it, and the answer is cut off.
        """
        ...

    async def decide(self, call: ChatCall) -> Decision:
        """Decide only.

        Raises:
            AtlasError: If nothing can be chosen.
        """
        ...

    @property
    def tools(self) -> DirectTools:
        """The pool's tools, for a caller that calls them itself."""
        ...

    def pool(self) -> PoolState:
        """The pool, as last heard of; never waits."""
        ...

    async def load(self) -> PoolLoad | None:
        """What the pool has to do now; `None` where nobody says."""
        ...

    def breakers(self) -> Mapping[str, str]:
        """Of the models whose breaker is not closed in this process: where it stands."""
        ...

    async def drifts(self) -> tuple[Drift, ...]:
        """How far verdicts on each candidate are from its profile.

        Raises:
            AtlasError: If the router does not answer.
        """
        ...

    def ready(self) -> tuple[bool, Json]:
        """Whether any request can be served, and the details; never waits."""
        ...


class Handlers:
    """One handler per route; the admins' of the pool are in `PoolAdmin`."""

    def __init__(
        self,
        orchestrator: RequestRunner,
        store: Store,
        outcomes: OutcomeLog,
        jobs: Jobs,
        config: AtlasConfig,
        metrics: ToldMetrics,
    ) -> None:
        """Of a gateway; the arguments are those of `build_api`."""
        self._orchestrator = orchestrator
        self._store = store
        self._outcomes = outcomes
        self._jobs = jobs
        self._config = config
        self._limits = config.gateway.limits
        self._metrics = metrics
        self._feedback_rate = RateLimiter(self._limits.feedback_per_minute)
        self._view: PoolView | None = None

    # The API proper.

    async def chat_completions(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        exchange: Exchange = request.scope["atlas"]
        body, call = self._read_call(exchange, self._read_json(exchange))
        return await self._answered(exchange, body, call)

    async def replay(self, request: Request) -> Response:
        """`POST /v1/trajectories/{request_id}/replay`."""
        exchange: Exchange = request.scope["atlas"]
        body, call = self._read_call(exchange, self._read_json(exchange))
        trace = await self._trace(exchange, request)
        if storable_query(call.query) != trace.query:
            raise InvalidRequest(
                "messages: send the request again that is to be replayed; its last user message "
                "was another one",
                "messages",
            )
        if call.fixed is not None and call.fixed.policy_version is None and trace.policy_version:
            fixed = replace(call.fixed, policy_version=trace.policy_version)
            call = replace(call, fixed=fixed)
        return await self._answered(exchange, body, replace(call, replay=trace.choices()))

    async def _answered(self, exchange: Exchange, body: ChatRequest, call: ChatCall) -> Response:
        if body.stream:
            return await self._stream(exchange, body, call)
        answer, extension = await self._complete(exchange, call)
        headers = {"x-atlas-pair": extension["pair"], "x-atlas-path": extension["path"]}
        return JsonResponse(completion(call, answer, extension), headers=headers)

    async def complete(self, exchange: Exchange, raw: Json) -> tuple[Answer, Json]:
        """Answer a chat whole.

        Args:
            exchange: The request that asks for it.
            raw: The chat, as in the body of `POST /v1/chat/completions`.

        Returns:
            The answer, and its `atlas` object.

        Raises:
            AtlasError: If it cannot be answered.
        """
        _, call = self._read_call(exchange, raw)
        return await self._complete(exchange, call)

    async def _complete(self, exchange: Exchange, call: ChatCall) -> tuple[Answer, Json]:
        async with in_time(exchange):
            await _admit(call)
            answer, report = await self._orchestrator.complete(call)
        return answer, self._book(exchange, call, report)

    async def _stream(self, exchange: Exchange, body: ChatRequest, call: ChatCall) -> Response:
        items = self._orchestrator.stream(call)
        try:
            async with in_time(exchange):
                await _admit(call)
                first = await anext(items)
                exchange.first_piece_s = exchange.elapsed_s()
            if isinstance(first, Report):
                raise TypeError("the orchestrator's stream had no piece")
        except BaseException:
            await items.aclose()
            raise
        return EventStream(
            first,
            items,
            exchange=exchange,
            writer=ChunkWriter(call),
            shaper=ChunkShaper(include_usage=body.includes_usage),
            deadline=lambda: in_time(exchange),
            finish=lambda report: self._book(exchange, call, report),
        )

    async def route(self, request: Request) -> Response:
        """`POST /v1/route`."""
        exchange: Exchange = request.scope["atlas"]
        decision = await self.decide(exchange, self._read_json(exchange))
        headers = {"x-atlas-pair": decision["pair"], "x-atlas-path": decision["path"]}
        return JsonResponse(decision, headers=headers)

    async def decide(self, exchange: Exchange, raw: Json) -> Json:
        """Decide who would answer a chat; the arguments are those of `complete`.

        Raises:
            AtlasError: If nothing can be chosen.
        """
        _, call = self._read_call(exchange, raw)
        async with in_time(exchange):
            decision = await self._orchestrator.decide(replace(call, explain=True))
        exchange.line.pair, exchange.line.path = str(decision.pair), str(decision.path)
        exchange.line.policy_version = decision.policy_version
        return {
            "object": "atlas.decision",
            "request_id": exchange.request_id,
            "alpha": call.limits.alpha,
            **decision_object(decision),
        }

    async def feedback(self, request: Request) -> Response:
        """`POST /v1/feedback`."""
        exchange: Exchange = request.scope["atlas"]
        said = validate(FeedbackRequest, self._read_json(exchange))
        self._feedback_rate.take(exchange.owner)
        score = min(1.0, max(0.0, said.score))
        rated = await self._once_written(
            exchange,
            said.request_id,
            lambda: add_feedback(self._store, said.request_id, exchange.owner, score, said.comment),
        )
        if rated.unembedded is not None:
            self._outcomes.embed_rated(said.request_id, rated.unembedded)
        verdict = "good" if score >= WIN else "bad"
        exchange.verdict = VerdictView(said.request_id, score, verdict)
        self._metrics.record(FEEDBACK_VERDICTS, candidate=str(rated.pair), verdict=verdict)
        return JsonResponse(
            {"object": "atlas.feedback", "request_id": said.request_id, "score": score}
        )

    async def trajectory(self, request: Request) -> Response:
        """`GET /v1/trajectories/{request_id}`."""
        exchange: Exchange = request.scope["atlas"]
        trace = await self._trace(exchange, request)
        return JsonResponse(Trajectory.of(trace).model_dump(mode="json"))

    async def _trace(self, exchange: Exchange, request: Request) -> StoredTrace:
        """What happened in the request that the path names.

        Raises:
            NotFound: If it is none of the caller's.
        """
        request_id = request.path_params["request_id"].removeprefix("chatcmpl-")
        return await self._once_written(
            exchange, request_id, lambda: read_trace(self._store, request_id, exchange.owner)
        )

    async def usage(self, request: Request) -> Response:
        """`GET /v1/usage`."""
        exchange: Exchange = request.scope["atlas"]
        await self._outcomes.flush(PATIENCE_S)
        periods = await usage_of(self._store, exchange.owner)
        return JsonResponse(KeyUsage.of(exchange.owner, periods).model_dump(mode="json"))

    async def _once_written(
        self, exchange: Exchange, request_id: str, work: Callable[[], Awaitable[T]]
    ) -> T:
        """Do something with a finished request, once the store has it.

        Raises:
            NotFound: If the store does not have it in time.
        """
        patience_s = PATIENCE_S if looks_like_request_id(request_id) else 0.0
        if patience_s:
            await self._outcomes.flush(patience_s)
        while True:
            try:
                return await work()
            except NotFound:
                # Another replica may have answered the request, and not written it yet.
                if exchange.elapsed_s() >= patience_s:
                    raise
                await asyncio.sleep(_POLL_S)

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`."""
        return JsonResponse({"object": "list", "data": self.pool_view().entries()})

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/{model_id}`."""
        return JsonResponse(self.pool_view().entry(request.path_params["model_id"]))

    async def admin_snapshots(self, request: Request) -> Response:
        """`GET /v1/admin/snapshots`."""
        snapshots = await list_snapshots(self._store)
        policies = await list_policies(self._store)
        body = {
            "object": "list",
            "data": [asdict(snapshot) for snapshot in snapshots],
            "policies": [asdict(policy) for policy in policies],
        }
        return JsonResponse(body)

    async def submit_job(self, request: Request) -> Response:
        """`POST /v1/admin/jobs`."""
        exchange: Exchange = request.scope["atlas"]
        raw = parse_json(exchange.body, self._limits.max_json_depth)
        job = await self._jobs.submit(validate(JobSubmission, raw).root, exchange.owner)
        return JsonResponse(_job_object(job), 201)

    async def list_jobs(self, request: Request) -> Response:
        """`GET /v1/admin/jobs`."""
        data = [_job_object(job) for job in await self._jobs.list()]
        return JsonResponse({"object": "list", "data": data})

    async def get_job(self, request: Request) -> Response:
        """`GET /v1/admin/jobs/{job_id}`; as events where the client accepts only those."""
        job_id = request.path_params["job_id"]
        job = await self._jobs.get(job_id)
        if request.headers.get("accept", "").partition(",")[0].strip() != "text/event-stream":
            return JsonResponse(_job_object(job))
        return JobEvents(
            job, lambda: self._jobs.get(job_id), _job_object, max_s=self._limits.max_deadline_s
        )

    async def cancel_job(self, request: Request) -> Response:
        """`DELETE /v1/admin/jobs/{job_id}`."""
        return JsonResponse(_job_object(await self._jobs.cancel(request.path_params["job_id"])))

    async def healthz(self, request: Request) -> Response:
        """`GET /healthz`: this process answers."""
        return JsonResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """`GET /metrics`: Prometheus' text format."""
        page = await self._metrics.page()
        return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def readyz(self, request: Request) -> Response:
        """`GET /readyz`: a request can be served."""
        ready, details = self._orchestrator.ready()
        status = {"status": "ready" if ready else "not ready"}
        return JsonResponse({**details, **status}, 200 if ready else 503)

    # What they share.

    def _read_json(self, exchange: Exchange) -> Json:
        return parse_json(exchange.body, self._limits.max_json_depth)

    def _read_call(self, exchange: Exchange, raw: Json) -> tuple[ChatRequest, ChatCall]:
        """A chat's request, checked against everything known here."""
        body = validate(ChatRequest, raw)
        exchange.line.model = body.model if len(body.model) <= 128 else body.model[:128]
        call = to_chat_call(
            body,
            request_id=exchange.request_id,
            owner=exchange.owner,
            default_alpha=self._config.router.default_alpha,
            limits=self._limits,
            elapsed_s=exchange.elapsed_s(),
            begin_effect=None if exchange.held_key is None else exchange.held_key.begin_effect,
            purse=exchange.purse,
            trace=exchange.trace,
        )
        exchange.ends_s = time.monotonic() + call.limits.deadline_s
        view = self.pool_view()
        view.check_names(call)
        options = body.atlas
        denied = AccessLists(
            not_models=frozenset((options and options.not_models) or ()),
            not_tools=frozenset((options and options.not_tools) or ()),
        )
        call = view.within(call, denied, exchange.lists)
        view.check(call)
        return body, call

    def pool_view(self) -> PoolView:
        """The pool as it is now, indexed."""
        pool = self._orchestrator.pool()
        if self._view is None or self._view.pool is not pool:
            self._view = PoolView(pool, pool.config or self._config)
        return self._view

    async def load(self) -> PoolLoad | None:
        """What the pool has to do now; `None` where nobody says."""
        return await self._orchestrator.load()

    async def drifts(self) -> tuple[Drift, ...]:
        """How far verdicts on each candidate are from its profile; nothing without the router."""
        try:
            return await self._orchestrator.drifts()
        except AtlasError:
            return ()

    def breakers(self) -> Mapping[str, str]:
        """Of the models whose breaker is not closed in this process: where it stands."""
        return self._orchestrator.breakers()

    def _book(self, exchange: Exchange, call: ChatCall, report: Report) -> Json:
        """Log and count a finished request.

        Returns:
            Its `atlas` object.
        """
        pair, line = str(report.pair), exchange.line
        line.pair, line.path = pair, str(report.decision.path)
        line.policy_version = report.decision.policy_version
        line.steps, line.stop = len(report.steps), report.stop.value
        line.prompt_tokens = report.usage.prompt_tokens
        line.completion_tokens = report.usage.completion_tokens
        line.cost_usd = report.usage.cost_usd
        if exchange.first_piece_s is not None:
            self._metrics.record(
                GATEWAY_FIRST_PIECE_SECONDS, exchange.first_piece_s, candidate=pair
            )
        return completion_extension(report, alpha=call.limits.alpha, explain=call.explain)


async def _admit(call: ChatCall) -> None:
    """Let a request begin, if the limits of its key leave anything.

    Raises:
        QuotaExceeded: If they do not.
        QuotaUnknown: If the store cannot be asked.
    """
    if call.purse is not None:
        await call.purse.admit()


def _job_object(job: Job) -> Json:
    """A job, without the questions it was given."""
    settings = {name: value for name, value in job.settings.items() if name != "questions"}
    return {"object": "atlas.job", **asdict(job), "settings": settings}


@asynccontextmanager
async def in_time(exchange: Exchange) -> AsyncIterator[None]:
    """End the block when the request's time is up.

    Raises:
        DeadlineExceeded: If it was.
    """
    left_s = exchange.ends_s + DEADLINE_GRACE_S - time.monotonic()
    try:
        async with asyncio.timeout(left_s) as timeout:
            yield
    except TimeoutError:
        if not timeout.expired():
            raise
        raise DeadlineExceeded(
            f"the request's {exchange.ends_s - exchange.started_s:g} s are up; "
            "atlas.deadline_s sets them"
        ) from None
