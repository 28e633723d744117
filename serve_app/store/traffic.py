"""What the console asks of the store: sums over time, and which policies served.

Every number is a sum that the database makes, of rows that `sums` keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, Text, case, cast, func, select

from serve_app.errors import NotFound
from serve_app.schemas import DecidedBy, Pair
from serve_app.store.console_tables import LatencyRow, TrafficRow, UsageDayRow, VerdictDayRow
from serve_app.store.database import Store
from serve_app.store.sums import seconds_of
from serve_app.store.tables import (
    PolicyRow,
    ProfileOutcomeRow,
    ProfileQuestionRow,
    TrialRow,
)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests of some time."""

    began_unix_s: int
    requests: int
    errors: int
    cost_usd: float
    out_of_distribution: int
    """Requests that were unlike everything profiled."""


@dataclass(frozen=True, slots=True)
class Latency:
    """How long the requests of some time took, in steps of 12%."""

    began_unix_s: int
    median_s: float
    p95_s: float


@dataclass(frozen=True, slots=True)
class CandidateTraffic:
    """Requests that went to one candidate."""

    pair: Pair
    requests: int
    errors: int
    cost_usd: float


@dataclass(frozen=True, slots=True)
class UsageTotals:
    """What was used, by whatever it is listed by."""

    of: str
    requests: int
    errors: int
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float


@dataclass(frozen=True, slots=True)
class WinRate:
    """Verdicts on what went to one candidate."""

    pair: Pair
    verdicts: int
    wins: int
    score: float
    """Mean."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Verdicts on decisions of about the same confidence."""

    verdicts: int
    score: float
    """Mean."""
    confidence: float
    """Mean."""


@dataclass(frozen=True, slots=True)
class DomainScore:
    """What one candidate reached on the profile's questions of one domain."""

    domain: str
    pair: Pair
    questions: int
    score: float
    """Mean."""
    cost_usd: float
    """Mean."""


@dataclass(frozen=True, slots=True)
class ProfileMean:
    """What one candidate reached on the profile's questions."""

    questions: int
    score: float
    """Mean."""
    cost_usd: float
    """Mean."""


async def traffic_over_time(store: Store, since_unix_s: float, width_s: int) -> list[Traffic]:
    """Requests in intervals of `width_s`, a multiple of `TRAFFIC_S`; the oldest first.

    Raises:
        StoreError: If the store is away; so do all others here.
    """
    row, began = TrafficRow, _interval(TrafficRow.began_unix_s, width_s)
    is_foreign = row.path == str(DecidedBy.OUT_OF_DISTRIBUTION)
    query = (
        select(
            began,
            func.sum(row.requests),
            func.sum(row.errors),
            func.sum(row.cost_usd),
            func.sum(case((is_foreign, row.requests), else_=0)),
        )
        .where(row.began_unix_s >= since_unix_s)
        .group_by(began)
        .order_by(began)
    )
    return [
        Traffic(int(a), int(b), int(c), d, int(e)) for a, b, c, d, e in await _all(store, query)
    ]


async def latency_over_time(
    store: Store, since_unix_s: float, width_s: int
) -> tuple[list[Latency], Latency | None]:
    """How long requests took in intervals of `width_s`, and in all; `None` if there were none."""
    row, began = LatencyRow, _interval(LatencyRow.began_unix_s, width_s)
    query = (
        select(began, row.step, func.sum(row.requests))
        .where(row.began_unix_s >= since_unix_s)
        .group_by(began, row.step)
        .order_by(began, row.step)
    )
    intervals: dict[int, dict[int, int]] = {}
    total: dict[int, int] = {}
    for at, step, count in await _all(store, query):
        intervals.setdefault(int(at), {})[step] = int(count)
        total[step] = total.get(step, 0) + int(count)
    found = [_latency(at, steps) for at, steps in intervals.items()]
    return found, _latency(0, dict(sorted(total.items()))) if total else None


def _latency(began_unix_s: int, steps: dict[int, int]) -> Latency:
    return Latency(began_unix_s, _quantile(steps, 0.5), _quantile(steps, 0.95))


def _quantile(steps: dict[int, int], share: float) -> float:
    """The time within which a share of the requests ended; steps in order."""
    left = share * sum(steps.values())
    for step, count in steps.items():
        left -= count
        if left <= 0:
            return seconds_of(step)
    raise AssertionError("unreachable")


async def traffic_by_candidate(store: Store, since_unix_s: float) -> list[CandidateTraffic]:
    """Requests by the candidate first chosen, most requests first."""
    row = TrafficRow
    requests = func.sum(row.requests)
    query = (
        select(row.model_id, row.tool_id, requests, func.sum(row.errors), func.sum(row.cost_usd))
        .where(row.began_unix_s >= since_unix_s)
        .group_by(row.model_id, row.tool_id)
        .order_by(requests.desc(), row.model_id, row.tool_id)
    )
    return [
        CandidateTraffic(Pair(model_id, tool_id), int(count), int(errors), cost)
        for model_id, tool_id, count, errors, cost in await _all(store, query)
    ]


async def usage_by(store: Store, since_unix_s: float, by: str) -> list[UsageTotals]:
    """What was used since a day began.

    Args:
        store: The store.
        since_unix_s: The beginning of a day, in UTC.
        by: `day`, the newest first; else `owner` or `candidate`, the dearest first.
    """
    row = UsageDayRow
    of: dict[str, list[Any]] = {
        "day": [row.began_unix_s],
        "owner": [row.owner],
        "candidate": [row.model_id, row.tool_id],
    }
    keys, cost = of[by], func.sum(row.cost_usd)
    query = (
        select(
            *keys,
            func.sum(row.requests),
            func.sum(row.errors),
            func.sum(row.prompt_tokens),
            func.sum(row.completion_tokens),
            cost,
        )
        .where(row.began_unix_s >= since_unix_s)
        .group_by(*keys)
        .order_by(*([keys[0].desc()] if by == "day" else [cost.desc(), *keys]))
    )
    found = []
    for *named, requests, errors, prompt, completion, usd in await _all(store, query):
        name = str(Pair(*named)) if by == "candidate" else str(named[0])
        counts = (int(requests), int(errors), int(prompt), int(completion))
        found.append(UsageTotals(name, *counts, usd))
    return found


async def win_rates(store: Store, since_unix_s: float) -> list[WinRate]:
    """Verdicts by the candidate first chosen, most verdicts first."""
    row = VerdictDayRow
    verdicts = func.sum(row.verdicts)
    query = (
        select(row.model_id, row.tool_id, verdicts, func.sum(row.wins), func.sum(row.score))
        .where(row.began_unix_s >= since_unix_s)
        .group_by(row.model_id, row.tool_id)
        .order_by(verdicts.desc(), row.model_id, row.tool_id)
    )
    return [
        WinRate(Pair(model_id, tool_id), int(count), int(wins), score / int(count))
        for model_id, tool_id, count, wins, score in await _all(store, query)
    ]


async def calibration(store: Store, since_unix_s: float) -> list[Calibration]:
    """Verdicts by the confidence of the decision, the least confident first."""
    row = VerdictDayRow
    query = (
        select(func.sum(row.verdicts), func.sum(row.score), func.sum(row.confidence))
        .where(row.began_unix_s >= since_unix_s)
        .group_by(row.tenth)
        .order_by(row.tenth)
    )
    return [
        Calibration(int(count), score / int(count), confidence / int(count))
        for count, score, confidence in await _all(store, query)
    ]


async def profile_by_domain(store: Store) -> list[DomainScore]:
    """What each candidate reached on the profile's questions, by domain, the best first."""
    outcome, question = ProfileOutcomeRow, ProfileQuestionRow
    score = func.avg(outcome.score)
    query = (
        select(
            question.domain,
            outcome.model_id,
            outcome.tool_id,
            func.count(),
            score,
            func.avg(outcome.cost_usd),
        )
        .join(question, question.question_key == outcome.question_key)
        .group_by(question.domain, outcome.model_id, outcome.tool_id)
        .order_by(question.domain, score.desc(), outcome.model_id, outcome.tool_id)
    )
    return [
        DomainScore(domain, Pair(model_id, tool_id), count, mean, cost)
        for domain, model_id, tool_id, count, mean, cost in await _all(store, query)
    ]


async def profile_means(store: Store) -> dict[Pair, ProfileMean]:
    """What each candidate reached on all questions of the profile."""
    row = ProfileOutcomeRow
    means = (func.avg(row.score), func.avg(row.cost_usd))
    query = select(row.model_id, row.tool_id, func.count(), *means).group_by(
        row.model_id, row.tool_id
    )
    return {
        Pair(model_id, tool_id): ProfileMean(count, score, cost)
        for model_id, tool_id, count, score, cost in await _all(store, query)
    }


async def evaluated_versions(store: Store, versions: Sequence[int]) -> list[int]:
    """Which policies were promoted on an evaluation, the newest first."""
    query = (
        select(PolicyRow.policy_version)
        .where(PolicyRow.policy_version.in_(versions), cast(PolicyRow.report, Text) != "null")
        .order_by(PolicyRow.policy_version.desc())
    )
    return [version for (version,) in await _all(store, query)]


async def policy_report(store: Store, policy_version: int) -> dict[str, Any]:
    """The evaluation that a policy was promoted on.

    Raises:
        NotFound: If there is none.
    """
    query = select(PolicyRow.report).where(PolicyRow.policy_version == policy_version)
    rows = await _all(store, query)
    if not rows or not rows[0].report:
        raise NotFound(f"no evaluation of policy {policy_version}", "version")
    report: dict[str, Any] = rows[0].report
    return report


async def policy_changes(store: Store, since_unix_s: float) -> list[tuple[int, float]]:
    """Versions that began to serve since a time, and when; the oldest first."""
    query = (
        select(PolicyRow.policy_version, PolicyRow.created_unix_s)
        .outerjoin(TrialRow, TrialRow.policy_version == PolicyRow.policy_version)
        .where(PolicyRow.created_unix_s >= since_unix_s, TrialRow.mode.is_(None))
        .order_by(PolicyRow.policy_version)
        .limit(100)
    )
    return [(version, at) for version, at in await _all(store, query)]


def _interval(began: Any, width_s: int) -> Any:
    return began - began % width_s


async def _all(store: Store, query: Select[*tuple[Any, ...]]) -> Sequence[Any]:
    async with store.begin() as connection:
        return (await connection.execute(query)).all()
