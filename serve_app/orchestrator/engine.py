"""What patterns run on: one step of a run, done within its budget and put on record."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.budget import Budget, Deadline
from serve_app.errors import AtlasError, ServiceError
from serve_app.models.reply import Choice, ChoicePiece
from serve_app.orchestrator.answer import Answer, mean_logprob_of, text_of
from serve_app.orchestrator.decision_client import Decider
from serve_app.orchestrator.evidence import signals_of
from serve_app.orchestrator.pairs.base import PairWork
from serve_app.orchestrator.pairs.runner import PairRunner
from serve_app.orchestrator.patterns.declared import Composed, PatternRunner
from serve_app.orchestrator.recovery import fault_of
from serve_app.orchestrator.run import Piece, Run
from serve_app.orchestrator.trace import SpanKind
from serve_app.schemas import Action, ChatCall, DecidedBy, Pair, Step

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepPlan:
    """A step that is to be run."""

    pair: Pair
    path: DecidedBy
    propensity: float
    policy_version: int
    call: ChatCall
    budget: Budget
    action: Action = Action.ROUTE
    wants_logprobs: bool = False
    """Whether to have the engine's log-probabilities, where it gives them."""
    has_next: bool = False
    """Whether another pair takes over if this one fails."""
    streams: bool = False
    """Whether its pieces go to the caller as they come."""


@dataclass(frozen=True)
class Engine:
    """The pool, the router and the planner; one per gateway replica."""

    pairs: PairRunner
    patterns: PatternRunner
    decider: Decider
    planner: str | None
    """Model that thinks."""

    async def step(self, run: Run, plan: StepPlan) -> Answer:
        """Run a candidate (a pair, or a declared pattern), or the planner.

        Raises:
            AtlasError: If it gives no answer.
        """
        kind = SpanKind.PAIR if plan.action is Action.ROUTE else SpanKind.THOUGHT
        span = run.trace.root.child(kind, str(plan.pair))

        async def emit(choices: Sequence[ChoicePiece]) -> None:
            await run.send(Piece(plan.pair, plan.path, choices))

        work = PairWork(
            pair=plan.pair,
            call=plan.call,
            budget=plan.budget,
            span=span,
            emit=emit if plan.streams and run.channel is not None else None,
            recovery=run.recovery,
            has_next=plan.has_next,
            wants_logprobs=plan.wants_logprobs,
            embedding=run.embedding,
        )
        choices: list[Choice] = []
        error: str | None = None
        try:
            if plan.pair.is_pattern:
                composed = await self.patterns.run(work)
            else:
                composed = Composed(await self.pairs.run(work))
            choices = composed.choices
        except AtlasError as failure:
            error = failure.message
            span.attributes["fault"] = fault_of(failure).value
            raise
        except Exception as failure:
            # A fault of ours, in what one pair does; another pair may well answer.
            logger.exception("request %s: %s failed", run.call.request_id, plan.pair)
            error = "an unforeseen error"
            raise ServiceError(f"the pair {plan.pair} failed") from failure
        except BaseException:
            error = why_it_ended(run.budget.deadline)
            raise
        finally:
            span.end(error)
            span.step = Step(
                pair=plan.pair,
                path=plan.path,
                propensity=plan.propensity,
                usage=span.usage,
                seconds=span.seconds or 0.0,
                tool_calls=span.tool_calls(),
                error=error,
                mean_logprob=mean_logprob_of(choices),
                answer=text_of(choices),
                action=plan.action,
                policy_version=plan.policy_version,
                signals=signals_of(
                    span,
                    choices,
                    plan.call.query,
                    offered=self.pairs.kind(plan.pair.tool_id) == "function",
                ),
            )
        number = next(n for n, step in enumerate(run.steps) if step is span.step)
        return Answer(
            choices,
            plan.pair,
            plan.path,
            number,
            composed.stop,
            composed.is_partial,
            composed.sources,
        )


def why_it_ended(deadline: Deadline) -> str:
    """Why a request ended without an answer or an error of its own, for the log."""
    return "the deadline passed" if deadline.is_over() else "the caller went away"
