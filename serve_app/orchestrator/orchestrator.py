"""A request from the call to the answer: decide, run a pattern, report.

Whole and streamed requests share the way. What happened is handed to the outcome log, answered or
not.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from serve_app.budget import Deadline
from serve_app.config import AtlasConfig
from serve_app.errors import (
    AtlasError,
    BudgetExceeded,
    CandidateGone,
    InvalidRequest,
    ModelNotFound,
    NoCandidate,
    ServiceError,
)
from serve_app.models.clients import ModelClients, call
from serve_app.models.watcher import PoolHandle, PoolWatcher
from serve_app.orchestrator.answer import Answer
from serve_app.orchestrator.channel import Channel
from serve_app.orchestrator.decision_client import (
    Decider,
    EmbedderHandle,
    RouterHandle,
    facts_of,
)
from serve_app.orchestrator.engine import Engine, why_it_ended
from serve_app.orchestrator.pairs.runner import PairRunner
from serve_app.orchestrator.patterns.builtin import PATTERNS
from serve_app.orchestrator.patterns.declared import PatternRunner, can_be_pattern, check_call
from serve_app.orchestrator.recovery import stop_of
from serve_app.orchestrator.rules import RuleFollower
from serve_app.orchestrator.run import Course, Piece, Run, SpanEvent
from serve_app.orchestrator.scale_to_zero import Waker, awake_only, sleepers_last
from serve_app.orchestrator.sessions import Sessions
from serve_app.orchestrator.trace import SpanKind
from serve_app.schemas import (
    BY_STEPS,
    NO_TOOL,
    Action,
    Candidate,
    ChatCall,
    DecidedBy,
    Decision,
    Drift,
    Limits,
    MemberState,
    Pair,
    PoolLoad,
    PoolState,
    Replay,
    Report,
    StopReason,
)

logger = logging.getLogger(__name__)

_SUSPECT_EVERY_S = 1.0
_LOAD_TIMEOUT_S = 2.0
"""A page does without what takes longer."""
_ASK_ROUTER_S = 5.0
"""How long the router may take to say what it serves with."""

ROUTED = "atlas"
"""The `model` name that lets the router decide."""


class _Suspect(Protocol):
    def remote(self, model_id: str, /) -> Awaitable[None]: ...


class _Load(Protocol):
    def remote(self) -> Awaitable[PoolLoad]: ...


class _Drifts(Protocol):
    def remote(self) -> Any: ...


class DriftingRouter(RouterHandle, Protocol):
    """What is called on the `Router` deployment."""

    @property
    def drifts(self) -> _Drifts:
        """Answers with how far verdicts on each candidate are from its profile."""
        ...


class ControllerHandle(PoolHandle, Protocol):
    """What is called on the `PoolController` deployment."""

    @property
    def load(self) -> _Load:
        """Answers with what the pool has to do now."""
        ...

    @property
    def suspect(self) -> _Suspect:
        """Has it look at a model that failed."""
        ...


class Orchestrator:
    """Answers chat requests with the pool; one per gateway replica."""

    def __init__(
        self,
        config: AtlasConfig,
        embedder: EmbedderHandle,
        router: DriftingRouter,
        controller: ControllerHandle,
        record: Callable[[Report, float], None],
        clients: ModelClients | None = None,
    ) -> None:
        """Follow the pool from now on.

        Args:
            config: The deployment.
            embedder: Handle of the `Embedder` deployment.
            router: Handle of the `Router` deployment.
            controller: Handle of the `PoolController` deployment.
            record: Takes the report and the alpha of every request that was decided; must not
                block.
            clients: Handles to the models; `None` makes them.
        """
        self._record = record
        self._keeps_content = config.store.keep_content
        self._controller = controller
        self._router = router
        self._suspicions: dict[str, asyncio.Task[None]] = {}
        self._clients = clients or ModelClients(self._suspect)
        self._waker = Waker(config.pool, self._clients)
        self._sessions = Sessions()
        self._sessions.use(config.models)
        decider = Decider(embedder, router, self._left_alone)
        self._pairs = PairRunner(config, self._clients, embed=decider.embed)
        self.tools = self._pairs.direct
        """The pool's tools, for a caller that calls them itself."""
        self._max_tool_calls = config.gateway.limits.max_tool_calls
        self._declared = PatternRunner(self._pairs, decider, config)
        self._engine = Engine(self._pairs, self._declared, decider, config.router.planner)
        self._patterns = {name: make(self._engine) for name, make in PATTERNS.items()}
        self._config = config
        self._rules = RuleFollower(self._pairs, decider, config)
        self._plain_tools: frozenset[str] = frozenset({NO_TOOL})
        self._watcher = PoolWatcher(controller, self._use)

    def _use(self, pool: PoolState) -> None:
        """Take over a changed pool."""
        self._clients.use(
            {m.model_id: m.application for m in pool.models if m.application is not None}
        )
        if pool.config is not None:
            self._pairs.use(pool.config)
            self._declared.use(pool.config)
            self._sessions.use(pool.config.models)
        self._rules.use(pool, pool.config or self._config)
        self._plain_tools = frozenset(
            {NO_TOOL, *(t for t in pool.tools if self._pairs.kind(t) == "context")}
        )

    def _left_alone(self) -> frozenset[str]:
        """Models whose breaker is open, and patterns that cannot do without them."""
        models = self._pairs.parts.models.breakers.open_models()
        if not models:
            return models
        pool = self._watcher.state
        stopped = set(pool.ready_patterns()) - set(pool.ready_patterns(models))
        return models | {Pair.of_pattern(name).model_id for name in stopped}

    def breakers(self) -> dict[str, str]:
        """Of the models whose breaker is not closed here: where it stands."""
        states = self._pairs.parts.models.breakers.states()
        return {model_id: str(state) for model_id, state in states.items()}

    async def drifts(self) -> tuple[Drift, ...]:
        """How far verdicts on each candidate are from its profile.

        Raises:
            AtlasError: If the router does not answer in time.
        """
        drifts: tuple[Drift, ...] = await call(
            self._router.drifts.remote(), Deadline.after(_ASK_ROUTER_S)
        )
        return drifts

    def _suspect(self, model_id: str) -> None:
        """Have the controller look at a model that failed; not twice a second."""
        if model_id in self._suspicions:
            return

        async def tell() -> None:
            try:
                await self._controller.suspect.remote(model_id)
                await asyncio.sleep(_SUSPECT_EVERY_S)
            except Exception as error:  # it looks by itself every few seconds
                logger.warning("the pool controller does not answer: %s", error)
            finally:
                del self._suspicions[model_id]

        self._suspicions[model_id] = asyncio.get_running_loop().create_task(tell())

    def pool(self) -> PoolState:
        """The pool as last told by the controller."""
        return self._watcher.state

    async def load(self) -> PoolLoad | None:
        """What the pool has to do now; `None` where the controller does not say."""
        try:
            async with asyncio.timeout(_LOAD_TIMEOUT_S):
                return await self._controller.load.remote()
        except Exception as error:
            logger.warning("the pool controller does not tell of the load: %r", error)
            return None

    def ready(self) -> tuple[bool, dict[str, Any]]:
        """Whether any pair can answer, and where each model stands."""
        pool = self._watcher.state
        models = {
            member.model_id: {
                "state": member.state.value,
                **({"reason": member.reason} if member.reason else {}),
            }
            for member in pool.models
        }
        return bool(pool.ready_pairs()), {"pool_version": pool.pool_version, "models": models}

    async def start(self) -> None:
        """Wait for the pool, so that no caller hears of an empty one; get the tools' workers up."""
        await self._watcher.first()
        await self._pairs.start()
        await self._rules.start()

    def close(self) -> None:
        """Let go of the tools' workers."""
        self._waker.close()
        self._rules.close()
        self._pairs.close()

    async def decide(self, call: ChatCall) -> Decision:
        """The decision alone; nothing runs."""
        run = Run(call)
        await self._decide(run)
        assert run.decision is not None
        return run.decision

    async def complete(self, call: ChatCall) -> tuple[Answer, Report]:
        """Answer a request whole.

        Raises:
            AtlasError: As `stream`.
        """
        run = self._begun(call)
        wanted = await self._decide(run)
        with self._on_record(run):
            answer = await self._answer(run, wanted)
        return answer, run.report()

    async def measure(self, call: ChatCall) -> tuple[Report, AtlasError | None]:
        """Run a request for a profile: as any other, but it is not traffic.

        Returns:
            What happened, and what it failed with, if it did.

        Raises:
            ModelNotFound, NoCandidate: If nothing could run.
        """
        run = self._begun(call, is_traffic=False)
        wanted = await self._decide(run)
        failure = None
        try:
            with self._on_record(run):
                await self._answer(run, wanted)
        except AtlasError as error:
            failure = error
        return run.report(), failure

    async def stream(self, call: ChatCall) -> AsyncGenerator[Piece | Report, None]:
        """Answer a request piece by piece.

        Yields:
            Its pieces; then the report. Where the caller wants events, also pieces without choices,
            of the pair that was decided on first.

        Raises:
            ModelNotFound: If `model` names nothing in the pool.
            NoCandidate: If no ready pair is within the caller's limits.
            DeadlineExceeded: If time is up.
            InvalidRequest: If the chosen engine refuses the request.
            AtlasError: What the last pair tried failed with.
        """
        channel: Channel[Piece | SpanEvent] = Channel()
        run = self._begun(call, channel)
        wanted = await self._decide(run)
        assert run.decision is not None
        decided = Piece(run.decision.pair, run.decision.path, ())
        with self._on_record(run):
            async with aclosing(channel.read(self._answer(run, wanted))) as pieces:
                async for piece in pieces:
                    yield piece if isinstance(piece, Piece) else decided._replace(event=piece)
        yield run.report()

    def _begun(
        self,
        call: ChatCall,
        channel: Channel[Piece | SpanEvent] | None = None,
        *,
        is_traffic: bool = True,
    ) -> Run:
        """A request that is to be answered, from its beginning."""
        return Run(
            call,
            channel,
            is_traffic,
            keeps_content=self._keeps_content and is_traffic,
            max_tool_calls=self._max_tool_calls,
        )

    @contextmanager
    def _on_record(self, run: Run) -> Iterator[None]:
        """Say why the run of the block ended, and report it, however it ends."""
        try:
            yield
            assert run.answer is not None
            run.stop = run.answer.stop
        except AtlasError as failure:
            run.error = failure.message
            failure.stop = run.stop = stop_of(failure)
            if isinstance(failure, ServiceError | InvalidRequest):
                raise
            ours = ServiceError(failure.message)  # a failed tool is no fault of the caller's
            ours.stop = run.stop
            raise ours from failure
        except Exception:
            run.error, run.stop = "an unforeseen error", StopReason.ERROR
            raise
        except BaseException:
            run.error = why_it_ended(run.budget.deadline)
            over = run.budget.deadline.is_over()
            run.stop = StopReason.DEADLINE if over else StopReason.LEFT
            raise
        finally:
            run.end()
            if run.is_traffic:
                self._record(run.report(), run.call.limits.alpha)

    async def _answer(self, run: Run, wanted: str | None) -> Answer:
        """Have a pattern answer a request that was decided on.

        Args:
            run: The request.
            wanted: The model to wake for the next ones; `None` wakes none.

        Raises:
            KeyRequired: If the caller named a pair that acts once, and sent no idempotency key.
        """
        assert run.decision is not None
        if run.decision.path is DecidedBy.PINNED:
            self._pairs.check_key(run.decision.pair.tool_id, run.call)
        if wanted is not None:
            self._waker.wake(wanted)
        for model_id in self._sleepers(run.decision.pair):
            await self._waker.wait_for(model_id, run.budget.deadline)
        name = "single" if run.course is None or run.is_plain else "policy"
        run.answer = await self._patterns[name].run(run)
        if run.call.session:
            self._sessions.answered(run.call.session, run.report())
        return run.answer

    async def _decide(self, run: Run) -> str | None:
        """Pinned, a rule's word, or the router's.

        Returns:
            The model that would have been chosen if it did not sleep; `None` where that is none.
        """
        if run.call.replay is not None:
            await self._choose_again(run, run.call.replay)
            return None
        if run.call.model != ROUTED:
            run.decision = self._pinned(run.call)
            return None
        limits = replace(run.call.limits, needs=run.call.needs)
        if run.is_plain:
            # The caller's own tools, and several choices, go with plain generation only.
            allowed = (
                self._plain_tools if limits.tools is None else limits.tools & self._plain_tools
            )
            limits = replace(limits, tools=allowed, max_steps=1)
        if not can_be_pattern(run.call):
            limits = self._without_patterns(limits)
        asleep = self._waker.asleep(self._watcher.state)
        without = self._left_alone() if run.call.fixed is None else frozenset[str]()
        ruled = await self._rules.decide(run, replace(limits, without=without))
        if ruled.decision is not None:
            run.embedding, run.decision = ruled.embedding, sleepers_last(ruled.decision, asleep)
            return None
        limits = ruled.limits
        embedding, decision = await self._route(run, limits, ruled.embedding)
        wanted: str | None = None
        if run.call.fixed is not None:  # what sleeps is waited for
            version = decision.policy_version
            run.call = replace(run.call, fixed=replace(run.call.fixed, policy_version=version))
        elif asleep:
            awake = awake_only(limits, self._watcher.state, asleep)
            if self._sleepers(decision.pair):
                wanted = self._sleepers(decision.pair)[0]
                # Asked anew, because the choice among fewer has another propensity.
                with contextlib.suppress(NoCandidate, BudgetExceeded):
                    embedding, decision = await self._route(run, awake, embedding)
            if not self._sleepers(decision.pair):
                limits, decision = awake, sleepers_last(decision, asleep)
        if run.call.session and run.call.fixed is None:
            decision = self._sessions.stay(run.call, decision)
        decision = self._rules.after(run, ruled, decision)
        run.embedding, run.decision = embedding, decision
        if decision.path in BY_STEPS:
            assert embedding is not None  # the rules that decide by steps have no first look
            run.course = Course(limits, embedding, [decision])
        return wanted

    async def _choose_again(self, run: Run, replay: Replay) -> None:
        """Decide as an earlier request was decided.

        Raises:
            CandidateGone: If anything that the request chose is not in the pool any more.
            NoCandidate: If it is, and does not answer now.
        """
        chosen = {pair for _, pair in replay.steps}
        chosen |= {pair for times in replay.routes.values() for time in times for pair in time}
        for pair in sorted(chosen):
            try:
                self._pinned(replace(run.call, model=str(pair)))
            except ModelNotFound:
                raise CandidateGone(
                    f"request {replay.request_id!r} chose {str(pair)!r}, which is not in the pool "
                    "any more; it cannot be replayed"
                ) from None
        pool = self._watcher.state
        if not replay.is_policy:
            pairs = dict.fromkeys(pair for _, pair in replay.steps)
            candidates = tuple(_decided(pair, pool).candidates[0] for pair in pairs)
            run.decision = replace(_decided(replay.steps[0][1], pool), candidates=candidates)
            return
        course = [replace(_decided(pair, pool), action=action) for action, pair in replay.steps]
        if replay.answer_step is not None:
            end = replace(course[-1], action=Action.ANSWER, answer_step=replay.answer_step)
            course.append(end)
        run.decision, *rest = course
        (run.embedding,) = await self._engine.decider.embed([run.call.query], run.budget.deadline)
        run.course = Course(run.call.limits, run.embedding, [run.decision], recorded=rest)

    def _sleepers(self, pair: Pair) -> list[str]:
        """Models that sleep and that a candidate cannot do without."""
        pool = self._watcher.state
        asleep = self._waker.asleep(pool)
        if not asleep or not pair.is_pattern:
            return [pair.model_id] if pair.model_id in asleep else []
        member = next(p for p in pool.patterns if p.pair == pair)
        needed = member.models | {of.model_id for of in member.pairs}
        for choice in member.choices:
            if all(of.model_id in asleep for of in choice):
                needed |= {next(iter(sorted(choice))).model_id}
        return sorted(needed & asleep)

    def _without_patterns(self, limits: Limits) -> Limits:
        """Limits that leave pairs only."""
        models = frozenset(member.model_id for member in self._watcher.state.models)
        return replace(limits, models=models if limits.models is None else limits.models & models)

    async def _route(
        self, run: Run, limits: Limits, embedding: NDArray[np.float32] | None
    ) -> tuple[NDArray[np.float32] | None, Decision]:
        """The (dim,) embedding of the query, `None` as long as it is not known, and the decision.

        Raises:
            BudgetExceeded: If every pair that answers now costs more than the caller allows.
            NoCandidate: If no pair that answers now is within the other limits.
        """
        call, deadline, decider = run.call, run.budget.deadline, self._engine.decider
        try:
            with run.trace.root.child(SpanKind.DECISION, "router") as span:
                embedding, decision = await decider.decide(
                    call.query,
                    limits,
                    deadline,
                    explain=call.explain,
                    request_id=call.request_id,
                    embedding=embedding,
                    fixed=call.fixed,
                    facts=span.attributes,
                )
                span.attributes |= facts_of(decision)
                return embedding, decision
        except NoCandidate:
            if limits.max_cost_usd is None:
                raise
            # Raises again unless the cost is what leaves no pair.
            anything = replace(limits, max_cost_usd=None)
            _, dear = await decider.decide(
                call.query, anything, deadline, explain=True, fixed=call.fixed
            )
            least_usd = min((candidate.cost_usd for candidate in dear.candidates), default=0.0)
            raise BudgetExceeded(
                f"atlas.max_cost_usd: {limits.max_cost_usd:g} USD is below the price of every "
                f"pair; the cheapest costs about {least_usd:.2g} USD",
                "atlas.max_cost_usd",
                least_usd,
            ) from None

    def _pinned(self, call: ChatCall) -> Decision:
        """The decision the caller made.

        Raises:
            ModelNotFound: If there is no such model, pair or pattern.
            NoCandidate: If there is, but it does not answer now.
            InvalidRequest: If it is a pattern, and the call is none for it.
        """
        model, pair = call.model, Pair.parse(call.model)
        pool = self._watcher.state
        if pair.is_pattern:
            check_call(call)
            pattern = next((p for p in pool.patterns if p.pair == pair), None)
            if pattern is None:
                raise ModelNotFound(
                    f"the pattern {model!r} does not exist; GET /v1/models lists what does", "model"
                )
            if pattern.name not in pool.ready_patterns():
                why = f": {pattern.missing}" if pattern.missing else ""
                raise NoCandidate(f"the pattern {model!r} does not answer now{why}")
            return _decided(pair, pool)
        known_model = any(member.model_id == pair.model_id for member in pool.models)
        if pair not in pool.pairs and not (pair.tool_id == NO_TOOL and known_model):
            raise ModelNotFound(
                f"the model {model!r} does not exist; GET /v1/models lists what does", "model"
            )
        member = next((m for m in pool.models if m.model_id == pair.model_id), None)
        if member is None or member.state is not MemberState.READY:
            state = member.state.value if member else "unknown"
            raise NoCandidate(f"the model {pair.model_id!r} does not answer now ({state})")
        return _decided(pair, pool)


def _decided(pair: Pair, pool: PoolState) -> Decision:
    """The decision for a candidate that the caller named."""
    candidate = Candidate(pair, utility=0.0, quality=0.0, cost=0.0)
    return Decision((candidate,), DecidedBy.PINNED, 1.0, 1.0, 0, pool.pool_version)
