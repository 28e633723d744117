"""What is done after a failure: one table, asked by everything that tries again.

A failure is told apart by its `Fault`, by the strongest `Effects` of the tool calls that have begun
for the request, and by whether a byte of the answer is out. The table names the moves that are
right then, the best one first; whoever asks says which of them it can make. Nothing else retries:
not Ray (`max_retries=0`), not the `openai` client, not a model's class. HAProxy alone sends a POST
again, to another gateway where one died before it answered. `docs/architecture.md` has the table
with the status codes behind each fault.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from serve_app.budget import Deadline
from serve_app.errors import (
    AtlasError,
    BudgetExceeded,
    DeadlineExceeded,
    EngineBusy,
    EngineError,
    EngineUnavailable,
    InvalidRequest,
    ModelNotFound,
    NoCandidate,
    QuotaExceeded,
    QuotaUnknown,
    ReplicaDied,
    RequestError,
    ToolError,
    ToolRetry,
    ToolWorkerDied,
    UnfitForPair,
    UnreadableCall,
)
from serve_app.schemas import Effects, StopReason

_T = TypeVar("_T")

MAX_DEATHS = 2
"""Replicas of models that may die over one request before it fails. More than one, because a node
that goes takes innocent requests with it; few, because the request may be what kills them."""
FIRST_TRY_SHARE = 0.6
"""Share of the time left that a candidate may take while another could still take over."""
LONGEST_PAUSE_S = 4.0
"""Longest wait before a call is made again; who asks for a longer one is not asked again."""
_AFTER_DEATH_S = 0.1
"""From the first death of a replica until what it worked on is sent to another, at most."""
_FIRST_PAUSE_S = 0.25
"""From the first failure that may pass until the call is made again, at most."""
_WINDOW_S = 60.0
"""Of a retry budget."""


class Fault(StrEnum):
    """What a failure says."""

    CALLER = "caller"
    """The request is wrong for every candidate, or its key may not, or may not spend more: 400,
    401, 403, 404, 413, 422, 429 with the key's quota."""
    EXTRA = "extra"
    """The engine refuses what the caller did not ask for: log-probabilities."""
    UNFIT = "unfit"
    """The request does not fit this candidate: context, tool or price. After a context that is too
    short only a longer one follows."""
    UNREADABLE = "unreadable"
    """The model wrote a tool call that cannot be read."""
    ARGUMENTS = "arguments"
    """The model called a tool with wrong arguments."""
    DIED = "died"
    """The model's replica died."""
    PASSING = "passing"
    """The remote endpoint failed in a way that may pass: no connection, 408, 5xx."""
    BUSY = "busy"
    """The model asks for a pause (429, or `Retry-After`); a call made again waits for its end."""
    ENGINE = "engine"
    """The model's application failed, or its endpoint refuses our access: 401, 403, 404, a spent
    quota. The same call would fail again."""
    TOOL_DIED = "tool_died"
    """The worker that ran the tool died."""
    TOOL = "tool"
    """The tool failed."""
    LATE = "late"
    """The candidate's share of the time is up."""
    OTHER = "other"
    """Anything else: a fault of ours, or a candidate that has left the pool."""


class Move(StrEnum):
    """What can be done after a failure."""

    AGAIN = "again"
    """Make the same call once more: of a model with the same conversation, or of a tool with the
    same arguments. To tell a model what was wrong with its call is such a call too."""
    ANOTHER = "another"
    """Run another candidate from the beginning."""
    STOP = "stop"
    """Fail, or give the best answer there is."""


_A, _B = Move.AGAIN, Move.ANOTHER
_MOVES: Mapping[Fault, tuple[tuple[Move, ...], tuple[Move, ...], tuple[Move, ...]]] = {
    #                 none      idempotent  once
    Fault.CALLER: ((), (), ()),
    Fault.EXTRA: ((_A,), (_A,), (_A,)),
    Fault.UNFIT: ((_B,), (_B,), ()),
    Fault.UNREADABLE: ((_A, _B), (_A, _B), (_A,)),
    Fault.ARGUMENTS: ((_A, _B), (_A, _B), (_A,)),
    Fault.DIED: ((_B, _A), (_B, _A), (_A,)),
    Fault.PASSING: ((_A, _B), (_A, _B), (_A,)),
    Fault.BUSY: ((_A, _B), (_A, _B), (_A,)),
    Fault.ENGINE: ((_B,), (_B,), ()),
    Fault.TOOL_DIED: ((_A, _B), (_A, _B), ()),
    Fault.TOOL: ((_B,), (_B,), ()),
    Fault.LATE: ((_B,), (_B,), ()),
    Fault.OTHER: ((_B,), (_B,), ()),
}
"""While no byte of the answer is out. A call of a model repeats no effect of a tool, so it may be
made again after any; another candidate would call the tools once more."""

TABLE: Mapping[tuple[Fault, Effects, bool], tuple[Move, ...]] = {
    (fault, effects, sent): () if sent else moves
    for fault, row in _MOVES.items()
    for effects, moves in zip(Effects, row, strict=True)
    for sent in (False, True)
}
"""The moves by fault, effects begun and bytes sent. What was sent cannot be taken back, so nothing
follows upon it."""

_FAULTS: tuple[tuple[type[AtlasError], Fault], ...] = (
    (QuotaExceeded, Fault.CALLER),
    (QuotaUnknown, Fault.CALLER),
    (UnfitForPair, Fault.UNFIT),
    (ModelNotFound, Fault.OTHER),
    (RequestError, Fault.CALLER),
    (UnreadableCall, Fault.UNREADABLE),
    (ReplicaDied, Fault.DIED),
    (EngineUnavailable, Fault.PASSING),
    (EngineBusy, Fault.BUSY),
    (EngineError, Fault.ENGINE),
    (ToolRetry, Fault.ARGUMENTS),
    (ToolWorkerDied, Fault.TOOL_DIED),
    (ToolError, Fault.TOOL),
    (DeadlineExceeded, Fault.LATE),
)


LOADS: frozenset[Fault] = frozenset({Fault.PASSING, Fault.BUSY})
"""Faults that a call made again could make worse: what is overloaded gets more load. Such calls
come out of the gateway's `RetryBudget`. The others are bounded by themselves: a request is sent
again after at most one death, and a tool's call, a repair and log-probabilities once."""


def fault_of(failure: AtlasError) -> Fault:
    """The kind of a failure."""
    return next((fault for kind, fault in _FAULTS if isinstance(failure, kind)), Fault.OTHER)


_STOPS: tuple[tuple[type[AtlasError], StopReason], ...] = (
    (InvalidRequest, StopReason.REFUSED),
    (NoCandidate, StopReason.NO_CANDIDATE),
    (DeadlineExceeded, StopReason.DEADLINE),
)


def stop_of(failure: AtlasError) -> StopReason:
    """Why a request ended that failed with this."""
    if isinstance(failure, BudgetExceeded):
        return StopReason(failure.cap)
    return next((stop for kind, stop in _STOPS if isinstance(failure, kind)), StopReason.FAILED)


@dataclass
class Recovery:
    """What one request has been through, as far as the table asks for it."""

    max_deaths: int = MAX_DEATHS
    deaths: int = 0
    """Replicas that died over it."""
    begun: Counter[Effects] = field(default_factory=Counter)
    """Tool calls that have begun, by their effects."""

    @property
    def effects(self) -> Effects:
        """Strongest of the tool calls that have begun."""
        return max(
            (effects for effects, count in self.begun.items() if count),
            key=list(Effects).index,
            default=Effects.NONE,
        )

    def begin(self, effects: Effects) -> None:
        """Count a tool's call, whose effect may have happened from now on."""
        self.begun[effects] += 1

    def take_back(self, effects: Effects) -> None:
        """Count a call no more that ended before its effect. Others may have begun beside it."""
        self.begun[effects] -= 1

    @property
    def is_deadly(self) -> bool:
        """Whether the request may be what kills replicas, and so goes no further."""
        return self.deaths >= self.max_deaths

    def move(
        self, fault: Fault, *, sent: bool = False, again: bool = False, another: bool = False
    ) -> Move:
        """What to do after a failure.

        Args:
            fault: Its kind.
            sent: Whether a piece of what failed is on its way to the caller.
            again: Whether the same call can be made once more.
            another: Whether there is another candidate.
        """
        can = {Move.AGAIN: again, Move.ANOTHER: another}
        if self.is_deadly:
            return Move.STOP
        moves = TABLE[fault, self.effects, sent]
        return next((move for move in moves if can[move]), Move.STOP)


def pause_s(failure: AtlasError, times: int) -> float:
    """Seconds to wait before a call is made again: what the model asks for, and full jitter.

    The jitter is uniform between 0 and a bound that doubles, or after a death grows by four, each
    time; so calls that failed together do not come again together.

    Args:
        failure: What it failed with.
        times: How often it has failed; at least 1.
    """
    if isinstance(failure, EngineUnavailable | EngineBusy):
        longest_s = min(LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** (times - 1))
        return (failure.retry_after_s or 0.0) + random.uniform(0, longest_s)
    return random.uniform(0, _AFTER_DEATH_S * 4.0 ** (times - 1))


async def again(
    make: Callable[[], Awaitable[_T]], deadline: Deadline, max_deaths: int = MAX_DEATHS
) -> _T:
    """Make a call that has no effect, and again where the replica that works on it dies.

    Args:
        make: Makes the call.
        deadline: When the answer must be there.
        max_deaths: How many replicas may die over it.

    Raises:
        ReplicaDied: If that many did.
        AtlasError: What else the call fails with.
    """
    recovery = Recovery(max_deaths)
    while True:
        try:
            return await make()
        except ReplicaDied as failure:
            recovery.deaths += 1
            can = not deadline.is_over()
            if recovery.move(fault_of(failure), again=can) is not Move.AGAIN:
                raise
            await asyncio.sleep(pause_s(failure, min(recovery.deaths, 3)))


class RetryBudget:
    """How often a gateway may ask models again after faults that load makes worse.

    With an endpoint that fails for everybody, retries would multiply the load that it cannot carry.

    Invariant: in any minute there are at most `share` of the calls of that minute, or `least`.
    """

    def __init__(self, share: float = 0.1, least: int = 5) -> None:
        """Begin with no call.

        Args:
            share: Retries for each call.
            least: Retries in a minute, however few calls there are.
        """
        self._share = share
        self._least = least
        self._calls: deque[list[float]] = deque()
        """Of the last minute: second, calls, retries."""
        self._num_calls = self._num_retries = 0

    def earn(self) -> None:
        """Count a call that is made for the first time."""
        self._now()[1] += 1
        self._num_calls += 1

    def spend(self) -> bool:
        """Take one retry; whether there was one."""
        now = self._now()
        if self._num_retries >= max(self._least, int(self._share * self._num_calls)):
            return False
        now[2] += 1
        self._num_retries += 1
        return True

    def _now(self) -> list[float]:
        """The counts of this second; what is older than a minute is forgotten."""
        second = float(int(time.monotonic()))
        while self._calls and self._calls[0][0] <= second - _WINDOW_S:
            _, calls, retries = self._calls.popleft()
            self._num_calls -= int(calls)
            self._num_retries -= int(retries)
        if not self._calls or self._calls[-1][0] != second:
            self._calls.append([second, 0, 0])
        return self._calls[-1]
