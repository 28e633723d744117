"""Episodes on the running pool: the same interface as a replayed profile, with real runs behind it.

In come the rows of a table and the pairs to run, out come scored answers. All runs of a step are
under way at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rl.ppo.backend import StepBatch, ThoughtBatch
from rl.ppo.config import LiveConfig
from rl.ppo.spend import LEDGER_FILE, Ledger
from rl.ppo.table import ReplayTable
from rl.profile.measure import (
    Run,
    RunSettings,
    ask_planner,
    at_gateway,
    gateway_handle,
    measure_pair,
)
from serve_app.config import AtlasConfig
from serve_app.embedder import TextEncoder
from serve_app.errors import AtlasError, ConfigError, TrainingStopped
from serve_app.questions import Question
from serve_app.router.policy.features import NO_ANSWER
from serve_app.router.rules.cold_start import pair_cards
from serve_app.schemas import NO_TOOL, ChatCall, Pair, PoolState, Report
from serve_app.signals import stacked
from serve_app.store import ProfileOutcome
from serve_app.tools.builtin.best_of import answer_key

logger = logging.getLogger(__name__)

Float = NDArray[np.float32]
Bool = NDArray[np.bool_]
Index = NDArray[np.intp]
Encode = Callable[[Sequence[str]], Float]
"""texts -> (num_texts, dim) L2-normalised."""


_POOL_TIMEOUT_S = 60.0


class Pool(Protocol):
    """What a live training drives."""

    async def ready_pairs(self) -> tuple[Pair, ...]:
        """Pairs that answer now.

        Raises:
            ConfigError: If no graph runs.
        """

    async def run(self, call: ChatCall) -> tuple[Report, AtlasError | None]:
        """Run a pinned request: a `rl.profile.measure.Run`."""


class ServedPool:
    """The pool of the graph that runs on this process's cluster."""

    def __init__(self) -> None:
        self._gateway: Any = None

    async def ready_pairs(self) -> tuple[Pair, ...]:
        """See `Pool.ready_pairs`."""
        # Not above: rollouts on another pool need nothing of the graph.
        from ray.serve.exceptions import RayServeException

        from serve_app.pool.controller import PoolController
        from serve_app.running import deployment_handle

        try:
            response = deployment_handle(PoolController.__name__).state.remote()
            state: PoolState = await asyncio.to_thread(response.result, timeout_s=_POOL_TIMEOUT_S)
        except (RayServeException, TimeoutError):
            raise ConfigError(
                "live training drives the pool, and no graph answers on this cluster: is "
                "`atlas serve` running?"
            ) from None
        return state.ready_candidates()

    async def run(self, call: ChatCall) -> tuple[Report, AtlasError | None]:
        """See `Pool.run`."""
        if self._gateway is None:
            self._gateway = gateway_handle()
        return await at_gateway(call, self._gateway)


@dataclass
class _Episode:
    """What was said in one episode."""

    note: str | None = None
    answers: list[str] = field(default_factory=list)
    keys: dict[str, int] = field(default_factory=dict)
    """Of the answers, numbered as they came."""


async def ready_pairs(
    settings: LiveConfig, questions: Sequence[Question], pool: Pool
) -> tuple[Pair, ...]:
    """The pairs that a live training may run; sees that it can be had at all.

    Args:
        settings: Of the training.
        questions: What it is to ask.
        pool: What it drives.

    Raises:
        ConfigError: If there is no question, no judge where one is needed, no graph, or no pair
            that answers.
    """
    if not questions:
        raise ConfigError("live training needs the labelled questions: name `questions`")
    judged = any(question.metric.name == "judge" for question in questions)
    if judged and settings.judge is None:
        raise ConfigError("some questions have the metric 'judge': name live.judge")
    ready = await pool.ready_pairs()
    if settings.judge is not None and Pair.parse(settings.judge) not in ready:
        raise ConfigError(f"the judge {settings.judge} is not among the pool's ready pairs")
    if not ready:
        raise ConfigError("none of the pool's models is ready")
    return ready


def live_backend(
    config: AtlasConfig,
    table: ReplayTable,
    questions: Sequence[Question],
    settings: LiveConfig,
    ready: Sequence[Pair],
    pool: Pool,
    folder: Path,
) -> tuple[LiveBackend, Ledger]:
    """The running pool as episodes see it, and the ledger between the two.

    Args:
        config: The deployment; its planner thinks, where it answers.
        table: The questions to train on.
        questions: What is right, of these and maybe others.
        settings: Caps, and how pairs are run.
        ready: Pairs that answer now.
        pool: What runs them.
        folder: The run's; gets the ledger.

    Raises:
        ConfigError: If none of the table's queries is among the questions.
    """
    # The dearest profiled run of each pair; of one that was not profiled, as the planner, a typical
    # one by its price.
    dearest_usd = {str(card.pair): card.cost_usd for card in pair_cards(config)}
    profiled_usd = np.where(table.measured, table.costs_usd, 0.0).max(axis=(0, 1))
    dearest_usd |= zip(map(str, table.pairs), profiled_usd.tolist(), strict=True)
    ledger = Ledger(
        folder / LEDGER_FILE,
        pool.run,
        max_cost_usd=settings.max_cost_usd,
        max_seconds=settings.max_seconds,
        expected_usd=dearest_usd,
    )
    planner = Pair(config.router.planner, NO_TOOL) if config.router.planner else None
    backend = LiveBackend(
        table,
        questions,
        TextEncoder(config.embedder, config.data_path() / "cache").encode,
        ready=ready,
        planner=planner if planner in ready else None,
        settings=RunSettings(
            None if settings.judge is None else Pair.parse(settings.judge),
            settings.deadline_s,
            owner="rollout",
        ),
        concurrency=settings.concurrency,
        run=ledger,
    )
    return backend, ledger


class LiveBackend:
    """Drives the pool through the gateway of this process's cluster.

    Invariants:
        - A run that could not be had is a step without an answer: it costs a step, and no dollars.
        - A run that `TrainingStopped` refuses ends the rollout, after those that are under way.
        - Nothing is written to the store: a rollout is neither a profile nor traffic.
    """

    def __init__(
        self,
        table: ReplayTable,
        questions: Iterable[Question],
        encode: Encode,
        *,
        ready: Sequence[Pair] | None = None,
        planner: Pair | None = None,
        settings: RunSettings | None = None,
        concurrency: int = 16,
        run: Run = at_gateway,
    ) -> None:
        """Find the table's queries among the questions.

        Args:
            table: The queries, the pairs and path 1's beliefs. Its outcomes only say which pairs
                are the best for a query.
            questions: What is asked, and what is right; found by their text.
            encode: Embeds answers, as the table's embeddings were made.
            ready: Pairs that answer now; `None` takes all of the table.
            planner: Who thinks; `None` leaves thinking out.
            settings: How pairs are run.
            concurrency: Runs under way at once.
            run: What runs them.

        Raises:
            ConfigError: If none of the table's queries is among the questions.
        """
        by_query = {question.query: question for question in questions}
        self._questions = [by_query.get(query) for query in table.queries]
        known = np.array([question is not None for question in self._questions], np.bool_)
        if not known.any():
            raise ConfigError("none of the table's queries is among the questions: same file?")
        there = np.array([ready is None or pair in ready for pair in table.pairs], np.bool_)
        self._table = table
        self._can_run: Bool = known[:, None] & there
        self._can_think: Bool = known & (planner is not None)
        self._encode = encode
        self._planner = planner
        self._settings = settings or RunSettings(owner="rollout")
        self._concurrency = concurrency
        self._run = run
        self._episodes: dict[int, _Episode] = {}
        self._vectors: dict[str, Float] = {}
        """Of the answers so far: the same ones come again and again."""

    @property
    def table(self) -> ReplayTable:
        """The queries, the pairs and what is believed of them."""
        return self._table

    @property
    def can_run(self) -> Bool:
        """(N, P) ready pairs on known questions."""
        return self._can_run

    @property
    def can_think(self) -> Bool:
        """(N,) known questions, if there is a planner."""
        return self._can_think

    def start(self, rows: Index, queries: Index) -> None:
        """Forget what was said in these rows."""
        for row in rows.tolist():
            self._episodes[row] = _Episode()

    def run(self, rows: Index, queries: Index, pairs: Index, thought: Bool) -> StepBatch:
        """Run the pairs, and wait for the last."""
        outcomes = self._together(
            self._measure(row, query, pair)
            for row, query, pair in zip(
                rows.tolist(), queries.tolist(), pairs.tolist(), strict=True
            )
        )
        vectors = np.zeros((len(rows), self._table.embeddings.shape[1]), np.float32)
        keys = np.full(len(rows), NO_ANSWER, np.intp)
        answered = []
        for place, (row, outcome) in enumerate(zip(rows.tolist(), outcomes, strict=True)):
            key = None if outcome is None else answer_key(outcome.answer)
            if outcome is None or outcome.answer is None or key is None:
                continue
            episode = self._episodes[row]
            keys[place] = episode.keys.setdefault(key, len(episode.keys))
            episode.answers.append(outcome.answer)
            answered.append((place, outcome.answer))
        new = list({text: None for _, text in answered if text not in self._vectors})
        if new:
            self._vectors.update(zip(new, self._encode(new), strict=True))
        for place, text in answered:
            vectors[place] = self._vectors[text]

        def column(name: str, missing: float) -> Float:
            values = [None if outcome is None else getattr(outcome, name) for outcome in outcomes]
            return np.array([missing if v is None else v for v in values], np.float32)

        return StepBatch(
            score=column("score", 0.0),
            cost_usd=column("cost_usd", 0.0),
            seconds=column("seconds", 0.0),
            logprob=column("mean_logprob", np.nan),
            tool_errors=column("tool_errors", 0.0),
            answer_key=keys,
            answer_embedding=vectors,
            signals=stacked(
                [
                    () if of is None or of.signals is None else of.signals.numbers()
                    for of in outcomes
                ]
            ),
        )

    def think(self, rows: Index, queries: Index) -> ThoughtBatch:
        """Ask the planner about the questions and the answers so far, and wait for the last."""
        thoughts = self._together(
            self._plan(row, query)
            for row, query in zip(rows.tolist(), queries.tolist(), strict=True)
        )
        spent = np.array(
            [(0.0, 0.0) if thought is None else thought for thought in thoughts], np.float32
        )
        return ThoughtBatch(spent[:, 0], spent[:, 1])

    async def _measure(self, row: int, query: int, pair: int) -> ProfileOutcome | None:
        question = self._questions[query]
        assert question is not None, "an episode on a query that cannot be run"
        note = self._episodes[row].note
        return await measure_pair(
            question, self._table.pairs[pair], "", self._settings, note=note, run=self._run
        )

    async def _plan(self, row: int, query: int) -> tuple[float, float]:
        """Keep what the planner says; its dollars and seconds."""
        assert self._planner is not None
        episode = self._episodes[row]
        report, failure = await ask_planner(
            self._table.queries[query],
            episode.answers,
            self._planner,
            self._settings,
            run=self._run,
        )
        if failure is None and report.steps:
            episode.note = report.steps[-1].answer or None
        return report.usage.cost_usd, report.seconds

    def _together(self, runs: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
        """The results of some runs, in their order; `None` for one that could not be had.

        Raises:
            TrainingStopped: If one was not allowed; those under way have come to their end.
        """

        async def all_of_them() -> list[Any]:
            # A thread of its own for each wait on the gateway.
            asyncio.get_running_loop().set_default_executor(
                ThreadPoolExecutor(self._concurrency, thread_name_prefix="live")
            )
            gate = asyncio.Semaphore(self._concurrency)
            return await asyncio.gather(*(_one(run, gate) for run in runs), return_exceptions=True)

        results = asyncio.run(all_of_them())
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results


async def _one(run: Awaitable[Any], gate: asyncio.Semaphore) -> Any:
    async with gate:
        try:
            return await run
        except TrainingStopped:
            raise
        except (AtlasError, TimeoutError):
            logger.warning("a run of the rollout could not be had", exc_info=True)
            return None
