"""Waits until what a profile is to measure is ready, and says what is not."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from serve_app.schemas import MemberState, ModelMember, Pair, PoolState

logger = logging.getLogger(__name__)

_FIRST_ANSWER_S = 60.0
_POLL_S = 5.0

ReadState = Callable[[int, float], Awaitable[PoolState]]
"""Reads the pool: the version known, and the longest time to wait for another one in seconds.
Raises `TimeoutError` when there is none."""


@dataclass(frozen=True)
class ReadyPool:
    """A pool after the wait for it."""

    state: PoolState
    pairs: tuple[Pair, ...]
    """Wanted pairs that answer."""
    left_out: tuple[Pair, ...]
    """Wanted pairs that do not."""
    reasons: tuple[str, ...]
    """Why not, one per model."""


async def ready_pool(
    read: ReadState,
    *,
    models: frozenset[str] | None,
    others: frozenset[str] = frozenset(),
    wait_s: float,
    on_wait: Callable[[tuple[str, ...]], None] = lambda reasons: None,
) -> ReadyPool:
    """Wait until every wanted pair answers, or none that is missing can come in time.

    Args:
        read: Reads the pool.
        models: Models whose pairs are wanted; `None`: all.
        others: Models that are needed beside them, as the judge and the planner.
        wait_s: Longest wait in seconds.
        on_wait: Told what is waited for, at each change.
    """
    ends_s, ends_unix_s = time.monotonic() + wait_s, time.time() + wait_s
    state = await read(-1, _FIRST_ANSWER_S)
    told: tuple[str, ...] = ()
    while True:
        pool = _of(state, models)
        missing = [member for member in state.models if _is_missing(member, models, others)]
        left_s = ends_s - time.monotonic()
        if left_s <= 0 or not any(_may_come(member, ends_unix_s) for member in missing):
            return pool
        if pool.reasons != told:
            told = pool.reasons
            on_wait(told)
        try:
            state = await read(state.pool_version, min(left_s, _POLL_S))
        except TimeoutError:
            continue


def _of(state: PoolState, models: frozenset[str] | None) -> ReadyPool:
    wanted = [pair for pair in state.candidates() if models is None or pair.model_id in models]
    ready = set(state.ready_candidates())
    left_out = tuple(pair for pair in wanted if pair not in ready)
    incomplete = {pair.model_id for pair in left_out}
    reasons = tuple(
        f"{member.model_id} is {member.state.value}" + (f": {member.reason}" * bool(member.reason))
        for member in state.models
        if member.model_id in incomplete
    ) + tuple(
        f"{pattern.pair}: {pattern.missing or 'a model that it needs does not answer'}"
        for pattern in state.patterns
        if pattern.pair in left_out
    )
    return ReadyPool(state, tuple(pair for pair in wanted if pair in ready), left_out, reasons)


def _is_missing(member: ModelMember, models: frozenset[str] | None, others: frozenset[str]) -> bool:
    """Whether a model that is wanted does not answer, alone or with one of its tools."""
    is_wanted = models is None or member.model_id in models | others
    is_ready = member.state is MemberState.READY and not member.cold_tools
    return is_wanted and not is_ready and member.state is not MemberState.DRAINING


def _may_come(member: ModelMember, ends_unix_s: float) -> bool:
    """Whether it is being started or tried again before the wait ends."""
    return member.retry_unix_s is None or member.retry_unix_s < ends_unix_s
