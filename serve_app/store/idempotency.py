"""Claims on idempotency keys: one request at a time works under a key, and its answer is kept.

Every change of a row names the claim that it rests on, so a gateway that has lost its claim without
knowing changes nothing. What must not happen twice is put on record before it begins, and a key
with such a record is never claimed again before it expires. That holds whatever the clocks of the
gateways say: they decide only how soon the key of a dead gateway is free.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, func, insert, literal, select, true, update
from sqlalchemy.exc import IntegrityError

from serve_app.errors import KeyInFlight, KeyReused, OutcomeUnknown, RateLimited
from serve_app.store.database import Store
from serve_app.store.tables import IdempotencyKeyRow as Row

_TRIES = 4
"""How often a key is looked at that others change in the meantime."""
_RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class Claim:
    """One try of a request with an idempotency key."""

    owner: str
    """The id of an API key, or `LOCAL_OWNER`."""
    key_hash: str
    """SHA-256 of the key, in hex."""
    claim_id: str
    """Of this try alone."""
    request_hash: str
    """SHA-256 of what is asked, in hex."""


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """How a request was answered."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes | None
    """`None`: it was too large to keep."""


@dataclass(frozen=True, slots=True)
class KeyTimes:
    """How long things hold, in seconds from now."""

    lease_s: float
    """A claim that is not renewed."""
    keep_s: float
    """A key with its answer."""


async def claim_key(
    store: Store, claim: Claim, times: KeyTimes, max_keys: int
) -> KeptAnswer | None:
    """Claim a key, if no request with it is answered or under way.

    Args:
        store: Where keys are.
        claim: Who claims which key for what.
        times: How long the claim and the key hold.
        max_keys: Keys that are kept for one owner; a few more where several claim at once.

    Returns:
        The answer of the request that came with the key before; `None`: the key is claimed.

    Raises:
        KeyReused: If that was another request.
        KeyInFlight: If that is under way.
        OutcomeUnknown: If that began an effect, and nobody works on it any more.
        RateLimited: If the owner has as many keys as are kept.
        StoreError: If the store is away. The key may be claimed all the same.
    """
    for _ in range(_TRIES):
        row = await _read(store, claim)
        if row is None:
            if await _insert(store, claim, times, max_keys):
                return None
            continue
        now_s = time.time()
        is_dead = row.status is None and row.lease_until_unix_s <= now_s
        is_over = row.expires_unix_s <= now_s and row.lease_until_unix_s <= now_s
        if is_over or (is_dead and not row.effect_begun):
            if await _take_over(store, claim, times, row):
                return None
            continue
        if row.request_hash != claim.request_hash:
            raise KeyReused(
                "this Idempotency-Key came with another request before; send another key",
                "Idempotency-Key",
            )
        if row.status is not None:
            return KeptAnswer(row.status, tuple((n, v) for n, v in row.headers), row.body)
        if is_dead:
            raise OutcomeUnknown(
                "the request with this Idempotency-Key began something that must not happen twice, "
                "and how it ended is not known; find out, then send another key",
                "Idempotency-Key",
            )
        raise _in_flight(row.lease_until_unix_s - now_s)
    raise _in_flight(_RETRY_AFTER_S)


def _in_flight(seconds: float) -> KeyInFlight:
    return KeyInFlight(
        "the request with this Idempotency-Key is under way; try again later",
        "Idempotency-Key",
        seconds,
    )


async def renew_claim(store: Store, claim: Claim, lease_s: float) -> bool:
    """Hold a claim for longer.

    Returns:
        Whether it was held; `False`: the request has ended, or another gateway took over.

    Raises:
        StoreError: If the store is away.
    """
    return await _change(store, claim, lease_until_unix_s=time.time() + lease_s)


async def begin_effect(store: Store, claim: Claim, lease_s: float) -> bool:
    """Put on record that something begins that must not happen twice.

    Returns:
        Whether the claim was held: only then may it begin.

    Raises:
        StoreError: If the store is away; it must not begin.
    """
    lease_until_unix_s = time.time() + lease_s
    return await _change(store, claim, effect_begun=True, lease_until_unix_s=lease_until_unix_s)


async def keep_answer(store: Store, claim: Claim, answer: KeptAnswer) -> bool:
    """Keep the answer of a request for later tries.

    Returns:
        Whether the claim was held.

    Raises:
        StoreError: If the store is away.
    """
    return await _change(
        store,
        claim,
        status=answer.status,
        headers=[[name, value] for name, value in answer.headers],
        body=answer.body,
        lease_until_unix_s=0.0,
    )


async def give_up_claim(store: Store, claim: Claim, *, has_acted: bool) -> None:
    """End a claim without an answer to keep.

    Args:
        store: Where keys are.
        claim: The claim.
        has_acted: Whether an effect may have happened: then nobody may claim the key again, and
            later tries are told so. Else the key is forgotten.

    Raises:
        StoreError: If the store is away.
    """
    if has_acted:
        await _change(store, claim, lease_until_unix_s=0.0)
        return
    async with store.begin() as connection:
        await connection.execute(delete(Row).where(*_held(claim)))


def _held(claim: Claim) -> tuple[Any, ...]:
    """What is true of a key's row while this claim holds the key."""
    return (
        Row.owner == claim.owner,
        Row.key_hash == claim.key_hash,
        Row.claim_id == claim.claim_id,
        Row.status.is_(None),
        Row.lease_until_unix_s > 0,
    )


async def _change(store: Store, claim: Claim, **values: Any) -> bool:
    async with store.begin() as connection:
        done = await connection.execute(update(Row).where(*_held(claim)).values(**values))
    return done.rowcount == 1


async def _read(store: Store, claim: Claim) -> Any:
    found = select(Row.__table__).where(Row.owner == claim.owner, Row.key_hash == claim.key_hash)
    async with store.begin() as connection:
        return (await connection.execute(found)).first()


def _values(claim: Claim, times: KeyTimes) -> dict[str, Any]:
    """A row's values as a claim begins, beside those of an answer."""
    now_s = time.time()
    return {
        "owner": claim.owner,
        "key_hash": claim.key_hash,
        "claim_id": claim.claim_id,
        "request_hash": claim.request_hash,
        "effect_begun": False,
        "lease_until_unix_s": now_s + times.lease_s,
        "expires_unix_s": now_s + times.keep_s,
    }


async def _insert(store: Store, claim: Claim, times: KeyTimes, max_keys: int) -> bool:
    """Claim a key that nobody has; `False`: somebody has it now.

    Raises:
        RateLimited: If the owner has too many.
    """
    values = _values(claim, times)
    now_s = time.time()
    of_owner = (Row.owner == claim.owner, Row.expires_unix_s > now_s)
    number = select(func.count()).select_from(Row).where(*of_owner).scalar_subquery()
    columns = Row.__table__.c
    wanted = select(*(literal(value, columns[name].type) for name, value in values.items()))
    statement = insert(Row).from_select(list(values), wanted.where(number < max_keys))
    try:
        async with store.begin() as connection:
            if (await connection.execute(statement)).rowcount == 1:
                return True
            oldest_s = await connection.scalar(
                select(func.min(Row.expires_unix_s)).where(*of_owner)
            )
    except IntegrityError:
        return False
    raise RateLimited(
        f"this API key has sent {max_keys} idempotency keys, as many as are kept; send requests "
        "that change nothing without one",
        "Idempotency-Key",
        max(1.0, (oldest_s or 0.0) - now_s),
    )


async def _take_over(store: Store, claim: Claim, times: KeyTimes, row: Any) -> bool:
    """Claim a key that has become free; `False`: it was changed since it was read."""
    is_expired = row.expires_unix_s <= time.time()
    unchanged = (
        Row.owner == claim.owner,
        Row.key_hash == claim.key_hash,
        Row.claim_id == row.claim_id,
        Row.lease_until_unix_s == row.lease_until_unix_s,
        true() if is_expired else Row.effect_begun.is_(False),
    )
    fresh = _values(claim, times) | {"status": None, "headers": None, "body": None}
    async with store.begin() as connection:
        done = await connection.execute(update(Row).where(*unchanged).values(**fresh))
    return done.rowcount == 1
