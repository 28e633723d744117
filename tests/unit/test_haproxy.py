"""HAProxy with Ray Serve's configuration, started by Ray's own manager through `haproxy.sh`."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import stat
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import httpx
import psutil
import pytest

from benchmarks.ports import free_port
from serve_app import environment
from tests.haproxy import started_haproxy

MAX_CONNECTIONS = 64
SCRIPT = Path(environment.__file__).with_name("haproxy.sh")


class Gateway(asyncio.Protocol):
    """Breaks off whatever it is asked."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(b"broken\r\n\r\n")
        self._transport.close()


@pytest.fixture
async def haproxy() -> AsyncIterator[Any]:
    """HAProxy before a gateway that is up."""
    server = await asyncio.get_running_loop().create_server(Gateway, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        async with started_haproxy(port, maxconn=MAX_CONNECTIONS) as started:
            await until(lambda: ask(started, "/-/healthz").status_code == 200)
            yield started


def ask(haproxy: Any, path: str) -> httpx.Response:
    return httpx.get(f"http://127.0.0.1:{haproxy.cfg.frontend_port}{path}", timeout=10)


async def until(claim: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not await asyncio.to_thread(claim):
            await asyncio.sleep(0.05)


def listening(pid: int) -> dict[int, str]:
    """The addresses a process listens on, by port."""
    connections = psutil.Process(pid).net_connections("tcp")
    return {c.laddr.port: c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}


def check_doors(haproxy: Any) -> None:
    config = haproxy.cfg
    assert stat.S_IMODE(Path(config.socket_path).stat().st_mode) == 0o600
    ports = (config.frontend_port, config.metrics_port, config.stats_port)
    assert listening(haproxy._proc.pid) == dict.fromkeys(ports, "127.0.0.1")


async def test_its_admin_socket_is_private_and_it_listens_on_loopback_after_a_reload_too(
    haproxy: Any,
) -> None:
    check_doors(haproxy)
    before = haproxy._proc
    await haproxy.reload()
    assert haproxy._proc.pid != before.pid
    check_doors(haproxy)
    # Ray knows its processes by their arguments, and tells the old one to go.
    assert haproxy._is_our_haproxy(haproxy._proc.pid)
    assert await asyncio.wait_for(before.wait(), 10) is not None


def slow_connections(port: int, source: str, number: int) -> Iterator[socket.socket]:
    """Connections that have sent a part of their headers, as far as they are let in."""
    for _ in range(number):
        try:
            connection = socket.create_connection(
                ("127.0.0.1", port), timeout=30, source_address=(source, 0)
            )
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-slow: ")
            yield connection
        except ConnectionError:  # refused at once
            continue


def read_to_the_end(connection: socket.socket) -> bytes:
    received = b""
    try:
        while piece := connection.recv(4096):
            received += piece
    except ConnectionResetError:
        pass
    return received


async def test_slow_headers_shut_out_nobody_and_are_cut(haproxy: Any) -> None:
    port = haproxy.cfg.frontend_port
    with ExitStack() as stack:
        arriving = slow_connections(port, "127.0.0.2", 2 * MAX_CONNECTIONS)
        slow = [stack.enter_context(connection) for connection in arriving]
        assert len(slow) >= MAX_CONNECTIONS // 2
        for path in ("/-/healthz", "/-/routes"):
            assert (await asyncio.to_thread(ask, haproxy, path)).status_code == 200
        # All of them end, refused at once or cut when they have been slow for too long.
        ends = await asyncio.gather(*(asyncio.to_thread(read_to_the_end, c) for c in slow))
    cut = sum(end.startswith(b"HTTP/1.1 408") for end in ends)
    assert MAX_CONNECTIONS // 2 < cut < MAX_CONNECTIONS


def check_error(response: httpx.Response, status: int, code: str) -> None:
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert re.fullmatch(r"req_[0-9a-f]{32}", response.headers["x-request-id"])
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code


async def test_without_a_gateway_the_answer_is_an_error_in_openai_s_shape() -> None:
    async with started_haproxy(free_port()) as haproxy:
        await until(lambda: ask(haproxy, "/-/healthz").status_code == 503)
        response = await asyncio.to_thread(ask, haproxy, "/v1/models")
        check_error(response, 503, "unavailable")
        assert response.headers["retry-after"] == "1"
        again = await asyncio.to_thread(ask, haproxy, "/v1/models")
        assert again.headers["x-request-id"] != response.headers["x-request-id"]


async def test_a_gateway_that_breaks_off_is_an_error_in_openai_s_shape(haproxy: Any) -> None:
    response = await asyncio.to_thread(ask, haproxy, "/v1/models")
    check_error(response, 502, "bad_gateway")


class Dying(asyncio.Protocol):
    """Dies over the first request without a byte of answer, and answers the next ones.

    Attributes:
        requests: Every POST that came, whole.
    """

    requests: ClassVar[list[bytes]] = []
    received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        if not self.received.endswith(b'{"a":1}'):
            return  # the rest is on its way
        self.requests.append(self.received)
        if len(self.requests) > 1:
            self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        self._transport.close()


def post_at_once(port: int) -> bytes:
    """The answer to a POST whose head and body arrive together, as HAProxy needs to replay it."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 7\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(head + b'connection: close\r\n\r\n{"a":1}')
        return read_to_the_end(connection)


async def test_a_post_is_sent_again_where_a_gateway_died_before_it_answered() -> None:
    Dying.requests.clear()
    server = await asyncio.get_running_loop().create_server(Dying, "127.0.0.1", 0)
    async with server, started_haproxy(server.sockets[0].getsockname()[1]) as haproxy:
        await until(lambda: ask(haproxy, "/-/healthz").status_code == 200)
        answer = await asyncio.to_thread(post_at_once, haproxy.cfg.frontend_port)
    assert answer.startswith(b"HTTP/1.1 200 ")
    first, second = Dying.requests
    assert first.startswith(b"POST /v1/chat/completions ")
    assert second.startswith(b"POST /v1/chat/completions ")


async def test_each_error_of_its_own_is_json(haproxy: Any) -> None:
    written = Path(haproxy.config_file_path).read_text()
    bodies = dict(re.findall(r"http-error status (\d+) .*? lf-string '(.*?)' hdr", written))
    assert set(bodies) == {"400", "408", "413", "500", "502", "503", "504"}
    for body in bodies.values():
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("what", "by"),
    [
        (" mode 666 ", " mode 660 "),
        ("bind *:", "bind 0.0.0.0:"),
        ("frontend prometheus", "frontend metrics"),
        ("frontend http_frontend", "frontend http"),
        ("\ndefaults\n", "\ndefaults one\n"),
    ],
)
async def test_a_configuration_that_cannot_be_closed_is_not_started(
    haproxy: Any, tmp_path: Path, what: str, by: str
) -> None:
    haproxy._generate_config_file_internal()
    written = Path(haproxy.config_file_path).read_text()
    assert what in written
    file = tmp_path / "haproxy.cfg"
    file.write_text(written.replace(what, by))
    ended = subprocess.run(
        [SCRIPT, "-c", "-f", file], capture_output=True, text=True, timeout=30, check=False
    )
    assert ended.returncode == 1
    assert "HAProxy is not started" in ended.stderr
    assert file.read_text() == written.replace(what, by)
