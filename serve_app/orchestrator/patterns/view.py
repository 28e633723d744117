"""What a node of a declared pattern is given, what it gives back, and how its calls are bounded."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, TypeVar

from serve_app.budget import Budget
from serve_app.config import AtlasConfig
from serve_app.config.patterns.check import QUESTION
from serve_app.config.patterns.language import Condition, PatternConfig, Predicate
from serve_app.config.patterns.template import Reference, Template, cut, filled
from serve_app.errors import AtlasError, BudgetExceeded, DeadlineExceeded, EngineError
from serve_app.models.reply import Choice
from serve_app.orchestrator.decision_client import Decider
from serve_app.orchestrator.pairs.base import PairWork
from serve_app.orchestrator.pairs.runner import PairRunner
from serve_app.orchestrator.recovery import stop_of
from serve_app.orchestrator.trace import Span
from serve_app.schemas import NO_TOOL, Pair, StopReason

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

CLEAN_UP_S = 0.1
"""How long a cancelled task is waited for, in seconds."""
CAPS = frozenset(
    {
        StopReason.DEADLINE,
        StopReason.USD,
        StopReason.TOKENS,
        StopReason.MODEL_CALLS,
        StopReason.TOOL_CALLS,
    }
)
"""Stop reasons at which the caller gets a partial answer."""


class Status(StrEnum):
    """How a node ended."""

    OK = "ok"
    PARTIAL = "partial"
    """A cap cut it short; what there was is its result."""
    REFUSED = "refused"
    """The pattern declines to answer."""
    FAILED = "failed"
    """It has no result."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a node came to."""

    status: Status = Status.OK
    text: str = ""
    data: Any = None
    """JSON: of an answer that fits a schema, or what the node says of how it came about."""
    sources: tuple[dict[str, Any], ...] = ()
    """`id`, `title`, `text` and `score` of each."""
    choices: tuple[Choice, ...] = ()
    """Of the model whose reply the text is, as it gave them."""
    pair: Pair | None = None
    mean_logprob: float | None = None
    max_bytes: int = 8192
    """Of the text that other nodes see."""
    failure: AtlasError | None = None
    """Why it failed, or was cut short."""
    is_sent: bool = False
    """Whether its text is on its way to the caller; of a failed one, some of it."""
    num_citable: int | None = None
    """Sources that its text may cite by number; `None`: as many as it has."""
    fault: str | None = None
    """What a check has found wrong with it that kept it all the same."""

    @property
    def is_usable(self) -> bool:
        """Whether there is something to go on with."""
        return self.status in (Status.OK, Status.PARTIAL)

    @property
    def stop(self) -> StopReason:
        """Why nothing more was done."""
        if self.status is Status.REFUSED:
            return StopReason.DECLINED
        return StopReason.ANSWERED if self.failure is None else stop_of(self.failure)

    @property
    def shown(self) -> str:
        """The text as other nodes see it."""
        return cut(self.text, self.max_bytes)


def failed(failure: AtlasError) -> Result:
    """The result of a node that failed."""
    return Result(Status.FAILED, failure=failure)


@dataclass(frozen=True)
class PatternParts:
    """What all nodes share; one per gateway replica and pool version."""

    pairs: PairRunner
    decider: Decider
    config: AtlasConfig
    patterns: Mapping[str, PatternConfig]


@dataclass(frozen=True)
class NodeView:
    """One node's view of the run it is part of."""

    parts: PatternParts
    work: PairWork
    """The run of the pattern: the caller's call, and the recovery of the whole request."""
    budget: Budget
    span: Span
    """Where what it does is put on record."""
    results: Mapping[str, Result] = field(default_factory=dict)
    """By id, and by the words `item`, `answers`, `draft`, `objections`, `subtask`."""
    streams: bool = False
    """Whether its text goes to the caller as it comes, if the caller wants it so: it is the last
    thing that is done."""

    def seeing(self, **results: Result) -> NodeView:
        """This view with more results."""
        return replace(self, results={**self.results, **results})

    @property
    def until(self) -> str:
        """What is waited for of what runs side by side, as `asyncio.wait` takes it.

        All of it where the same result is wanted again: the first would be another one next time.
        """
        return asyncio.FIRST_COMPLETED if self.work.call.fixed is None else asyncio.ALL_COMPLETED

    @property
    def question(self) -> str:
        """The last user message."""
        return self.work.call.query

    def value(self, reference: Reference) -> Any:
        """What a reference stands for; `None`: nothing is there."""
        if reference.name == QUESTION:
            return self.question
        result = self.results.get(reference.name)
        if result is None:
            return None
        head, *keys = reference.path or ("text",)
        if head == "count":
            counted = isinstance(result.data, str | list | dict) and not result.sources
            return len(result.data) if counted else len(result.sources)
        if head == "status":
            return result.status.value
        if head == "text":
            return result.shown
        value = result.data
        for key in keys:
            if isinstance(value, list) and key.isdigit() and int(key) < len(value):
                value = value[int(key)]
            else:
                value = value.get(key) if isinstance(value, dict) else None
        return value

    def text(self, reference: Reference) -> str:
        """What a reference stands for, as text of bounded length."""
        value = self.value(reference)
        if value is None:
            return ""
        said = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if reference.name == QUESTION:
            return said
        return cut(said, self.results[reference.name].max_bytes)

    def fill(self, template: str) -> str:
        """A template with its references filled, once."""
        return Template.parse(template).fill(self.text)

    def filled(self, value: Any) -> Any:
        """A JSON value with the references of its strings filled, once."""
        return filled(value, self.text)

    def holds(self, predicate: Predicate) -> bool:
        """Whether all conditions of a predicate hold."""
        return all(
            _holds(condition, self.value(Reference.parse(reference)))
            for reference, condition in predicate.items()
        )

    def tool_work(self, tool_id: str) -> PairWork:
        """A run of a tool by itself, for whatever runs tools."""
        return PairWork(
            pair=Pair(NO_TOOL, tool_id),
            call=self.work.call,
            budget=self.budget,
            span=self.span,
            recovery=self.work.recovery,
        )


def _holds(condition: Condition, value: Any) -> bool:
    """Whether a condition holds; a number in a text counts as a number, `None` as nothing."""
    number = _number(value)
    text = "" if value is None else str(value).strip()
    checks: dict[str, Callable[[Any], bool]] = {
        "eq": lambda wanted: _same(value, wanted),
        "ne": lambda wanted: not _same(value, wanted),
        "lt": lambda wanted: number is not None and number < wanted,
        "le": lambda wanted: number is not None and number <= wanted,
        "gt": lambda wanted: number is not None and number > wanted,
        "ge": lambda wanted: number is not None and number >= wanted,
        "one_of": lambda wanted: text.casefold() in {name.strip().casefold() for name in wanted},
        "empty": lambda wanted: _is_empty(value) == wanted,
    }
    return all(
        check(getattr(condition, name))
        for name, check in checks.items()
        if getattr(condition, name) is not None
    )


def _is_empty(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, list | dict) and not value)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _same(value: Any, wanted: str | float | bool) -> bool:
    if isinstance(wanted, bool) or isinstance(value, bool):
        return value is wanted
    if isinstance(wanted, str):
        return str("" if value is None else value).strip().casefold() == wanted.strip().casefold()
    return _number(value) == wanted


async def by_deadline(work: Coroutine[Any, Any, _T], budget: Budget, name: str) -> _T:
    """Await a coroutine no longer than its budget has time.

    Args:
        work: What is done; it is ended at the deadline, and left to itself if it does not end.
        budget: Says when the deadline is.
        name: What it is, for the message.

    Raises:
        DeadlineExceeded: If it is not done in time.
        EngineError: If something else ended it.
        BaseException: What it fails with.
    """
    if budget.deadline.is_over():
        work.close()
        raise DeadlineExceeded(f"no time was left for {name}")
    task = asyncio.get_running_loop().create_task(work)
    try:
        await asyncio.wait({task}, timeout=max(budget.seconds_left, 0.0))
        if task.cancelled():
            raise EngineError(f"{name} was ended before it was done")
        if task.done():
            return task.result()
    finally:
        await end(task)
    raise DeadlineExceeded(f"{name} took longer than it was given")


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks. A task that does not end within `CLEAN_UP_S` is referenced until it ends."""
    running = {task for task in tasks if not task.done()}
    for task in running:
        task.cancel()
    if running:
        _, running = await asyncio.wait(running, timeout=CLEAN_UP_S)
    for task in running:
        _ending.add(task)
        task.add_done_callback(_ended)
    for task in tasks:
        if task.done() and not task.cancelled():
            task.exception()  # seen


_ending: set[asyncio.Task[Any]] = set()
"""Tasks that were told to end and have not yet."""


def _ended(task: asyncio.Task[Any]) -> None:
    _ending.discard(task)
    if not task.cancelled() and task.exception() is not None:
        logger.debug("what was ended failed: %s", task.exception())


async def side_by_side(works: Mapping[str, Awaitable[_T]]) -> dict[str, _T]:
    """The results of all; if this is ended, so are they."""
    tasks = {name: asyncio.ensure_future(work) for name, work in works.items()}
    try:
        await asyncio.gather(*tasks.values())
        return {name: task.result() for name, task in tasks.items()}
    finally:
        await end(*tasks.values())


def is_cap(failure: AtlasError | None) -> bool:
    """Whether a failure says that a limit was reached, and not that something is wrong."""
    return isinstance(failure, BudgetExceeded | DeadlineExceeded)
