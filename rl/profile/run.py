"""`profile`: every pair of the running pool on every labelled question, as Ray tasks.

In go questions and a pool, out come rows in the store: score, tokens, seconds, dollars and the
signals a policy may see without the gold. Where there is a planner, it thinks once about every
question, and every pair runs a second time with the thought in its context. What is in the store
already is not run again, so a profile that was killed goes on where it was, and a new model costs
only its own pairs.
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
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import ray

from rl.profile.measure import RunSettings, measure_pair, measure_thought
from rl.profile.ready_pool import ready_pool
from serve_app.config import AtlasConfig
from serve_app.config.abilities import abilities_of
from serve_app.config.patterns.check import needs_of, routed_pairs
from serve_app.config.tools import ToolsetConfig
from serve_app.embedder import Embedder
from serve_app.errors import ConfigError
from serve_app.orchestrator.planning import PLANNER_SAMPLING, planner_messages, with_note
from serve_app.pool.controller import PoolController
from serve_app.questions import Question
from serve_app.router.rules.cold_start import pair_cards
from serve_app.running import deployment_handle
from serve_app.schemas import NO_TOOL, MemberState, Pair, PoolState
from serve_app.store import (
    ProfileOutcome,
    ProfileQuestion,
    ProfileThought,
    Store,
    add_outcomes,
    add_questions,
    add_thought,
    forget_errors,
    measured,
    read_thoughts,
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
_CARD = {"answers", "examples", "routable"}
"""Of a pattern: what the router reads; its answers do not depend on it."""
_TOOL_EXTRAS = {"description", "examples", "price_usd_per_call"}
"""Settings of a tool that its results do not depend on."""


@dataclass(frozen=True)
class ProfileSettings:
    """How a profile is taken."""

    models: frozenset[str] | None = None
    """Models whose pairs are measured; `None` takes all of the pool."""
    judge: Pair | None = None
    """Judges answers to questions of the metric `judge`."""
    planner: str | None = None
    """Model that thinks before the pairs run a second time; `None` takes the deployment's, and
    without one nobody thinks."""
    sample: float = 1.0
    """Share in (0, 1] of the pairs that each training question is given to, drawn per question;
    held-out ones get every pair, or no policy could be judged on them."""
    max_cost_usd: float | None = None
    """No run is started that is expected to exceed this."""
    concurrency: int = 4
    """Questions under way at once; each runs its pairs side by side."""
    deadline_s: float = 120.0
    """Of one run."""
    temperature: float = 0.0
    """Of the models' answers, in [0, 2]."""
    samples: int = 1
    """Runs of each pair on each question before any thought, at least 1; more than one tell
    something where answers differ from run to run. All of them count."""
    again: bool = False
    """Run also what is measured already; the newest outcome counts."""
    errors_again: bool = False
    """Forget the outcomes that ended in an error, and run them anew."""
    wait_s: float = 300.0
    """Longest wait for models that are wanted and not ready yet. What is not ready then, or can not
    be by then, is left out and named in `Progress.left_out`."""
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
    thoughts: int = 0
    """Of `done`: runs of the planner."""
    errors: int = 0
    """Of `done`: outcomes that ended in an error, as in a tool that did not finish in time. They
    count as wrong answers: a pair that often fails so is a bad one, on a machine not overloaded."""
    last_error: str | None = None
    cost_usd: float = 0.0
    judged: int = 0
    judge_agreed: int = 0
    """Of `judged`: the judge said the same in both orders."""
    stopped: str | None = None
    """Why it ended early."""
    waiting_for: tuple[str, ...] = ()
    """Models that are not ready yet, and why; it has not begun before there is none."""
    left_out: tuple[str, ...] = ()
    """Wanted pairs that are not measured, because they did not answer in time."""
    left_out_because: tuple[str, ...] = ()
    """Why not, one reason per model."""

    def to_json(self) -> dict[str, Any]:
        """For the job's row."""
        return dict(vars(self))


class _Kind(StrEnum):
    """What a run is."""

    ALONE = "alone"
    """A pair, before any thought."""
    AFTER = "after"
    """A pair, with the thought in its context."""
    THOUGHT = "thought"
    """The planner."""


@dataclass(frozen=True)
class _Marks:
    """Fingerprints of everything that is measured."""

    alone: dict[Pair, str]
    after: dict[Pair, str]
    """Of the pairs after the planner has spoken; empty without one."""
    thought: str
    """Of the planner; empty without one."""


@dataclass(frozen=True)
class _Task:
    """A question and the runs that it is missing."""

    question: Question
    alone: tuple[Pair, ...]
    after: tuple[Pair, ...]
    """Pairs to run after the planner has spoken."""
    planner: Pair | None
    """Who is to speak; `None` where it has, or is not needed."""
    note: str | None = None
    """What it said earlier."""
    sample: int = 0
    """Which of the runs before a thought."""

    def mark(self, fingerprint: str) -> str:
        """How an outcome of this run is marked, before a thought."""
        return sample_mark(fingerprint, self.sample)

    @property
    def runs(self) -> list[tuple[_Kind, Pair]]:
        """All that is missing."""
        planner = () if self.planner is None else (self.planner,)
        kinds = ((_Kind.ALONE, self.alone), (_Kind.AFTER, self.after), (_Kind.THOUGHT, planner))
        return [(kind, pair) for kind, pairs in kinds for pair in pairs]


@dataclass(frozen=True)
class _Measured:
    """What the runs of a task gave; what could not run is left out."""

    alone: tuple[ProfileOutcome, ...] = ()
    after: tuple[ProfileOutcome, ...] = ()
    thought: ProfileThought | None = None


@dataclass
class _Costs:
    """What a run is expected to cost: the mean of its like so far, or its card's price."""

    listed_usd: dict[Pair, float]
    sums: dict[tuple[_Kind, Pair], float] = field(default_factory=lambda: defaultdict(float))
    counts: dict[tuple[_Kind, Pair], int] = field(default_factory=lambda: defaultdict(int))

    def add(self, kind: _Kind, pair: Pair, cost_usd: float) -> None:
        self.sums[kind, pair] += cost_usd
        self.counts[kind, pair] += 1

    def expected(self, task: _Task) -> float:
        return sum(
            self.sums[run] / self.counts[run] if self.counts[run] else self._listed(run[1])
            for run in task.runs
        )

    def _listed(self, pair: Pair) -> float:
        """A planner need not be a pair that is routed to."""
        of_model = [usd for other, usd in self.listed_usd.items() if other[0] == pair.model_id]
        return self.listed_usd.get(pair, max(of_model, default=0.0))


def fingerprint(config: AtlasConfig, pair: Pair, planner: str | None = None) -> str:
    """Hash of everything configured that a pair's answers depend on.

    Args:
        config: The deployment.
        pair: Who answers.
        planner: Model that has spoken before; `None`: no planner.
    """
    if pair.is_pattern:
        return _of_pattern(config, pair)
    tool = next((tool for tool in config.tools if tool.tool_id == pair.tool_id), None)
    settings: list[Any] = [
        _of_model(config, pair.model_id),
        tool and tool.model_dump(mode="json", exclude=_TOOL_EXTRAS),
    ]
    if isinstance(tool, ToolsetConfig):
        members = config.called_tools(tool.tool_id)
        settings += [member.model_dump(mode="json", exclude=_TOOL_EXTRAS) for member in members]
    if planner is not None:
        settings.append({"thought": thought_fingerprint(config, planner), "as": with_note("", "")})
    return _digest(settings)


def sample_mark(fingerprint: str, sample: int) -> str:
    """How an outcome is marked that is one of several runs; the first one by the fingerprint."""
    return f"{fingerprint}-s{sample}" if sample else fingerprint


def sample_of(mark: str) -> int:
    """Which of several runs an outcome is, by its mark."""
    number = mark.rpartition("-s")[2] if "-s" in mark else ""
    return int(number) if number.isdecimal() else 0


def _of_pattern(config: AtlasConfig, pair: Pair) -> str:
    """Hash of a pattern and of everything that it asks.

    Where it leaves a choice to the router, that is every pair it may choose: what the router makes
    of them is not part of the hash, so a promotion shifts what such a pattern's outcomes mean.
    """
    patterns = {Pair.of_pattern(pattern.name): pattern for pattern in config.patterns}
    pattern = patterns[pair]
    needs = needs_of(pattern)
    asked = needs.pairs | {Pair.of_pattern(name) for name in needs.patterns}
    for node in needs.routes:
        asked |= set(routed_pairs(node, config))
    tools = [tool for tool in config.tools if tool.tool_id in needs.tools]
    settings = [
        {k: v for k, v in pattern.as_written().items() if k not in _CARD},
        [fingerprint(config, of) for of in sorted(asked)],
        [_of_model(config, model_id) for model_id in sorted(needs.verifiers)],
        [tool.model_dump(mode="json", exclude=_TOOL_EXTRAS) for tool in tools],
        "routed" if needs.routes else "fixed",
    ]
    return _digest(settings)


def thought_fingerprint(config: AtlasConfig, planner: str) -> str:
    """Hash of everything configured that a planner's thoughts depend on."""
    return _digest([_of_model(config, planner), planner_messages("", ()), PLANNER_SAMPLING])


def _of_model(config: AtlasConfig, model_id: str) -> dict[str, Any]:
    return config.model(model_id).model_dump(mode="json", include=_MODEL_FIELDS)


def _digest(settings: Any) -> str:
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
        ConfigError: If the pool or the planner is not ready, or a question needs a judge and there
            is none.
        StoreError: If the store is away.
    """
    settings = settings or ProfileSettings()
    needs_judge = any(question.metric.name == "judge" for question in questions)
    if needs_judge and settings.judge is None:
        raise ConfigError("some questions have the metric 'judge': name a judge")
    progress = Progress(total=0)

    def on_wait(reasons: tuple[str, ...]) -> None:
        progress.waiting_for = reasons
        on_progress(progress)

    planner_id = settings.planner or config.router.planner
    helpers = {settings.judge.model_id if settings.judge else None, planner_id}
    pool = await ready_pool(
        _read_pool,
        models=settings.models,
        others=frozenset(name for name in helpers if name is not None),
        wait_s=settings.wait_s,
        on_wait=on_wait,
    )
    if settings.judge is not None and settings.judge not in pool.state.ready_pairs():
        raise ConfigError(f"the judge {settings.judge} is not among the pool's ready pairs")
    planner = _ready_planner(pool.state, planner_id)
    abilities = abilities_of(config)
    pairs = tuple(pair for pair in pool.pairs if abilities[pair].text_alone)
    if not pairs:
        raise ConfigError("; ".join(("none of the models is ready", *pool.reasons)))
    progress.waiting_for, progress.left_out_because = (), pool.reasons
    progress.left_out = tuple(map(str, pool.left_out))
    if pool.left_out:
        logger.warning("left out: %s (%s)", pool.left_out, "; ".join(pool.reasons))
    questions = list({question.key: question for question in questions}.values())
    await _keep_questions(config, questions, store)
    marks = _marks(config, pairs, planner, again=settings.again)
    wanted = [
        task
        for question in questions
        for task in _tasks(
            question, sampled_pairs(question, pairs, settings.sample), planner, settings.samples
        )
    ]
    if settings.errors_again:
        known = _marks(config, pairs, planner, again=False)
        await forget_errors(
            store,
            [question.key for question in questions],
            [*known.alone.values(), *known.after.values()],
        )
    costs = _Costs({card.pair: card.cost_usd for card in pair_cards(config)})
    for number in range(_PASSES):
        missing = await _missing(wanted, marks, store)
        num_missing = sum(len(task.runs) for task in missing)
        if number == 0:
            progress.total = num_missing
            progress.skipped = sum(len(task.runs) for task in wanted) - num_missing
            on_progress(progress)
        progress.failed = 0
        await _run(missing, marks, store, settings, progress, costs, on_progress)
        if not progress.failed or progress.stopped:
            break
    return progress


def _ready_planner(pool: PoolState, model_id: str | None) -> Pair | None:
    """Who thinks.

    Raises:
        ConfigError: If it does not answer now.
    """
    if model_id is None:
        return None
    ready = {m.model_id for m in pool.models if m.state is MemberState.READY}
    if model_id not in ready:
        raise ConfigError(f"the planner {model_id!r} is not among the pool's ready models")
    return Pair(model_id, NO_TOOL)


def _marks(
    config: AtlasConfig, pairs: tuple[Pair, ...], planner: Pair | None, *, again: bool
) -> _Marks:
    """Fingerprints of what is measured; those of one profile alone if it is done `again`."""
    suffix = f"-{uuid.uuid4().hex[:8]}" if again else ""
    alone = {pair: fingerprint(config, pair) + suffix for pair in pairs}
    if planner is None:
        return _Marks(alone, {}, "")
    after = {pair: fingerprint(config, pair, planner.model_id) + suffix for pair in pairs}
    return _Marks(alone, after, thought_fingerprint(config, planner.model_id) + suffix)


def _tasks(
    question: Question, pairs: tuple[Pair, ...], planner: Pair | None, samples: int
) -> list[_Task]:
    """All that is wanted of a question; it is thought about once."""
    first = _Task(question, pairs, () if planner is None else pairs, planner)
    more = [_Task(question, pairs, (), None, sample=number) for number in range(1, samples)]
    return [first, *more]


async def _missing(wanted: Sequence[_Task], marks: _Marks, store: Store) -> list[_Task]:
    """What the store does not have yet; a thought that it has is used again."""
    keys = [task.question.key for task in wanted]
    done = await measured(store, keys)
    thoughts = {
        thought.question_key: thought
        for thought in (await read_thoughts(store, keys) if marks.thought else ())
        if thought.fingerprint == marks.thought
    }
    missing = []
    for task in wanted:
        key = task.question.key
        alone = tuple(
            pair for pair in task.alone if (key, pair, task.mark(marks.alone[pair])) not in done
        )
        after = tuple(pair for pair in task.after if (key, pair, marks.after[pair]) not in done)
        thought = thoughts.get(key)
        left = _Task(
            task.question,
            alone,
            after,
            planner=task.planner if thought is None else None,
            note=None if thought is None else thought.thought,
            sample=task.sample,
        )
        if left.runs:
            missing.append(left)
    return missing


async def _run(
    tasks: Sequence[_Task],
    marks: _Marks,
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
                ref = run.remote(task, marks, settings)
                future = asyncio.wrap_future(ref.future())
                under_way[future], refs[future] = task, ref
            if not under_way:
                return
            finished, _ = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
            for future in finished:
                task = under_way.pop(future)
                del refs[future]
                found = _result(future, task)
                await _keep(found, store)
                _count(found, task, progress, costs)
                on_progress(progress)
    finally:
        for ref in refs.values():
            ray.cancel(ref)


def _result(future: asyncio.Future[Any], task: _Task) -> _Measured:
    try:
        found: _Measured = future.result()
    except ray.exceptions.RayError as error:
        logger.warning("question %s: its task failed: %s", task.question.id, error)
        return _Measured()
    return found


async def _keep(found: _Measured, store: Store) -> None:
    """Put what was measured into the store; the thought before what came after it."""
    if found.thought is not None:
        await add_thought(store, found.thought)
    outcomes = [*found.alone, *found.after]
    if outcomes:
        await add_outcomes(store, outcomes)


def _count(found: _Measured, task: _Task, progress: Progress, costs: _Costs) -> None:
    outcomes = (*found.alone, *found.after)
    num_thoughts = int(found.thought is not None)
    progress.done += len(outcomes) + num_thoughts
    progress.thoughts += num_thoughts
    progress.failed += len(task.runs) - len(outcomes) - num_thoughts
    for kind, of_kind in ((_Kind.ALONE, found.alone), (_Kind.AFTER, found.after)):
        for outcome in of_kind:
            costs.add(kind, outcome.pair, outcome.cost_usd)
    if found.thought is not None:
        costs.add(_Kind.THOUGHT, Pair(found.thought.model_id, NO_TOOL), found.thought.cost_usd)
        progress.cost_usd += found.thought.cost_usd
    for outcome in outcomes:
        progress.cost_usd += outcome.cost_usd
        if outcome.error is not None:
            progress.errors += 1
            progress.last_error = outcome.error
        if outcome.judge_agreed is not None:
            progress.judged += 1
            progress.judge_agreed += outcome.judge_agreed


def sampled_pairs(question: Question, pairs: tuple[Pair, ...], share: float) -> tuple[Pair, ...]:
    """The pairs a question is given to; the same at every call."""
    if share >= 1 or question.effective_split == "held_out":
        return pairs
    number = max(1, round(share * len(pairs)))
    drawn = set(random.Random(question.key).sample(pairs, number))
    return tuple(pair for pair in pairs if pair in drawn)


async def _read_pool(known_version: int, timeout_s: float) -> PoolState:
    response = deployment_handle(PoolController.__name__).state.remote(known_version)
    pool: PoolState = await asyncio.to_thread(response.result, timeout_s=timeout_s)
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


def _measure(task: _Task, marks: _Marks, settings: ProfileSettings) -> _Measured:
    """Run a question and score the answers; pairs with a thought run as soon as it is there."""
    question, runs = task.question, settings.runs

    async def run_pairs(
        pairs: Sequence[Pair], marked: dict[Pair, str], note: str | None = None
    ) -> tuple[ProfileOutcome, ...]:
        found = await asyncio.gather(
            *(measure_pair(question, pair, marked[pair], runs, note=note) for pair in pairs)
        )
        return tuple(outcome for outcome in found if outcome is not None)

    async def think() -> tuple[ProfileThought | None, tuple[ProfileOutcome, ...]]:
        if task.planner is None:
            return None, await run_pairs(task.after, marks.after, task.note)
        thought = await measure_thought(question, task.planner, marks.thought, runs)
        if thought is None:
            return None, ()
        return thought, await run_pairs(task.after, marks.after, thought.thought)

    async def together() -> _Measured:
        marked = {pair: task.mark(marks.alone[pair]) for pair in task.alone}
        alone, (thought, after) = await asyncio.gather(run_pairs(task.alone, marked), think())
        return _Measured(alone, after, thought)

    return asyncio.run(together())
