"""Verdicts on finished requests, by their owners, and what they say of the policies."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, func, insert, or_, select
from sqlalchemy.exc import IntegrityError

from serve_app.errors import Conflict, NotFound
from serve_app.schemas import BY_RULE, LOCAL_OWNER, Action, DecidedBy, Pair, Seen
from serve_app.signals import numbers_kept
from serve_app.store.database import Store
from serve_app.store.rows import storable_text
from serve_app.store.sums import add_verdict
from serve_app.store.tables import FeedbackRow, OutcomeRow, RequestRow, ShadowRow, TrajectoryRow

_IDS_AT_ONCE = 500
"""Ids in one query; databases bound the number of parameters."""
_SCANNED_PER_ROW = 10
"""Verdicts looked through for each one returned, at most, where one key gave most of them."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A score for an answered request that the router decided."""

    request_id: str
    owner: str
    """Who asked, and gave the score: the id of an API key, or `LOCAL_OWNER`."""
    pair: Pair
    """The pair that gave the answer."""
    query: str
    embedding: bytes
    """(dim,) float32 little-endian."""
    score: float
    created_unix_s: float
    propensity: float | None
    """Probability with which the router chose the pair for the query; `None` where it did not
    choose that alone: a fallback, a rule's choice, or a request of path 2 (see
    `rated_trajectories`)."""


@dataclass(frozen=True, slots=True)
class RatedAnswer:
    """What a user has just rated."""

    pair: Pair
    """The candidate that was chosen first."""
    unembedded: str | None
    """The query, where the verdict teaches nothing before the query is embedded."""


@dataclass(frozen=True, slots=True)
class RatedRequest:
    """What a user's verdict says of the policy that served the request."""

    score: float
    """In [0, 1]."""
    alpha: float
    """The cost-quality dial it ran with."""
    cost_usd: float
    """Of all its steps."""
    owner: str
    """Who asked, and gave the score."""


@dataclass(frozen=True, slots=True)
class RatedDecision:
    """One decision of a request of path 2, and what its step showed."""

    action: Action
    pair: Pair | None
    """`None` but for `route`."""
    path: DecidedBy
    propensity: float
    """In (0, 1]."""
    can_think: bool
    """Whether there was a planner."""
    seconds_left: float
    """Before the request's deadline."""
    seen: Seen | None
    """`None` after `answer`."""
    answer: bytes | None
    """(dim,) float32 little-endian embedding of the step's answer, where it was embedded."""


@dataclass(frozen=True, slots=True)
class RatedTrajectory:
    """A rated request of path 2, with all that it takes to decide it anew."""

    request_id: str
    embedding: bytes
    """(dim,) float32 little-endian, of the query."""
    score: float
    """In [0, 1], of the answer that was returned."""
    alpha: float
    """The cost-quality dial it ran with."""
    max_steps: int
    max_cost_usd: float | None
    pairs: tuple[Pair, ...]
    """Those that the first decision could choose from."""
    decisions: tuple[RatedDecision, ...]


async def add_feedback(
    store: Store, request_id: str, owner: str, score: float, comment: str | None = None
) -> RatedAnswer:
    """Keep a score for a request.

    Args:
        store: Where it is kept.
        request_id: The request's id, as its response said.
        owner: Who says so; must be who asked.
        score: In [0, 1].
        comment: Free text.

    Raises:
        NotFound: If there is no such request of this owner; whether another has it is not told.
        Conflict: If the request has its score.
        StoreError: If the store is away.
    """
    try:
        async with store.begin() as connection:
            rated = select(
                RequestRow.model_id,
                RequestRow.tool_id,
                RequestRow.confidence,
                RequestRow.policy_version,
                RequestRow.cluster,
                RequestRow.query,
                RequestRow.path,
                RequestRow.error,
                RequestRow.embedding.is_(None).label("is_unembedded"),
            ).where(RequestRow.request_id == request_id, RequestRow.owner == owner)
            request = (await connection.execute(rated)).one_or_none()
            now_s = time.time()
            if request is None:
                raise NotFound(f"no request {request_id!r}", "request_id")
            shadowed = select(ShadowRow.__table__).where(ShadowRow.request_id == request_id)
            shadow = (await connection.execute(shadowed)).one_or_none()
            await connection.execute(
                insert(FeedbackRow).values(
                    request_id=request_id,
                    owner=owner,
                    score=score,
                    comment=None if comment is None else storable_text(comment),
                    created_unix_s=now_s,
                )
            )
            await add_verdict(
                connection,
                request._asdict(),
                None if shadow is None else shadow._asdict(),
                score=score,
                at_unix_s=now_s,
            )
    except IntegrityError as error:
        raise Conflict(f"request {request_id!r} has its feedback already", "request_id") from error
    teaches = request.error is None and request.path != DecidedBy.PINNED
    return RatedAnswer(
        Pair(request.model_id, request.tool_id),
        (request.query or None) if request.is_unembedded and teaches else None,
    )


async def verdict_ids(
    store: Store, since_unix_s: float, limit: int, *, per_key: int | None = None
) -> list[str]:
    """Ids of the last `limit` requests with a verdict since a point in time, oldest first.

    Args:
        store: Where they are.
        since_unix_s: Earlier verdicts are left out.
        limit: The most that are returned.
        per_key: Of the verdicts of one API key on one pair only so many, the last ones, so that no
            key crowds out the others; `None`: all of them.

    Raises:
        StoreError: If the store is away.
    """
    rated = _verdicts(
        FeedbackRow.request_id,
        FeedbackRow.owner,
        FeedbackRow.created_unix_s,
        OutcomeRow.model_id,
        OutcomeRow.tool_id,
    ).where(FeedbackRow.created_unix_s >= since_unix_s)
    newest = await _newest(store, rated, limit, per_key, ("owner", "model_id", "tool_id"))
    return [row.request_id for row in newest]


async def read_verdicts(store: Store, request_ids: Sequence[str]) -> list[Verdict]:
    """The verdicts on some requests, oldest first.

    A request that was not answered, or whose embedding is not written yet, is left out. So is one
    whose caller named the pair: the verdict is about the caller's choice, not the router's.

    Raises:
        StoreError: If the store is away.
    """
    verdicts: list[Verdict] = []
    for start in range(0, len(request_ids), _IDS_AT_ONCE):
        query = _verdicts(
            FeedbackRow.request_id,
            FeedbackRow.owner,
            OutcomeRow.model_id,
            OutcomeRow.tool_id,
            RequestRow.query,
            RequestRow.embedding,
            FeedbackRow.score,
            FeedbackRow.created_unix_s,
            OutcomeRow.path,
            OutcomeRow.propensity,
            OutcomeRow.step_index,
            TrajectoryRow.decisions,
        ).where(FeedbackRow.request_id.in_(request_ids[start : start + _IDS_AT_ONCE]))
        async with store.begin() as connection:
            rows = (await connection.execute(query)).all()
        verdicts += [
            Verdict(
                request_id=row.request_id,
                owner=row.owner,
                pair=Pair(row.model_id, row.tool_id),
                query=row.query,
                embedding=row.embedding or b"",
                score=row.score,
                created_unix_s=row.created_unix_s,
                propensity=None if _was_not_chosen(row) else row.propensity,
            )
            for row in rows
        ]
    return sorted(verdicts, key=lambda verdict: (verdict.created_unix_s, verdict.request_id))


def _verdicts(*columns: Any) -> Select[*tuple[Any, ...]]:
    """Every verdict that says something of the router's choice, with the pair that answered."""
    return (
        select(*columns)
        .select_from(FeedbackRow)
        .join(RequestRow, RequestRow.request_id == FeedbackRow.request_id)
        .join(OutcomeRow, OutcomeRow.request_id == FeedbackRow.request_id)
        .outerjoin(TrajectoryRow, TrajectoryRow.request_id == FeedbackRow.request_id)
        .where(
            RequestRow.path != str(DecidedBy.PINNED),
            RequestRow.embedding.is_not(None),
            OutcomeRow.error.is_(None),
            # Of several steps, the one whose answer the user saw.
            or_(
                TrajectoryRow.request_id.is_(None),
                TrajectoryRow.answer_step == OutcomeRow.step_index,
            ),
        )
    )


async def rated_requests(
    store: Store,
    policy_version: int,
    since_unix_s: float,
    limit: int,
    *,
    per_key: int | None = None,
) -> list[RatedRequest]:
    """The last `limit` rated requests that a policy decided, in the order of their verdicts.

    Args:
        store: Where they are.
        policy_version: Of the policy.
        since_unix_s: Requests that ended before this are left out.
        limit: The most that are read.
        per_key: Of the verdicts of one API key only so many, the last ones; `None`: all of them.

    Raises:
        StoreError: If the store is away.
    """
    query = (
        select(
            FeedbackRow.request_id,
            FeedbackRow.created_unix_s,
            FeedbackRow.score,
            FeedbackRow.owner,
            RequestRow.alpha,
            RequestRow.cost_usd,
        )
        .join(RequestRow, RequestRow.request_id == FeedbackRow.request_id)
        .where(
            RequestRow.policy_version == policy_version,
            RequestRow.path.not_in(
                [str(path) for path in (DecidedBy.PINNED, DecidedBy.SESSION, *BY_RULE)]
            ),
            RequestRow.created_unix_s >= since_unix_s,
        )
    )
    rows = await _newest(store, query, limit, per_key, ("owner",))
    return [RatedRequest(row.score, row.alpha or 0.0, row.cost_usd, row.owner) for row in rows]


async def _newest(
    store: Store,
    query: Select[*tuple[Any, ...]],
    limit: int,
    per_key: int | None,
    apart: tuple[str, ...],
) -> list[Any]:
    """The last rows of a query, oldest first.

    Args:
        store: Where they are.
        query: Selects `request_id`, `created_unix_s` and `owner` of verdicts, among others.
        limit: Rows at most.
        per_key: Rows at most among those that are alike in the columns `apart`, but for those of
            `LOCAL_OWNER`; `None`: no such bound.
        apart: Names of columns.
    """
    newest_first = FeedbackRow.created_unix_s.desc(), FeedbackRow.request_id.desc()
    if per_key is None:
        last = query.order_by(*newest_first).limit(limit)
    else:
        # Bounded before it is sorted by owner, as the whole table may be long.
        rows = query.order_by(*newest_first).limit(_SCANNED_PER_ROW * limit).subquery().c
        order = rows.created_unix_s.desc(), rows.request_id.desc()
        rank = func.row_number().over(partition_by=[rows[name] for name in apart], order_by=order)
        ranked = select(*rows, rank.label("rank")).subquery().c
        last = (
            select(*ranked)
            .where(or_(ranked.owner == LOCAL_OWNER, ranked.rank <= per_key))
            .order_by(ranked.created_unix_s.desc(), ranked.request_id.desc())
            .limit(limit)
        )
    async with store.begin() as connection:
        return list(reversed((await connection.execute(last)).all()))


async def rated_trajectories(store: Store, limit: int) -> list[RatedTrajectory]:
    """The last `limit` rated requests of path 2, in the order of their verdicts.

    Those of a version that did not keep what it takes to decide them anew are left out.

    Raises:
        StoreError: If the store is away.
    """
    query = (
        select(FeedbackRow.score, RequestRow.embedding, RequestRow.alpha, TrajectoryRow.__table__)
        .join(RequestRow, RequestRow.request_id == FeedbackRow.request_id)
        .join(TrajectoryRow, TrajectoryRow.request_id == FeedbackRow.request_id)
        .where(TrajectoryRow.max_steps.is_not(None), RequestRow.embedding.is_not(None))
        .order_by(FeedbackRow.created_unix_s.desc(), FeedbackRow.request_id.desc())
        .limit(limit)
    )
    async with store.begin() as connection:
        rows = list(reversed((await connection.execute(query)).all()))
    steps: dict[str, list[Any]] = {row.request_id: [] for row in rows}
    ids = list(steps)
    for start in range(0, len(ids), _IDS_AT_ONCE):
        ran = (
            select(OutcomeRow.__table__)
            .where(OutcomeRow.request_id.in_(ids[start : start + _IDS_AT_ONCE]))
            .order_by(OutcomeRow.request_id, OutcomeRow.step_index)
        )
        async with store.begin() as connection:
            for row in (await connection.execute(ran)).all():
                steps[row.request_id].append(row)
    return [_rated(row, steps[row.request_id]) for row in rows]


def _rated(row: Any, steps: Sequence[Any]) -> RatedTrajectory:
    """One request as a trajectory; the n-th decision to run something is about step n."""
    size = len(row.embedding)
    decisions = []
    for number, made in enumerate(row.decisions):
        action = Action(made["action"])
        seen, answer = None, None
        if action is not Action.ANSWER and number < len(steps):
            step, key = steps[number], row.answer_keys[number]
            seen = Seen(
                pair=Pair.parse(made["pair"]) if action is Action.ROUTE else None,
                answer_key=None if key is None else str(key),
                mean_logprob=step.mean_logprob,
                tool_errors=sum(not call["ok"] for call in step.tool_calls),
                cost_usd=step.cost_usd,
                signals=numbers_kept(step.signals),
            )
            vector = row.answer_embeddings[number * size : (number + 1) * size]
            answer = vector if any(vector) else None
        decisions.append(
            RatedDecision(
                action=action,
                pair=Pair.parse(made["pair"]) if action is Action.ROUTE else None,
                path=DecidedBy(made["path"]),
                propensity=made["propensity"],
                can_think=made["can_think"],
                seconds_left=made["seconds_left"],
                seen=seen,
                answer=answer,
            )
        )
    return RatedTrajectory(
        request_id=row.request_id,
        embedding=row.embedding,
        score=row.score,
        alpha=row.alpha or 0.0,
        max_steps=row.max_steps,
        max_cost_usd=row.max_cost_usd,
        pairs=tuple(map(Pair.parse, row.pairs)),
        decisions=tuple(decisions),
    )


def _was_not_chosen(row: Any) -> bool:
    by_another = row.path == DecidedBy.FALLBACK or row.path in BY_RULE
    return by_another or row.step_index > 0 or row.decisions is not None
