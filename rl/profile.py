"""`profile`: every pair of the running pool on every labelled question, as Ray tasks.

In go questions and a pool, out come rows in the store: score, tokens, seconds, dollars and the
signals a policy may see without the gold. What is in the store already is not run again, so a
profile that was killed goes on where it was, and a new model costs only its own pairs.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
import uuid
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import ray

from rl.measuring import RunSettings, measure_pair
from serve_app.config import AtlasConfig
from serve_app.embedder import Embedder
from serve_app.errors import ConfigError
from serve_app.models.controller import PoolController
from serve_app.questions import Question
from serve_app.router.cold_start import pair_cards
from serve_app.running import deployment_handle
from serve_app.schemas import Pair, PoolState
from serve_app.store import (
    ProfileOutcome,
    ProfileQuestion,
    Store,
    add_outcomes,
    add_questions,
    measured,
)

logger = logging.getLogger(__name__)

_EMBED_BATCH = 64
_PASSES = 2
"""Times that what failed for the engine's sake is tried."""
_POOL_TIMEOUT_S = 60.0

_MODEL_FIELDS = {
    "type",
    "model_source",
    "engine_kwargs",
    "base_url",
    "remote_model",
    "import_path",
    "settings",
    "max_completion_tokens",
}
"""Settings of a model that its answers depend on."""
_TOOL_EXTRAS = {"description", "examples", "price_usd_per_call"}
"""Settings of a tool that its results do not depend on."""


@dataclass(frozen=True)
class ProfileSettings:
    """How a profile is taken."""

    models: frozenset[str] | None = None
    """Models whose pairs are measured; `None` takes all that are ready."""
    judge: Pair | None = None
    """Judges answers to questions of the metric `judge`."""
    sample: float = 1.0
    """Share in (0, 1] of the pairs that each question is given to; drawn anew per question."""
    max_cost_usd: float | None = None
    """No run is started that is expected to exceed this."""
    concurrency: int = 4
    """Questions under way at once; each runs its pairs side by side."""
    deadline_s: float = 120.0
    """Of one run."""
    temperature: float = 0.0
    again: bool = False
    """Run also what is measured already; the newest outcome counts."""
    num_cpus: float = 0.05
    """CPUs that Ray reserves for each task; the work is the engines'."""

    @property
    def runs(self) -> RunSettings:
        """How each pair is run."""
        return RunSettings(self.judge, self.deadline_s, self.temperature)


@dataclass
class Progress:
    """How far a profile is."""

    total: int
    """Runs that were missing at the start."""
    done: int = 0
    failed: int = 0
    """Runs that gave no outcome, because the engine was away; they are missing still."""
    skipped: int = 0
    """Runs measured earlier."""
    cost_usd: float = 0.0
    judged: int = 0
    judge_agreed: int = 0
    """Of `judged`: the judge said the same in both orders."""
    stopped: str | None = None
    """Why it ended early."""

    def to_json(self) -> dict[str, Any]:
        """For the job's row."""
        return dict(vars(self))


@dataclass(frozen=True)
class _Task:
    """A question and the pairs that it is missing."""

    question: Question
    pairs: tuple[Pair, ...]


@dataclass
class _Costs:
    """What a run of a pair is expected to cost: the mean so far, or its card's price."""

    listed_usd: dict[Pair, float]
    sums: dict[Pair, float] = field(default_factory=lambda: defaultdict(float))
    counts: dict[Pair, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, outcome: ProfileOutcome) -> None:
        self.sums[outcome.pair] += outcome.cost_usd
        self.counts[outcome.pair] += 1

    def expected(self, task: _Task) -> float:
        return sum(
            self.sums[pair] / self.counts[pair] if self.counts[pair] else self.listed_usd[pair]
            for pair in task.pairs
        )


def fingerprint(config: AtlasConfig, pair: Pair) -> str:
    """Hash of everything configured that a pair's answers depend on."""
    model = config.model(pair.model_id).model_dump(mode="json", include=_MODEL_FIELDS)
    tool = next((tool for tool in config.tools if tool.tool_id == pair.tool_id), None)
    settings = [model, tool and tool.model_dump(mode="json", exclude=_TOOL_EXTRAS)]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


async def profile(
    config: AtlasConfig,
    questions: Sequence[Question],
    store: Store,
    settings: ProfileSettings | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Measure what is missing. Ray must be initialised in this process, and the graph running.

    Args:
        config: The deployment that runs.
        questions: What to ask.
        store: Where outcomes go, question by question.
        settings: How.
        on_progress: Called after each question.

    Raises:
        ConfigError: If the pool is not ready, or a question needs a judge and there is none.
        StoreError: If the store is away.
    """
    settings = settings or ProfileSettings()
    needs_judge = any(question.metric.name == "judge" for question in questions)
    if needs_judge and settings.judge is None:
        raise ConfigError("some questions have the metric 'judge': name a judge")
    pairs = (await _pool()).ready_pairs()
    if settings.judge is not None and settings.judge not in pairs:
        raise ConfigError(f"the judge {settings.judge} is not among the pool's ready pairs")
    if settings.models is not None:
        pairs = tuple(pair for pair in pairs if pair.model_id in settings.models)
    if not pairs:
        raise ConfigError("none of the models is ready")
    questions = list({question.key: question for question in questions}.values())
    await _keep_questions(config, questions, store)
    marks = {pair: fingerprint(config, pair) for pair in pairs}
    run_id = uuid.uuid4().hex[:8] if settings.again else ""
    if run_id:
        marks = {pair: f"{mark}-{run_id}" for pair, mark in marks.items()}
    wanted = [_Task(question, _sampled(question, pairs, settings.sample)) for question in questions]
    progress = Progress(total=0)
    costs = _Costs({card.pair: card.cost_usd for card in pair_cards(config)})
    for number in range(_PASSES):
        done = await measured(store, [question.key for question in questions])
        missing = [_without(task, marks, done) for task in wanted]
        missing = [task for task in missing if task.pairs]
        num_missing = sum(len(task.pairs) for task in missing)
        if number == 0:
            progress.total = num_missing
            progress.skipped = sum(len(task.pairs) for task in wanted) - num_missing
            on_progress(progress)
        progress.failed = 0
        await _run(missing, marks, store, settings, progress, costs, on_progress)
        if not progress.failed or progress.stopped:
            break
    return progress


async def _run(
    tasks: Sequence[_Task],
    marks: dict[Pair, str],
    store: Store,
    settings: ProfileSettings,
    progress: Progress,
    costs: _Costs,
    on_progress: Callable[[Progress], None],
) -> None:
    """One pass over what is missing."""
    run = ray.remote(num_cpus=settings.num_cpus, max_retries=2)(_measure)
    under_way: dict[asyncio.Future[Any], _Task] = {}
    waiting = list(reversed(tasks))
    refs = {}
    try:
        while waiting or under_way:
            while waiting and len(under_way) < settings.concurrency and not progress.stopped:
                expected = sum(map(costs.expected, (*under_way.values(), waiting[-1])))
                most = settings.max_cost_usd
                if most is not None and progress.cost_usd + expected > most:
                    progress.stopped = f"the next question could exceed {most:g} USD"
                    break
                task = waiting.pop()
                ref = run.remote(task.question, task.pairs, marks, settings)
                future = asyncio.wrap_future(ref.future())
                under_way[future], refs[future] = task, ref
            if not under_way:
                return
            finished, _ = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
            for future in finished:
                task = under_way.pop(future)
                del refs[future]
                outcomes = _result(future, task)
                if outcomes:
                    await add_outcomes(store, outcomes)
                _count(outcomes, task, progress, costs)
                on_progress(progress)
    finally:
        for ref in refs.values():
            ray.cancel(ref)


def _result(future: asyncio.Future[Any], task: _Task) -> list[ProfileOutcome]:
    try:
        outcomes: list[ProfileOutcome] = future.result()
    except ray.exceptions.RayError as error:
        logger.warning("question %s: its task failed: %s", task.question.id, error)
        return []
    return outcomes


def _count(
    outcomes: Sequence[ProfileOutcome], task: _Task, progress: Progress, costs: _Costs
) -> None:
    progress.done += len(outcomes)
    progress.failed += len(task.pairs) - len(outcomes)
    for outcome in outcomes:
        progress.cost_usd += outcome.cost_usd
        costs.add(outcome)
        if outcome.judge_agreed is not None:
            progress.judged += 1
            progress.judge_agreed += outcome.judge_agreed


def _sampled(question: Question, pairs: tuple[Pair, ...], share: float) -> tuple[Pair, ...]:
    """The pairs a question is given to; the same at every call."""
    if share >= 1:
        return pairs
    number = max(1, round(share * len(pairs)))
    drawn = set(random.Random(question.key).sample(pairs, number))
    return tuple(pair for pair in pairs if pair in drawn)


def _without(task: _Task, marks: dict[Pair, str], done: set[tuple[str, Pair, str]]) -> _Task:
    key = task.question.key
    left = tuple(pair for pair in task.pairs if (key, pair, marks[pair]) not in done)
    return replace(task, pairs=left)


async def _pool() -> PoolState:
    response = deployment_handle(PoolController.__name__).state.remote()
    pool: PoolState = await asyncio.to_thread(response.result, timeout_s=_POOL_TIMEOUT_S)
    return pool


async def _keep_questions(config: AtlasConfig, questions: Sequence[Question], store: Store) -> None:
    """Embed the questions and put them into the store."""
    embedder = deployment_handle(Embedder.__name__)
    for start in range(0, len(questions), _EMBED_BATCH):
        batch = questions[start : start + _EMBED_BATCH]
        response = embedder.embed.remote([question.query for question in batch])
        vectors = await asyncio.to_thread(response.result, timeout_s=_POOL_TIMEOUT_S)
        await add_questions(
            store,
            [
                ProfileQuestion(
                    question_key=question.key,
                    query=question.query,
                    domain=question.domain,
                    split=question.effective_split,
                    encoder=config.embedder.model,
                    embedding=np.asarray(vector, "<f4").tobytes(),
                )
                for question, vector in zip(batch, vectors, strict=True)
            ],
        )


# In the Ray task.


def _measure(
    question: Question, pairs: Sequence[Pair], marks: dict[Pair, str], settings: ProfileSettings
) -> list[ProfileOutcome]:
    """Run a question on some pairs and score the answers; what could not run is left out."""

    async def together() -> list[ProfileOutcome | None]:
        return await asyncio.gather(
            *(measure_pair(question, pair, marks[pair], settings.runs) for pair in pairs)
        )

    return [outcome for outcome in asyncio.run(together()) if outcome is not None]
