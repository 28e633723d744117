"""Two real gateways on one store behind one HAProxy: what a gateway began before it died is not
done again, though HAProxy sends the request to the other one."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.tools.once import Gateways, order_body
from tests.haproxy import started_haproxy

LONG_S = 120.0


@pytest.fixture
async def gateways(tmp_path: Path) -> AsyncIterator[Gateways]:
    two = Gateways(tmp_path, 2)
    try:
        await two.start()
        yield two
    finally:
        two.close()


def send(port: int, order: str, key: str) -> tuple[int, dict[str, str], dict[str, Any]]:
    """A POST whose head and body arrive together, as HAProxy needs to send it again."""
    body = json.dumps(order_body(order))
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        f"content-type: application/json\r\nidempotency-key: {key}\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port), timeout=LONG_S) as connection:
        connection.sendall((head + body).encode())
        received = b""
        while piece := connection.recv(65536):
            received += piece
    answer, _, text = received.partition(b"\r\n\r\n")
    status, *fields = answer.decode().split("\r\n")
    headers = dict(field.lower().split(": ", 1) for field in fields)
    return int(status.split()[1]), headers, json.loads(text)


def is_up(admin_socket: str, port: int) -> bool:
    """Whether HAProxy sends requests to a gateway."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(admin_socket)
        connection.sendall(b"show stat\n")
        told = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    lines = [line.split(",") for line in told.splitlines() if line]
    place = lines[0].index("status")
    return any(fields[1] == f"gateway-{port}" and fields[place] == "UP" for fields in lines[1:])


async def until(claim: Callable[[], bool]) -> None:
    async with asyncio.timeout(LONG_S):
        while not await asyncio.to_thread(claim):
            await asyncio.sleep(0.02)


async def test_a_key_holds_for_both_gateways_and_over_the_death_of_one(gateways: Gateways) -> None:
    first, second = gateways.ports
    async with started_haproxy(first, second, retry_on="conn-failure empty-response") as haproxy:
        port = haproxy.cfg.frontend_port
        url = f"http://127.0.0.1:{port}/-/healthz"
        await until(lambda: httpx.get(url, timeout=10).status_code == 200)

        # The same request at each gateway, and through HAProxy: one answer.
        status, headers, said = await asyncio.to_thread(send, first, "one", "key-1")
        assert status == 200
        assert "idempotent-replayed" not in headers
        for again in (second, port, port):
            status, headers, replayed = await asyncio.to_thread(send, again, "one", "key-1")
            assert (status, replayed) == (200, said)
            assert headers["idempotent-replayed"] == "true"
        assert gateways.orders() == {"one": 1}

        # A gateway that dies after its tool has acted and before it has answered.
        gateways.kill(second)
        asking = asyncio.create_task(asyncio.to_thread(send, port, "slow", "key-2"))
        await until(lambda: gateways.orders()["slow"] == 1)
        await gateways.start_one(second)
        await until(lambda: is_up(haproxy.cfg.socket_path, second))
        gateways.kill(first)
        status, _, said = await asking
        assert status == 409
        assert said["error"]["code"] in ("idempotency_key_in_flight", "outcome_unknown")

        def is_unknown() -> bool:
            status, _, said = send(port, "slow", "key-2")
            return (status, said["error"]["code"]) == (409, "outcome_unknown")

        await until(is_unknown)
    assert gateways.orders() == {"one": 1, "slow": 1}
