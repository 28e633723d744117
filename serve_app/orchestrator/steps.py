"""The steps of a request: pair after pair until one answers, or what the learned policy says.

In comes a `Run` that was decided on; out come pieces of the answer, and the run has its steps, in
the order they were run, and the one whose answer was given.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve_app.budget import UNLIMITED, Budget, Caps, Deadline
from serve_app.errors import (
    AtlasError,
    BudgetExceeded,
    InvalidRequest,
    NoCandidate,
    ReplicaDied,
    ServiceError,
    UnfitForPair,
)
from serve_app.orchestrator.deciding import Decider, UnderWay
from serve_app.orchestrator.engines import MAX_DEATHS, pause_after_death
from serve_app.orchestrator.executor import PairExecutor
from serve_app.orchestrator.history import answer_numbers, best_step, has_answer, seen
from serve_app.orchestrator.planning import PLANNER_SAMPLING, planner_messages
from serve_app.orchestrator.result import Delta, StepResult, whole_delta
from serve_app.router.policy.features import MAX_STEPS
from serve_app.schemas import (
    NO_TOOL,
    Action,
    ChatCall,
    Circumstances,
    Decision,
    Limits,
    Pair,
    Path,
    Report,
    Step,
    Usage,
)

logger = logging.getLogger(__name__)

_FIRST_TRY_SHARE = 0.6
"""Share of the time left that a step may take while another pair could still take over."""
_LAST_TRY_SHARE = 0.9
"""The same for the last step, where there is an answer that could be returned instead."""
_ASK_AGAIN_S = 5.0
"""How long the router may take to say what comes next; with half the time left as a bound too."""


@dataclass
class Run:
    """One request under way."""

    call: ChatCall
    deadline: Deadline
    began_s: float = field(default_factory=time.monotonic)
    limits: Limits | None = None
    """What the router was told of the caller's."""
    steps: list[Step] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    decision: Decision | None = None
    """The first one."""
    decisions: list[Decision] = field(default_factory=list)
    """Every one, where the policy decided first."""
    embedding: NDArray[np.float32] | None = None
    answer_embedding: NDArray[np.float32] | None = None
    """Of what the pair that ran last answered."""
    answer_embeddings: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    """Of each step's answer that the router was told of."""
    seconds_left: list[float] = field(default_factory=list)
    """At each decision after the first."""
    choices: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    """Of each step that answered."""
    answer_step: int | None = None
    pair: Pair | None = None
    """The pair that is running or ran last."""
    path: Path = Path.PINNED
    is_traffic: bool = True
    """Whether it goes into the outcome log."""
    deaths: int = 0
    """Replicas of models that died over it."""

    def __post_init__(self) -> None:
        """Its budget is what the caller allows."""
        max_usd = self.call.limits.max_cost_usd
        caps = UNLIMITED if max_usd is None else Caps(usd=max_usd)
        self.budget = Budget(self.deadline, caps)

    @property
    def is_plain(self) -> bool:
        """Whether one step is all it can take: with the caller's own tools, or several choices."""
        return bool(self.call.tools) or self.call.sampling.get("n", 1) > 1

    @property
    def max_steps(self) -> int:
        """Runs of a pair or of the planner, at most."""
        return min(self.call.limits.max_steps, MAX_STEPS)

    def may_go_on(self, failure: AtlasError) -> bool:
        """Whether another pair may be tried after a failure.

        What the caller did wrong is wrong for every pair, unless it only does not fit this one. And
        a request over which replicas died is sent to no other: it may be what kills them.
        """
        is_callers = isinstance(failure, InvalidRequest) and not isinstance(failure, UnfitForPair)
        return not (is_callers or self.deaths >= MAX_DEATHS or self.deadline.is_over())

    def report(self, error: str | None = None) -> Report:
        """What happened so far.

        Args:
            error: Why the request failed; `None` if it did not.
        """
        assert self.decision is not None
        return Report(
            request_id=self.call.request_id,
            decision=self.decision,
            steps=tuple(self.steps),
            usage=self.usage,
            seconds=time.monotonic() - self.began_s,
            query=self.call.query,
            embedding=None if self.embedding is None else self.embedding.astype("<f4").tobytes(),
            owner=self.call.owner,
            error=error,
            decisions=tuple(self.decisions),
            answer_step=self.answer_step,
            circumstances=self._circumstances() if self.decisions else None,
        )

    def _circumstances(self) -> Circumstances:
        assert self.limits is not None  # the policy decided by them
        vectors = [self.answer_embeddings.get(number) for number in range(len(self.steps))]
        return Circumstances(
            max_steps=self.limits.max_steps,
            max_cost_usd=self.limits.max_cost_usd,
            seconds_left=(self.limits.deadline_s, *self.seconds_left),
            answer_keys=answer_numbers(self.steps),
            answer_embeddings=tuple(
                None if vector is None else vector.astype("<f4").tobytes() for vector in vectors
            ),
        )


@dataclass(frozen=True)
class Plan:
    """A step that is to be run."""

    pair: Pair
    path: Path
    propensity: float
    policy_version: int
    call: ChatCall
    deadline: Deadline
    action: Action = Action.ROUTE
    wants_logprobs: bool = False
    """Whether to have the engine's log-probabilities, where it gives them."""
    insists: bool = False
    """Whether to run it again where its replica dies; else another pair takes over."""


class Stepper:
    """Runs the steps of requests; one per gateway replica."""

    def __init__(self, executor: PairExecutor, decider: Decider, planner: str | None) -> None:
        """Join the parts.

        Args:
            executor: Runs pairs.
            decider: Is asked what comes next.
            planner: Model that thinks.
        """
        self._executor = executor
        self._decider = decider
        self._planner = planner
        self._no_logprobs: set[str] = set()
        """Models whose engines refused a request for log-probabilities, and took it without."""

    async def try_candidates(
        self, run: Run, decision: Decision, *, stream: bool
    ) -> AsyncGenerator[Delta, None]:
        """Try the candidates in order until one answers.

        Raises:
            BudgetExceeded: If the budget covers none of them; names the least that one needs.
            AtlasError: What the last one tried failed with.
        """
        candidates = decision.candidates[: run.call.limits.max_steps]
        failures: list[AtlasError] = []
        for number, candidate in enumerate(candidates):
            is_last = number == len(candidates) - 1
            sent = False
            is_chosen = number == 0
            plan = Plan(
                pair=candidate.pair,
                path=decision.path if is_chosen else Path.FALLBACK,
                propensity=decision.propensity if is_chosen else 1.0,
                policy_version=decision.policy_version,
                call=run.call,
                deadline=run.deadline if is_last else _part(run.deadline, _FIRST_TRY_SHARE),
                insists=is_last,
            )
            try:
                async with aclosing(self._step(run, plan, stream=stream)) as deltas:
                    async for delta in deltas:
                        sent = True
                        yield delta
            except AtlasError as failure:
                failures.append(failure)
                if sent or not run.may_go_on(failure):
                    raise
                if is_last:
                    raise _worth_telling(failures) from failure
                logger.warning(
                    "request %s: %s failed (%s); falling back",
                    run.call.request_id,
                    candidate.pair,
                    failure.message,
                )
                continue
            run.answer_step = len(run.steps) - 1
            return

    async def follow(
        self, run: Run, decision: Decision, *, stream: bool
    ) -> AsyncGenerator[Delta, None]:
        """Do what the policy says until it is content, then give the best answer unchanged.

        An answer is held back, because it may not be the one: all but that of a last step without
        an earlier one.

        Raises:
            AtlasError: What the last step failed with, where none gave an answer.
        """
        failure: AtlasError = NoCandidate("no pair is left within the request's limits")
        while decision.action is not Action.ANSWER and not run.deadline.is_over():
            is_last = len(run.steps) + 1 >= run.max_steps
            plan = self._plan(run, decision, is_last=is_last)
            streams = stream and is_last and not has_answer(run.steps)
            sent = False
            try:
                async with aclosing(self._step(run, plan, stream=streams)) as deltas:
                    async for delta in deltas:
                        sent = True
                        yield delta
            except AtlasError as error:
                failure = error
                if sent:
                    raise
                logger.warning(
                    "request %s: %s failed (%s)", run.call.request_id, plan.pair, error.message
                )
                if plan.action is Action.ROUTE and not run.may_go_on(error):
                    break
            if streams and sent:
                run.answer_step = len(run.steps) - 1
                return
            if is_last or run.deaths >= MAX_DEATHS:
                break
            decision = await self._decide_next(run, decision)
        run.answer_step = best_step(run.steps)
        if run.answer_step is None:
            raise failure
        best = run.steps[run.answer_step]
        run.pair, run.path = best.pair, best.path
        if stream:
            yield whole_delta(run.choices[run.answer_step])

    def _plan(self, run: Run, decision: Decision, *, is_last: bool) -> Plan:
        """The step that a decision of the policy asks for."""
        answered = has_answer(run.steps)
        share = 1.0 if not answered else _LAST_TRY_SHARE
        deadline = _part(run.deadline, share if is_last else _FIRST_TRY_SHARE)
        call = run.call
        if decision.action is Action.ROUTE:
            notes = [s.answer for s in run.steps if s.action is Action.THINK and s.answer]
            call = replace(call, note="\n\n".join(notes) or None)
            pair = decision.pair
        else:
            pair = Pair(self._planner or "", NO_TOOL)
            answers = [s.answer for s in run.steps if s.action is Action.ROUTE and s.answer]
            call = replace(
                call,
                messages=planner_messages(call.query, answers),
                sampling=PLANNER_SAMPLING,
            )
        return Plan(
            pair=pair,
            path=decision.path,
            propensity=decision.propensity,
            policy_version=decision.policy_version,
            call=call,
            deadline=deadline,
            action=decision.action,
            wants_logprobs=decision.action is Action.ROUTE,
            insists=is_last and not answered,
        )

    async def _decide_next(self, run: Run, last: Decision) -> Decision:
        """What the policy wants next; without it, the best answer so far or the next-best pair."""
        assert run.embedding is not None  # the policy decided on it
        assert run.limits is not None
        assert run.decision is not None
        step = run.steps[-1]
        answer = None
        if step.action is Action.ROUTE:  # a thought leaves the last answer what it was
            answer = step.answer if step.error is None else None
            run.answer_embedding = None
        under_way = UnderWay(
            embedding=run.embedding,
            policy_version=run.decision.policy_version,
            history=tuple(seen(step) for step in run.steps),
            answer=answer or None,
            answer_embedding=run.answer_embedding,
        )
        seconds_left = 0.0
        try:
            seconds_left = run.deadline.remaining_s()
            limits = replace(run.limits, deadline_s=seconds_left)
            patience = _part(run.deadline, 0.5).sooner(_ASK_AGAIN_S)
            run.answer_embedding, decision = await self._decider.decide_next(
                under_way, limits, patience
            )
            if answer and run.answer_embedding is not None:
                run.answer_embeddings[len(run.steps) - 1] = run.answer_embedding
        except AtlasError as error:
            logger.warning(
                "request %s goes on without the router (%s)", run.call.request_id, error.message
            )
            decision = _without_router(run.steps, last)
        run.decisions.append(decision)
        run.seconds_left.append(seconds_left)
        return decision

    async def _step(self, run: Run, plan: Plan, *, stream: bool) -> AsyncGenerator[Delta, None]:
        """Run one pair, or the planner, and put what it did on record."""
        result = StepResult()
        began_s = time.monotonic()
        error: str | None = None
        if plan.action is Action.ROUTE:
            run.pair, run.path = plan.pair, plan.path
        try:
            async with aclosing(self._run_pair(run, plan, result, stream=stream)) as deltas:
                async for delta in deltas:
                    yield delta
            run.choices[len(run.steps)] = result.choices
        except AtlasError as failure:
            error = failure.message
            raise
        except Exception as failure:
            # A fault of ours, in what one pair does; another pair may well answer.
            logger.exception("request %s: %s failed", run.call.request_id, plan.pair)
            error = "an unforeseen error"
            raise ServiceError(f"the pair {plan.pair} failed") from failure
        except BaseException:
            error = why_it_ended(run.deadline)
            raise
        finally:
            run.usage.add(result.usage)
            run.steps.append(
                Step(
                    pair=plan.pair,
                    path=plan.path,
                    propensity=plan.propensity,
                    usage=result.usage,
                    seconds=time.monotonic() - began_s,
                    tool_calls=tuple(result.tool_calls),
                    error=error,
                    mean_logprob=result.mean_logprob,
                    answer=result.answer,
                    action=plan.action,
                    policy_version=plan.policy_version,
                )
            )

    async def _run_pair(
        self, run: Run, plan: Plan, result: StepResult, *, stream: bool
    ) -> AsyncGenerator[Delta, None]:
        """Run a pair; again where its replica died before a piece of its answer was out."""
        budget = run.budget.child(plan.deadline)
        while True:
            sent = False
            try:
                runs = self._run_once(plan, budget, result, stream=stream)
                async with aclosing(runs) as deltas:
                    async for delta in deltas:
                        sent = True
                        yield delta
                return
            except ReplicaDied:
                run.deaths += 1
                is_over = run.deaths >= MAX_DEATHS or plan.deadline.is_over()
                if sent or not plan.insists or is_over:
                    raise
                logger.warning("a replica of %s died; running it again", plan.pair)
                result.choices, result.tool_calls = [], []
                await pause_after_death(run.deaths)

    async def _run_once(
        self, plan: Plan, budget: Budget, result: StepResult, *, stream: bool
    ) -> AsyncGenerator[Delta, None]:
        """Run a pair; with log-probabilities where they are wanted and the engine gives them."""
        pair, call = plan.pair, plan.call
        is_second = False
        if (
            plan.wants_logprobs
            and not call.sampling.get("logprobs")
            and pair.model_id not in self._no_logprobs
        ):
            with_them = replace(call, sampling=call.sampling | {"logprobs": True})
            sent = False
            try:
                runs = self._executor.run(pair, with_them, budget, result, stream=stream)
                async with aclosing(runs) as deltas:
                    async for delta in deltas:
                        sent = True
                        yield delta
                return
            except UnfitForPair:
                raise
            except InvalidRequest:
                if sent:
                    raise
                is_second = True
                result.choices, result.tool_calls = [], []
        runs = self._executor.run(pair, call, budget, result, stream=stream)
        async with aclosing(runs) as deltas:
            async for delta in deltas:
                yield delta
        if is_second:
            self._no_logprobs.add(pair.model_id)


def _part(deadline: Deadline, share: float) -> Deadline:
    """The deadline after a share of the time left."""
    left_s = max(deadline.at_s - time.monotonic(), 0.0)
    return deadline if share >= 1 else deadline.sooner(left_s * share)


def _without_router(steps: list[Step], last: Decision) -> Decision:
    """What comes next where nobody says so: the answer there is, or the next-best pair."""
    tried = {step.pair for step in steps if step.action is Action.ROUTE}
    left = tuple(candidate for candidate in last.candidates if candidate.pair not in tried)
    action = Action.ANSWER if has_answer(steps) or not left else Action.ROUTE
    return replace(last, action=action, candidates=left, path=Path.FALLBACK, propensity=1.0)


def _worth_telling(failures: list[AtlasError]) -> AtlasError:
    """Of the failures of all candidates the one that the caller can act on."""
    if all(isinstance(failure, BudgetExceeded) for failure in failures):
        return min(failures, key=lambda failure: getattr(failure, "needed", 0.0))
    return failures[-1]


def why_it_ended(deadline: Deadline) -> str:
    """Why a request ended without an answer or an error of its own, for the log."""
    return "the deadline passed" if deadline.is_over() else "the caller went away"
