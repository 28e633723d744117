"""Limits of API keys over several gateways: what fits is answered, and never more is spent."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from serve_app.gateway import purses
from serve_app.store import draw_lease, remove_limits, revoke_key, set_limit
from tests.money_fakes import PANEL, Bank, bank


def sqlite(folder: Path) -> str:
    return f"sqlite+aiosqlite:///{folder / 'atlas.db'}"


async def test_five_requests_at_once_never_spend_more_than_the_key_may(
    tmp_path: Path, store_url: str
) -> None:
    """The test of BerriAI/litellm#40002: a key of 0.45 USD, and 0.15 USD a request."""
    async with bank(tmp_path, store_url, gateways=4) as money:
        key_id, key = await money.key()
        await set_limit(money.store, key_id, "day", {"usd": 0.45})
        money.engines.pause.clear()
        asked = [
            asyncio.create_task(money.ask(key, number % 4, max_tokens=299_800))
            for number in range(5)
        ]
        while len(done := [task for task in asked if task.done()]) < 2:
            await asyncio.sleep(0.01)
        assert {task.result().status_code for task in done} == {429}
        money.engines.pause.set()
        statuses = sorted([(await task).status_code for task in asked])
        assert statuses == [200, 200, 200, 429, 429]
        await money.until_given_back(key_id)
        window, (usd, tokens, count) = await money.window(key_id), await money.written(key_id)
        assert usd == pytest.approx(3 * 299_810 * 0.5e-6)
        assert (window.spent_usd, window.spent_tokens, window.spent_requests) == pytest.approx(
            (usd, tokens, count)
        )
        assert (count, window.leased_usd) == (5, pytest.approx(0, abs=1e-9))
        assert money.engines.tokens * 0.5e-6 <= 0.45


async def equals(money: Bank, key_id: str) -> Any:
    """The window of a key, which has all its requests in it and nothing else."""
    await money.until_given_back(key_id)
    window, (usd, tokens, count) = await money.window(key_id), await money.written(key_id)
    assert window.spent_usd == pytest.approx(usd)
    assert (window.spent_tokens, window.spent_requests) == (tokens, count)
    assert (window.leased_usd, window.leased_tokens) == pytest.approx((0, 0), abs=1e-9)
    return window


async def test_a_pattern_is_paid_from_the_limit_call_by_call(
    tmp_path: Path, store_url: str
) -> None:
    async with bank(tmp_path, store_url, patterns=[PANEL]) as money:
        key_id, key = await money.key()
        await set_limit(money.store, key_id, "day", {"tokens": 20_000})
        whole = await money.ask(key, model="pattern:panel")
        assert (whole.status_code, whole.json()["atlas"]["stop"]) == (200, "answered")
        cut_short = await money.ask(key, model="pattern:panel")
        assert (cut_short.status_code, cut_short.json()["atlas"]["stopped_by"]) == (200, "tokens")
        window = await equals(money, key_id)
        assert money.engines.tokens == window.spent_tokens <= 20_000


async def test_a_spent_key_is_told_when_its_limit_begins_anew(tmp_path: Path) -> None:
    async with bank(tmp_path, sqlite(tmp_path)) as money:
        key_id, key = await money.key()
        await set_limit(money.store, key_id, "hour", {"requests": 1})
        assert (await money.ask(key, max_tokens=10)).status_code == 200
        refused = await money.ask(key, max_tokens=10)
        error = refused.json()["error"]
        assert (refused.status_code, error["type"], error["code"]) == (
            429,
            "insufficient_quota",
            "insufficient_quota",
        )
        resets_s = (await money.usage(key, "hour"))["resets_unix_s"]
        assert abs(time.time() + int(refused.headers["retry-after"]) - resets_s) < 60
        assert "the limit begins anew at 2" in error["message"]


async def test_a_dearer_request_is_refused_where_a_cheaper_one_fits(tmp_path: Path) -> None:
    async with bank(tmp_path, sqlite(tmp_path)) as money:
        key_id, key = await money.key()
        await set_limit(money.store, key_id, "day", {"usd": 0.1})
        assert (await money.ask(key, max_tokens=250_000)).status_code == 429
        assert (await money.ask(key, max_tokens=100_000)).status_code == 200
        assert (await money.ask(key, max_tokens=150_000)).status_code == 429
        assert (await money.ask(key, max_tokens=90_000)).status_code == 200
        assert (await equals(money, key_id)).spent_usd <= 0.1


async def test_the_store_is_not_asked_while_a_lease_is_in_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = []

    async def counted(*arguments: Any) -> Any:
        draws.append(arguments)
        return await draw_lease(*arguments)

    monkeypatch.setattr(purses, "draw_lease", counted)
    async with bank(tmp_path, sqlite(tmp_path)) as money:
        key_id, key = await money.key()
        await set_limit(money.store, key_id, "day", {"usd": 1.0})
        for _ in range(40):
            assert (await money.ask(key, max_tokens=100)).status_code == 200
        assert len(draws) <= 2  # one looks, one draws
        await equals(money, key_id)


async def test_a_key_without_limits_has_no_purse(tmp_path: Path) -> None:
    async with bank(tmp_path, sqlite(tmp_path)) as money:
        _, key = await money.key()
        assert (await money.ask(key, max_tokens=100)).status_code == 200
        assert money.gateways[0].purses._opened == []
        day = await money.usage(key)
        assert (day["spent"], day["limit"]["usd"]) == (
            {"usd": pytest.approx(110 * 0.5e-6), "tokens": 110, "requests": 1},
            None,
        )


async def test_the_owner_sees_what_is_spent_held_and_allowed(tmp_path: Path) -> None:
    async with bank(tmp_path, sqlite(tmp_path)) as money:
        key_id, key = await money.key()
        _, other = await money.key("another team")
        await set_limit(money.store, key_id, "day", {"usd": 1.0, "tokens": 1_000_000})
        await money.ask(key, max_tokens=20_000)
        day = await money.usage(key)
        assert day["spent"] == {"usd": pytest.approx(0.010005), "tokens": 20_010, "requests": 1}
        assert day["limit"] == {"usd": 1.0, "tokens": 1_000_000, "requests": None}
        assert 0 < day["held"]["usd"] < 0.02
        assert (await money.usage(other))["spent"] == {"usd": 0.0, "tokens": 0, "requests": 0}


async def test_a_limit_below_what_is_spent_refuses_from_then_on(tmp_path: Path) -> None:
    async with bank(tmp_path, sqlite(tmp_path)) as money:
        key_id, key = await money.key()
        assert (await money.ask(key, max_tokens=20_000)).status_code == 200
        await set_limit(money.store, key_id, "day", {"usd": 0.005})
        async with asyncio.timeout(60):
            while (await money.ask(key, max_tokens=10)).status_code != 429:
                await asyncio.sleep(0.2)  # gateways look at a key every few seconds
        await remove_limits(money.store, key_id)
        async with asyncio.timeout(60):
            while (await money.ask(key, max_tokens=10)).status_code != 200:
                await asyncio.sleep(0.2)


async def test_a_stream_that_its_client_leaves_is_paid_for(tmp_path: Path) -> None:
    async with bank(tmp_path, sqlite(tmp_path)) as money:
        key_id, key = await money.key()
        await set_limit(money.store, key_id, "day", {"usd": 1.0})
        money.engines.stalls = True
        async with money.streaming(key, max_tokens=100) as lines:
            while "so " not in await anext(lines):
                pass
        window = await equals(money, key_id)
        assert (window.spent_requests, window.spent_usd > 0) == (1, True)


async def test_a_whole_answer_that_its_caller_leaves_is_paid_for_by_the_most_it_may_use(
    tmp_path: Path,
) -> None:
    async with bank(tmp_path, sqlite(tmp_path)) as money:
        key_id, key = await money.key()
        await set_limit(money.store, key_id, "day", {"usd": 1.0})
        money.engines.pause.clear()
        asked = asyncio.create_task(money.ask(key, max_tokens=1000))
        async with asyncio.timeout(60):
            while not money.engines.bodies:
                await asyncio.sleep(0.01)
        asked.cancel()
        await asyncio.wait([asked])
        window = await equals(money, key_id)
        assert 1000 < window.spent_tokens < 1100


async def test_a_key_revoked_while_it_streams_is_charged_to_the_end(tmp_path: Path) -> None:
    async with bank(tmp_path, sqlite(tmp_path)) as money:
        key_id, key = await money.key()
        await set_limit(money.store, key_id, "day", {"usd": 1.0})
        money.engines.pause.clear()
        async with asyncio.TaskGroup() as group:
            answer = group.create_task(money.ask(key, stream=True, max_tokens=1000))
            async with asyncio.timeout(60):
                while not money.engines.bodies:
                    await asyncio.sleep(0.01)
            await revoke_key(money.store, key_id)
            money.engines.pause.set()
        assert answer.result().text.rstrip().endswith("data: [DONE]")
        assert (await equals(money, key_id)).spent_tokens == 1010


async def test_what_a_killed_gateway_held_is_free_when_its_lease_expires(
    tmp_path: Path, store_url: str
) -> None:
    async with bank(tmp_path, store_url, gateways=2) as money:
        key_id, key = await money.key()
        await set_limit(money.store, key_id, "day", {"tokens": 100_000})
        assert (await money.ask(key, max_tokens=1_000)).status_code == 200
        money.engines.pause.clear()
        lost = asyncio.create_task(money.ask(key, max_tokens=60_000))
        async with asyncio.timeout(60):
            while money.engines.tokens < 60_000:
                await asyncio.sleep(0.01)
        await money.gateways[0].kill()
        await asyncio.wait([lost])
        lost.exception()
        money.engines.pause.set()
        async with asyncio.timeout(60):
            # What was killed may have held the store: it answers again within seconds.
            while (status := (await money.ask(key, 1, max_tokens=60_000)).status_code) == 503:
                await asyncio.sleep(0.1)
        assert status == 429
        await money.expire(key_id)
        async with asyncio.timeout(60):
            while (await money.ask(key, 1, max_tokens=60_000)).status_code != 200:
                await asyncio.sleep(0.1)  # the store is not asked at once again
        async with asyncio.timeout(60):
            while (await money.written(key_id))[1] != 61_020:  # the lost request told nobody
                await asyncio.sleep(0.1)  # what the dead one's journal has comes within seconds
        await equals(money, key_id)


@pytest.mark.parametrize("seed", [1, 2])
async def test_nothing_is_overspent_or_lost_whatever_happens(
    tmp_path: Path, store_url: str, seed: int
) -> None:
    """Four gateways, streams, patterns, callers that leave, and two gateways that are killed."""
    chance = random.Random(seed)
    async with bank(tmp_path, store_url, gateways=4, patterns=[PANEL]) as money:
        money.engines.share, money.engines.random = None, random.Random(seed)
        key_id, key = await money.key()
        await set_limit(money.store, key_id, "day", {"usd": 0.3})
        alive = [0, 1, 2, 3]

        async def one() -> None:
            await asyncio.sleep(chance.random() * 2)
            body: dict[str, Any] = {"max_tokens": chance.choice((500, 5_000, 50_000, 120_000))}
            if chance.random() < 0.3:
                body["model"] = "pattern:panel"
            if chance.random() < 0.4:
                body["stream"] = True
            patience_s = 0.05 if chance.random() < 0.2 else 60
            with contextlib.suppress(httpx2.HTTPError, TimeoutError):
                async with asyncio.timeout(patience_s):
                    response = await money.ask(key, chance.choice(alive), **body)
                assert response.status_code in (200, 429), response.text

        async def killer() -> None:
            for _ in range(2):
                await asyncio.sleep(0.3 + chance.random())
                dies = alive.pop(chance.randrange(len(alive)))
                await money.gateways[dies].kill()

        await asyncio.gather(killer(), *(one() for _ in range(60)))
        assert money.engines.tokens * 0.5e-6 <= 0.3  # what engines did, heard of or not
        await money.until_given_back_by_the_living(key_id)
        await money.expire(key_id)
        await money.ask(key, alive[0], max_tokens=1)  # collects what the dead ones held
        assert (await equals(money, key_id)).spent_usd <= 0.3
