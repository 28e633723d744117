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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl.backend import StepBatch, ThoughtBatch
from rl.measuring import Run, RunSettings, ask_pair, at_gateway, measure_pair
from rl.table import ReplayTable
from serve_app.errors import AtlasError, ConfigError
from serve_app.orchestrator.planning import planner_messages
from serve_app.questions import Question
from serve_app.router.features import NO_ANSWER
from serve_app.schemas import Pair
from serve_app.store import ProfileOutcome
from serve_app.tools.best_of import answer_key

logger = logging.getLogger(__name__)

Float = NDArray[np.float32]
Bool = NDArray[np.bool_]
Index = NDArray[np.intp]
Encode = Callable[[Sequence[str]], Float]
"""texts -> (num_texts, dim) L2-normalised."""


@dataclass
class _Episode:
    """What was said in one episode."""

    note: str | None = None
    answers: list[str] = field(default_factory=list)
    keys: dict[str, int] = field(default_factory=dict)
    """Of the answers, numbered as they came."""


class LiveBackend:
    """Drives the pool through the gateway of this process's cluster.

    Invariants:
        - A run that could not be had is a step without an answer: it costs a step, and no dollars.
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
        if answered:
            places, texts = zip(*answered, strict=True)
            vectors[list(places)] = self._encode(texts)

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
        messages = planner_messages(self._table.queries[query], episode.answers)
        report, failure = await ask_pair(messages, self._planner, self._settings, run=self._run)
        if failure is None and report.steps:
            episode.note = report.steps[-1].answer or None
        return report.usage.cost_usd, report.seconds

    def _together(self, runs: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
        """The results of some runs, in their order; `None` for one that could not be had."""

        async def all_of_them() -> list[Any]:
            # A thread of its own for each wait on the gateway.
            asyncio.get_running_loop().set_default_executor(
                ThreadPoolExecutor(self._concurrency, thread_name_prefix="live")
            )
            gate = asyncio.Semaphore(self._concurrency)
            return await asyncio.gather(*(_one(run, gate) for run in runs))

        return asyncio.run(all_of_them())


async def _one(run: Awaitable[Any], gate: asyncio.Semaphore) -> Any:
    async with gate:
        try:
            return await run
        except (AtlasError, TimeoutError):
            logger.warning("a run of the rollout could not be had", exc_info=True)
            return None
