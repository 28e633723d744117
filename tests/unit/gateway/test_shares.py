"""What one API key may take of a gateway: places, requests a minute, lookups, memory for bodies."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx2
import pytest

from serve_app.config import LimitsConfig
from serve_app.errors import RateLimited, Unauthorized
from serve_app.gateway.edge.auth import Authenticator
from serve_app.gateway.edge.rate import RateLimiter
from serve_app.gateway.edge.shares import Shares
from serve_app.store import ApiKey, Scope, Store, create_key, find_key
from tests.gateway_fakes import Loopback, eventually, read_all, running_gateway

HEAD = (
    "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    "authorization: Bearer {key}\r\ncontent-length: {length}\r\n\r\n"
)


def key_of(gateway: Loopback, *scopes: str) -> str:
    return gateway.run(lambda: create_key(gateway.store, "a team", scopes or ("chat",)))[1]


def chat(gateway: Loopback, key: str, text: str = "hi") -> httpx2.Response:
    body = {"model": "atlas", "messages": [{"role": "user", "content": text}]}
    headers = {"authorization": f"Bearer {key}"}
    url = gateway.url + "/v1/chat/completions"
    return httpx2.post(url, json=body, headers=headers, timeout=20)


def hanging(gateway: Loopback, key: str) -> socket.socket:
    """A request that is being worked on until its connection is closed."""
    arrived = len(gateway.orchestrator.calls)
    body = json.dumps({"model": "atlas", "messages": [{"role": "user", "content": "!hang"}]})
    connection = socket.create_connection(("127.0.0.1", gateway.port), timeout=20)
    connection.sendall((HEAD.format(key=key, length=len(body)) + body).encode())
    assert eventually(lambda: len(gateway.orchestrator.calls) == arrived + 1, 20)
    return connection


@contextmanager
def locked(folder: Path, **limits: float) -> Iterator[Loopback]:
    with running_gateway(folder, auth={"mode": "required"}, limits=limits) as loopback:
        yield loopback


# Places.


def test_a_key_that_is_alone_may_take_every_place() -> None:
    shares = Shares()
    for _ in range(8):
        shares.enter("a", 8)


def test_a_key_keeps_a_quarter_of_the_places_free_while_another_calls() -> None:
    now_s = 0.0
    shares = Shares(clock=lambda: now_s)
    shares.enter("b", 8)
    for _ in range(6):
        shares.enter("a", 8)
    with pytest.raises(RateLimited, match="6 requests of this API key"):
        shares.enter("a", 8)
    shares.enter("b", 8)
    now_s = 61.0
    shares.enter("a", 8)


def test_a_key_that_held_every_place_gives_way_when_another_comes() -> None:
    shares = Shares()
    for _ in range(8):
        shares.enter("a", 8)
    shares.enter("b", 8)  # the gateway's own bound may refuse it now, and still it is heard
    shares.leave("b")
    for _ in range(3):
        with pytest.raises(RateLimited):
            shares.enter("a", 8)
        shares.leave("a")
    shares.enter("a", 8)


def test_one_place_can_be_taken_by_whoever_comes() -> None:
    shares = Shares()
    shares.enter("a", 1)
    shares.leave("a")
    shares.enter("b", 1)
    shares.leave("b")


def test_a_configured_bound_holds_for_a_key_that_is_alone() -> None:
    shares = Shares(max_per_key=2)
    shares.enter("a", 8)
    shares.enter("a", 8)
    with pytest.raises(RateLimited):
        shares.enter("a", 8)
    shares.leave("a")
    shares.enter("a", 8)


def test_many_keys_take_bounded_memory() -> None:
    shares = Shares(max_per_key=1)
    for index in range(1000):
        shares.enter(str(index), 8)
        with pytest.raises(RateLimited):
            shares.enter(str(index), 8)
        shares.leave(str(index))
    assert len(shares._ongoing) == 0
    assert len(shares._callers) == 2


@pytest.mark.parametrize("adapts", [False, True])
def test_one_key_does_not_keep_another_out(tmp_path: Path, adapts: bool) -> None:
    places = {"max_ongoing_requests": 4, "initial_ongoing_requests": 4, "min_ongoing_requests": 4}
    with locked(tmp_path, **places, adapt_to_load=adapts) as gateway, ExitStack() as connections:
        greedy, modest = key_of(gateway), key_of(gateway)
        assert chat(gateway, modest).status_code == 200
        for _ in range(3):
            connections.enter_context(hanging(gateway, greedy))
        refused = chat(gateway, greedy)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert "as many as one key may have" in refused.json()["error"]["message"]
        assert chat(gateway, modest).status_code == 200


def test_a_configured_bound_of_a_key_is_a_429_and_leaves_probes_and_admins_alone(
    tmp_path: Path,
) -> None:
    with locked(tmp_path, ongoing_requests_per_key=1) as gateway:
        key = key_of(gateway, "chat", "admin")
        headers = {"authorization": f"Bearer {key}"}
        with hanging(gateway, key):
            assert chat(gateway, key).status_code == 429
            assert httpx2.get(gateway.url + "/healthz").status_code == 200
            jobs = httpx2.get(gateway.url + "/v1/admin/jobs", headers=headers)
            assert jobs.status_code == 200
        assert eventually(lambda: chat(gateway, key).status_code == 200)


# Requests a minute.


def test_requests_a_minute_are_counted_by_key_and_only_chats_and_decisions(
    tmp_path: Path,
) -> None:
    with locked(tmp_path, requests_per_minute_per_key=0.2) as gateway:
        key, other = key_of(gateway), key_of(gateway)
        assert chat(gateway, key).status_code == 200
        refused = chat(gateway, key)
        assert refused.status_code == 429
        assert 200 < int(refused.headers["retry-after"]) <= 300
        headers = {"authorization": f"Bearer {key}"}
        assert httpx2.get(gateway.url + "/v1/models", headers=headers).status_code == 200
        assert chat(gateway, other).status_code == 200


def test_a_limiter_says_when_there_is_room_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr("serve_app.gateway.edge.rate.time.monotonic", lambda: now_s)
    limiter = RateLimiter(6)
    limiter.take("a")
    now_s = 4.0
    with pytest.raises(RateLimited) as caught:
        limiter.take("a")
    assert caught.value.retry_after_s == pytest.approx(6.0)
    now_s = 10.1
    limiter.take("a")


# Unknown keys.


class SlowStore:
    """Answers a lookup of an unknown key only when it is told to; known keys at once."""

    def __init__(self) -> None:
        self.lookups = 0
        self.most_at_once = 0
        self.released = asyncio.Event()
        self._known: set[str] = set()
        self._asking = 0

    async def find_key(self, store: Store, key_hash: str) -> ApiKey | None:
        known = await find_key(store, key_hash)
        if known is not None:
            return known
        self.lookups += 1
        self._asking += 1
        self.most_at_once = max(self.most_at_once, self._asking)
        try:
            await self.released.wait()
        finally:
            self._asking -= 1
        return None


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> SlowStore:
    slow = SlowStore()
    monkeypatch.setattr("serve_app.gateway.edge.auth.find_key", slow.find_key)
    return slow


def random_key(number: int) -> bytes:
    return b"Bearer atlas_" + b"%043d" % number


async def test_a_flood_of_unknown_keys_asks_the_store_for_two_at_once(
    slow: SlowStore, tmp_path: Path
) -> None:
    store = await Store.open(f"sqlite+aiosqlite:///{tmp_path / 'atlas.db'}")
    now_s = 0.0
    authenticator = Authenticator("required", store, clock=lambda: now_s)
    key_id, key = await create_key(store, "ann", ["chat"])
    known = f"Bearer {key}".encode()
    assert (await authenticator.caller(known, Scope.CHAT)).key_id == key_id
    flood = [
        asyncio.create_task(authenticator.caller(random_key(number), Scope.ADMIN))
        for number in range(500)
    ]
    while slow.lookups < 2 or sum(task.done() for task in flood) < 500 - 2 - 64:
        await asyncio.sleep(0.01)
    now_s = 4.0  # what is remembered of the known key is too old: the store is asked again
    assert (await authenticator.caller(known, Scope.CHAT)).key_id == key_id
    assert slow.most_at_once == 2
    slow.released.set()
    results = await asyncio.gather(*flood, return_exceptions=True)
    kinds = [type(result) for result in results]
    assert kinds.count(RateLimited) == 500 - 2 - 64
    assert kinds.count(Unauthorized) == 2 + 64
    assert slow.most_at_once == 2
    await store.close()


async def test_a_key_that_is_looked_up_by_many_is_asked_for_by_few(
    slow: SlowStore, tmp_path: Path
) -> None:
    store = await Store.open(f"sqlite+aiosqlite:///{tmp_path / 'atlas.db'}")
    authenticator = Authenticator("required", store)
    slow.released.set()
    calls = [authenticator.caller(random_key(1), Scope.CHAT) for _ in range(60)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(result) for result in results} == {Unauthorized}
    assert slow.lookups <= 2
    await store.close()


async def test_a_turn_that_does_not_come_in_time_is_a_429(
    slow: SlowStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await Store.open(f"sqlite+aiosqlite:///{tmp_path / 'atlas.db'}")
    authenticator = Authenticator("required", store)
    first = [
        asyncio.create_task(authenticator.caller(random_key(number), Scope.CHAT))
        for number in range(2)
    ]
    while slow.lookups < 2:
        await asyncio.sleep(0.01)
    monkeypatch.setattr("serve_app.gateway.edge.auth._LOOKUP_TIMEOUT_S", 0.05)
    with pytest.raises(RateLimited, match="unknown API keys"):
        await authenticator.caller(random_key(2), Scope.CHAT)
    slow.released.set()
    await asyncio.gather(*first, return_exceptions=True)
    await store.close()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/admin/models"])
def test_unknown_keys_that_wait_take_no_place_from_known_ones(
    tmp_path: Path, slow: SlowStore, path: str
) -> None:
    with locked(tmp_path, max_ongoing_requests=4) as gateway, ExitStack() as connections:
        key = key_of(gateway)
        assert chat(gateway, key).status_code == 200
        lines = HEAD.replace("/v1/chat/completions", path)
        for number in range(20):
            connection = socket.create_connection(("127.0.0.1", gateway.port), timeout=20)
            connections.enter_context(connection)
            unknown = random_key(number).decode().removeprefix("Bearer ")
            connection.sendall(lines.format(key=unknown, length=100).encode())
        assert eventually(lambda: slow.lookups == 2, 20)
        assert chat(gateway, key).status_code == 200
        assert slow.most_at_once == 2


# Bodies.


def test_bodies_have_a_budget_that_is_given_back(tmp_path: Path) -> None:
    limits = {"max_body_bytes": 65536, "max_bodies_bytes": 100_000, "max_prompt_chars": 65536}
    with locked(tmp_path, **limits) as gateway:
        key = key_of(gateway, "chat", "admin")
        head = HEAD.format(key=key, length=60_000).encode()
        with socket.create_connection(("127.0.0.1", gateway.port), timeout=20) as holder:
            holder.sendall(head + b" " * 59_999)
            refused: list[httpx2.Response] = []

            def is_refused() -> bool:
                refused[:] = [chat(gateway, key, "x" * 50_000)]
                return bool(refused[0].status_code == 429)

            assert eventually(is_refused, 20)
            assert refused[0].headers["retry-after"] == "1"
            assert chat(gateway, key, "x" * 1_000).status_code == 200
            admin = httpx2.post(
                gateway.url + "/v1/admin/jobs",
                json={"kind": "x" * 50_000},
                headers={"authorization": f"Bearer {key}"},
            )
            assert admin.status_code == 400  # read, and found wrong
        assert eventually(lambda: chat(gateway, key, "x" * 50_000).status_code == 200, 20)


def test_who_has_no_key_takes_no_place_with_a_body_that_is_not_sent(tmp_path: Path) -> None:
    with locked(tmp_path, max_ongoing_requests=2) as gateway, ExitStack() as connections:
        key = key_of(gateway)
        assert chat(gateway, key).status_code == 200
        for _ in range(10):
            connection = socket.create_connection(("127.0.0.1", gateway.port), timeout=20)
            connections.enter_context(connection)
            connection.sendall(HEAD.format(key="none", length=1000).encode())
            assert connection.recv(12) == b"HTTP/1.1 401"  # and it waits for the body a moment
        assert chat(gateway, key).status_code == 200


def test_more_refused_senders_than_are_waited_for_get_their_answer_too(tmp_path: Path) -> None:
    with locked(tmp_path) as gateway:
        answers: list[bytes] = []

        def refused() -> None:
            with socket.create_connection(("127.0.0.1", gateway.port), timeout=20) as connection:
                connection.sendall(HEAD.format(key="none", length=1000).encode())
                answers.append(read_all(connection))

        senders = [threading.Thread(target=refused) for _ in range(100)]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join(30)
    assert len(answers) == 100
    assert all(answer.startswith(b"HTTP/1.1 401") for answer in answers)


def test_a_budget_that_holds_no_body_cannot_be_configured() -> None:
    with pytest.raises(ValueError, match="max_bodies_bytes"):
        LimitsConfig(max_body_bytes=65536, max_bodies_bytes=4096)
