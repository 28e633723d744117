"""The pattern `single`: the candidates of a decision in their order until one answers."""

from __future__ import annotations

import logging

from serve_app.errors import AtlasError, BudgetExceeded, NoCandidate
from serve_app.orchestrator.answer import Answer
from serve_app.orchestrator.engine import Engine, StepPlan
from serve_app.orchestrator.recovery import FIRST_TRY_SHARE, Move
from serve_app.orchestrator.run import Run
from serve_app.schemas import DecidedBy

logger = logging.getLogger(__name__)


class Single:
    """Runs one pair, and the next-best one where the table of recovery says so."""

    def __init__(self, engine: Engine) -> None:
        """Run steps on this engine."""
        self._engine = engine

    async def run(self, run: Run) -> Answer:
        """Try the candidates in order.

        Raises:
            BudgetExceeded: If the budget covers none of them; names the least that one needs.
            AtlasError: What the last one tried failed with.
        """
        decision = run.decision
        assert decision is not None
        failures: list[AtlasError] = []
        left, most = list(decision.candidates), run.call.limits.max_steps
        models = self._engine.pairs.parts.models
        for rank in range(min(most, len(left))):
            candidate = left.pop(0)
            has_next = rank < most - 1 and bool(left)
            plan = StepPlan(
                pair=candidate.pair,
                path=DecidedBy.FALLBACK if rank else decision.path,
                propensity=1.0 if rank else decision.propensity,
                policy_version=decision.policy_version,
                call=run.call,
                budget=run.budget.part(FIRST_TRY_SHARE) if has_next else run.budget,
                has_next=has_next,
                streams=True,
            )
            try:
                return await self._engine.step(run, plan)
            except AtlasError as failure:
                failures.append(failure)
                left = [of for of in left if models.worth_trying(of.pair, candidate.pair, failure)]
                if run.move(failure, another=has_next and bool(left)) is not Move.ANOTHER:
                    told = _worth_telling(failures)
                    if told is failure:
                        raise
                    raise told from failure
                logger.warning(
                    "request %s: %s failed (%s); falling back",
                    run.call.request_id,
                    candidate.pair,
                    failure.message,
                )
        raise NoCandidate("no pair is left within the request's limits")


def _worth_telling(failures: list[AtlasError]) -> AtlasError:
    """Of the failures of all candidates the one that the caller can act on."""
    exceeded = [failure for failure in failures if isinstance(failure, BudgetExceeded)]
    if len(exceeded) == len(failures):
        return min(exceeded, key=lambda failure: failure.needed)
    return failures[-1]
