"""Claims on idempotency keys, on SQLite and PostgreSQL: one request at a time, and never again what
may have happened. A gateway that dies is one whose lease is over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import count

import pytest
from sqlalchemy import select

from serve_app.errors import KeyInFlight, KeyReused, OutcomeUnknown, RateLimited
from serve_app.store import (
    Claim,
    KeptAnswer,
    KeyTimes,
    Store,
    begin_effect,
    claim_key,
    delete_expired_keys,
    give_up_claim,
    keep_answer,
    renew_claim,
)
from serve_app.store.tables import IdempotencyKeyRow

LONG = KeyTimes(lease_s=600, keep_s=3600)
DEAD = KeyTimes(lease_s=0, keep_s=3600)
"""Of a gateway that died just now."""
EXPIRED = KeyTimes(lease_s=0, keep_s=0)
ANSWER = KeptAnswer(200, (("content-type", "application/json"),), b'{"said": "\x00\xff"}')

_numbers = count()


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[Store]:
    opened = await Store.open(store_url)
    yield opened
    await opened.close()


def claim(key: str = "key", owner: str = "ann", asks: str = "this") -> Claim:
    """A try of its own."""
    return Claim(owner, key, f"req_{next(_numbers)}", asks)


async def claimed(
    store: Store, wanted: Claim, times: KeyTimes = LONG, max_keys: int = 100
) -> KeptAnswer | None:
    return await claim_key(store, wanted, times, max_keys)


async def test_a_key_is_claimed_once_and_its_answer_comes_back(store: Store) -> None:
    first = claim()
    assert await claimed(store, first) is None
    with pytest.raises(KeyInFlight) as caught:
        await claimed(store, claim())
    assert 0 < caught.value.retry_after_s <= 600
    assert await keep_answer(store, first, ANSWER)
    assert await claimed(store, claim()) == ANSWER
    assert await claimed(store, claim()) == ANSWER


async def test_an_answer_without_its_body_comes_back_as_such(store: Store) -> None:
    first = claim()
    await claimed(store, first)
    await keep_answer(store, first, replace(ANSWER, body=None))
    assert await claimed(store, claim()) == replace(ANSWER, body=None)


async def test_another_request_cannot_have_the_key(store: Store) -> None:
    first = claim()
    await claimed(store, first)
    with pytest.raises(KeyReused):
        await claimed(store, claim(asks="that"))
    await keep_answer(store, first, ANSWER)
    with pytest.raises(KeyReused):
        await claimed(store, claim(asks="that"))


async def test_keys_of_two_owners_have_nothing_to_do_with_each_other(store: Store) -> None:
    first = claim()
    await claimed(store, first)
    await keep_answer(store, first, ANSWER)
    assert await claimed(store, claim(owner="bob", asks="that")) is None


async def test_the_key_of_a_dead_gateway_is_free_if_nothing_was_begun(store: Store) -> None:
    dead = claim()
    await claimed(store, dead, DEAD)
    assert await claimed(store, claim(asks="that")) is None


async def test_what_a_dead_gateway_had_begun_has_an_unknown_outcome(store: Store) -> None:
    dead = claim()
    await claimed(store, dead, DEAD)
    assert await begin_effect(store, dead, lease_s=0)
    with pytest.raises(OutcomeUnknown):
        await claimed(store, claim())


async def test_who_has_lost_the_key_changes_nothing(store: Store) -> None:
    slow, quick = claim(), claim()
    await claimed(store, slow, DEAD)
    assert await claimed(store, quick) is None
    assert not await begin_effect(store, slow, 600)
    assert not await renew_claim(store, slow, 600)
    assert not await keep_answer(store, slow, replace(ANSWER, status=500))
    await give_up_claim(store, slow, has_acted=False)
    with pytest.raises(KeyInFlight):
        await claimed(store, claim())
    assert await keep_answer(store, quick, ANSWER)
    assert await claimed(store, claim()) == ANSWER


async def test_a_renewed_claim_is_held(store: Store) -> None:
    first = claim()
    await claimed(store, first, DEAD)
    assert await renew_claim(store, first, 600)
    with pytest.raises(KeyInFlight):
        await claimed(store, claim())


async def test_a_claim_that_is_given_up_frees_the_key_unless_it_has_acted(store: Store) -> None:
    idle, acting = claim("idle"), claim("acting")
    await claimed(store, idle)
    await give_up_claim(store, idle, has_acted=False)
    assert await claimed(store, claim("idle")) is None
    await claimed(store, acting)
    await begin_effect(store, acting, 600)
    await give_up_claim(store, acting, has_acted=True)
    with pytest.raises(OutcomeUnknown):
        await claimed(store, claim("acting"))
    # The request is over: what still runs of it begins nothing, and does not wake its claim.
    assert not await begin_effect(store, acting, 600)
    assert not await renew_claim(store, acting, 600)


async def test_an_expired_key_is_new_whatever_it_stood_for(store: Store) -> None:
    answered, unknown = claim("answered"), claim("unknown")
    await claimed(store, answered, EXPIRED)
    await keep_answer(store, answered, ANSWER)
    await claimed(store, unknown, EXPIRED)
    await begin_effect(store, unknown, 0)
    await give_up_claim(store, unknown, has_acted=True)
    for key in ("answered", "unknown"):
        again = claim(key, asks="that")
        assert await claimed(store, again) is None
        assert await keep_answer(store, again, ANSWER)
        assert await claimed(store, claim(key, asks="that")) == ANSWER


async def test_a_key_that_expires_while_its_request_runs_is_held(store: Store) -> None:
    await claimed(store, claim(), KeyTimes(lease_s=600, keep_s=0))
    with pytest.raises(KeyInFlight):
        await claimed(store, claim())


async def test_an_owner_has_so_many_keys_and_others_are_not_concerned(store: Store) -> None:
    await claimed(store, claim("old"), EXPIRED)
    for key in ("one", "two"):
        assert await claimed(store, claim(key), max_keys=2) is None
    with pytest.raises(RateLimited) as caught:
        await claimed(store, claim("three"), max_keys=2)
    assert 3000 < caught.value.retry_after_s <= 3600
    with pytest.raises(KeyInFlight):
        await claimed(store, claim("one"), max_keys=2)
    assert await claimed(store, claim("three", owner="bob"), max_keys=2) is None


@pytest.mark.parametrize("times", [LONG, DEAD], ids=["new", "of the dead"])
async def test_of_twenty_at_two_gateways_one_claims(
    store: Store, store_url: str, times: KeyTimes
) -> None:
    if times is DEAD:
        await claimed(store, claim(), DEAD)
    other = await Store.open(store_url)
    tries = [claimed((store, other)[n % 2], claim()) for n in range(20)]
    results = await asyncio.gather(*tries, return_exceptions=True)
    await other.close()
    assert sorted(map(repr, map(type, results))) == sorted(
        [repr(type(None))] + [repr(KeyInFlight)] * 19
    )


async def test_a_takeover_and_an_effect_exclude_each_other(store: Store, store_url: str) -> None:
    other = await Store.open(store_url)
    for number in range(10):
        slow = claim(f"key {number}")
        await claimed(store, slow, DEAD)
        began, took = await asyncio.gather(
            begin_effect(store, slow, 600),
            claimed(other, claim(f"key {number}")),
            return_exceptions=True,
        )
        assert began is not (took is None)
    await other.close()


async def test_keys_that_have_expired_are_deleted_and_those_in_use_stay(store: Store) -> None:
    for number in range(3):
        await claimed(store, claim(f"expired {number}"), EXPIRED)
    await claimed(store, claim("in use"), KeyTimes(lease_s=600, keep_s=0))
    await claimed(store, claim("kept"), DEAD)
    assert await delete_expired_keys(store) == 3
    async with store.begin() as connection:
        left = await connection.scalars(select(IdempotencyKeyRow.key_hash))
        assert set(left) == {"in use", "kept"}
