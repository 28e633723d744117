"""The pattern `policy`: what the learned policy says, step after step, until it is content."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from serve_app.errors import AtlasError, KeyRequired, NoCandidate
from serve_app.orchestrator.answer import Answer
from serve_app.orchestrator.decision_client import UnderWay, facts_of
from serve_app.orchestrator.engine import Engine, StepPlan
from serve_app.orchestrator.history import answer_numbers, best_step, has_answer, seen
from serve_app.orchestrator.planning import PLANNER_SAMPLING, planner_messages
from serve_app.orchestrator.recovery import FIRST_TRY_SHARE, Move
from serve_app.orchestrator.run import Course, Piece, Run
from serve_app.orchestrator.trace import SpanKind
from serve_app.router.policy.features import MAX_STEPS
from serve_app.schemas import NO_TOOL, Action, DecidedBy, Decision, Pair, Step, StopReason

logger = logging.getLogger(__name__)

_LAST_TRY_SHARE = 0.9
"""Share of the time left for the last step, where an answer could be returned instead."""
_ASK_AGAIN_S = 5.0
"""How long the router may take to say what comes next; with half the time left as a bound too."""


class PolicyLoop:
    """Does what the policy says, then gives the best answer unchanged.

    An answer is held back, because it may not be the one: all but that of a last step without an
    earlier one.
    """

    def __init__(self, engine: Engine) -> None:
        """Run steps on this engine."""
        self._engine = engine

    async def run(self, run: Run) -> Answer:
        """Route, think and look until the policy is content, or a limit ends it.

        Raises:
            AtlasError: What the last step failed with, where none gave an answer.
        """
        decision, course = run.decision, run.course
        assert decision is not None
        assert course is not None  # the policy decided
        failure: AtlasError = NoCandidate("no pair is left within the request's limits")
        max_steps = min(run.call.limits.max_steps, MAX_STEPS)
        answers: dict[int, Answer] = {}
        last_embedding: NDArray[np.float32] | None = None
        stop = StopReason.ANSWERED
        while decision.action is not Action.ANSWER:
            if run.budget.deadline.is_over():
                stop = StopReason.DEADLINE
                break
            is_last = len(run.steps) + 1 >= max_steps
            plan = self._plan(run, decision, is_last=is_last)
            try:
                answer = await self._engine.step(run, plan)
                answers[answer.step] = answer
                if run.is_sent:
                    return answer
            except AtlasError as error:
                failure = error
                if run.is_sent or isinstance(error, KeyRequired):
                    raise
                logger.warning(
                    "request %s: %s failed (%s)", run.call.request_id, plan.pair, error.message
                )
                can_go_on = run.move(error, another=True) is Move.ANOTHER
                if plan.action is Action.ROUTE and not can_go_on:
                    stop = StopReason.FAILED
                    break
            if is_last or run.recovery.is_deadly:
                stop = StopReason.STEPS if is_last else StopReason.FAILED
                if is_last and len(set(answer_numbers(run.steps)) - {None}) > 1:
                    decision = (await self._decide_next(run, course, decision, last_embedding))[1]
                break
            last_embedding, decision = await self._decide_next(
                run, course, decision, last_embedding
            )
        best = decision.answer_step if decision.action is Action.ANSWER else None
        if best not in answers:
            best = best_step(run.steps)
        if best is None:
            raise failure
        answer = answers[best]
        if not answer.is_partial and answer.stop is StopReason.ANSWERED:
            answer = replace(answer, stop=stop)
        pieces = [choice.as_piece() for choice in answer.choices]
        await run.send(Piece(answer.pair, answer.path, pieces))
        return answer

    def _plan(self, run: Run, decision: Decision, *, is_last: bool) -> StepPlan:
        """The step that a decision of the policy asks for."""
        steps, call = run.steps, run.call
        answered = has_answer(steps)
        is_route = decision.action is Action.ROUTE
        if is_route:
            notes = [s.answer for s in steps if s.action is Action.THINK and s.answer]
            call = replace(call, note="\n\n".join(notes) or None)
            pair = decision.pair
        else:
            pair = Pair(self._engine.planner or "", NO_TOOL)
            said = [s.answer for s in steps if s.action is Action.ROUTE and s.answer]
            call = replace(
                call, messages=planner_messages(call.query, said), sampling=PLANNER_SAMPLING
            )
        share = FIRST_TRY_SHARE if not is_last else _LAST_TRY_SHARE if answered else 1.0
        return StepPlan(
            pair=pair,
            path=decision.path,
            propensity=decision.propensity,
            policy_version=decision.policy_version,
            call=call,
            budget=run.budget.part(share),
            action=decision.action,
            wants_logprobs=is_route,
            has_next=not is_last or answered,
            streams=is_last and not answered,
        )

    async def _decide_next(
        self,
        run: Run,
        course: Course,
        last: Decision,
        last_embedding: NDArray[np.float32] | None,
    ) -> tuple[NDArray[np.float32] | None, Decision]:
        """What the policy wants next; without it, the best answer so far or the next-best pair.

        Args:
            run: The request.
            course: Its decisions so far.
            last: The last of them.
            last_embedding: (dim,) of the last answer; `None`: there is none, or it is not known.

        Returns:
            The (dim,) embedding of the last answer as it is known now, and the decision.
        """
        steps = run.steps
        if course.recorded is not None:
            done = replace(last, action=Action.ANSWER)
            return None, course.recorded.pop(0) if course.recorded else done
        answer = None
        if steps[-1].action is Action.ROUTE:  # a thought leaves the last answer what it was
            answer = steps[-1].answer if steps[-1].error is None else None
            last_embedding = None
        under_way = UnderWay(
            embedding=course.embedding,
            policy_version=course.decisions[0].policy_version,
            history=tuple(seen(step) for step in steps),
            answer=answer or None,
            answer_embedding=last_embedding,
            fixed=run.call.fixed,
            answers=tuple(course.answer_embeddings.get(number) for number in range(len(steps))),
        )
        seconds_left = 0.0
        try:
            seconds_left = run.budget.deadline.remaining_s()
            limits = replace(course.limits, deadline_s=seconds_left)
            patience = run.budget.part(0.5).deadline.sooner(_ASK_AGAIN_S)
            with run.trace.root.child(SpanKind.DECISION, "router") as span:
                last_embedding, decision = await self._engine.decider.decide_next(
                    under_way, limits, patience, span.attributes
                )
                span.attributes |= facts_of(decision)
            if answer and last_embedding is not None:
                course.answer_embeddings[len(steps) - 1] = last_embedding
        except AtlasError as error:
            logger.warning(
                "request %s goes on without the router (%s)", run.call.request_id, error.message
            )
            decision = _without_router(steps, last)
        course.decisions.append(decision)
        course.seconds_left.append(seconds_left)
        return last_embedding, decision


def _without_router(steps: list[Step], last: Decision) -> Decision:
    """What comes next without the router: the answer so far, or the next-best pair."""
    tried = {step.pair for step in steps if step.action is Action.ROUTE}
    left = tuple(candidate for candidate in last.candidates if candidate.pair not in tried)
    action = Action.ANSWER if has_answer(steps) or not left else Action.ROUTE
    return replace(last, action=action, candidates=left, path=DecidedBy.FALLBACK, propensity=1.0)
