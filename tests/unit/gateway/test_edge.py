"""The edge against callers that misbehave: raw sockets to a real server with tight limits."""

from __future__ import annotations

import asyncio
import http.client
import json
import pickle
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator

import httpx2
import pytest
from ray.serve._private.direct_ingress_http_util import ASGIDIReceiveProxy
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.errors import Unauthorized
from serve_app.gateway.edge.auth import Authenticator
from serve_app.gateway.edge.proxy import BodyGate, ProxyEdge, body_held_back, middlewares
from serve_app.store import ApiKey
from tests.gateway_fakes import Loopback, eventually, read_all, running_gateway
from tests.haproxy import started_haproxy

BODY_TIMEOUT_S = 0.5
BODY = json.dumps({"model": "atlas", "messages": [{"role": "user", "content": "hi"}]}).encode()
HANGING = json.dumps(
    {
        "model": "atlas",
        "messages": [{"role": "user", "content": "!hang"}],
        "atlas": {"deadline_s": 3},
    }
).encode()
HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    limits = {
        "max_body_bytes": 4096,
        "max_header_bytes": 2048,
        "body_timeout_s": BODY_TIMEOUT_S,
        "max_ongoing_requests": 4,
        "default_deadline_s": 5,
        "max_deadline_s": 10,
    }
    with running_gateway(tmp_path_factory.mktemp("edge"), limits=limits) as loopback:
        yield loopback


@pytest.fixture(autouse=True)
def nothing_is_left_behind(gateway: Loopback) -> Iterator[None]:
    yield
    assert eventually(lambda: answers(gateway))


def answers(gateway: Loopback) -> bool:
    headers = {"content-type": "application/json"}
    url = gateway.url + "/v1/chat/completions"
    return httpx2.post(url, content=BODY, headers=headers).status_code == 200


def is_open(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


def status_of(response: bytes) -> int:
    assert response.startswith(b"HTTP/1.1 "), response[:80]
    return int(response[9:12])


def error_of(response: bytes) -> dict[str, str | None]:
    error: dict[str, str | None] = json.loads(response.partition(b"\r\n\r\n")[2])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert b"x-request-id: req_" in response
    return error


def length(body: bytes | int) -> bytes:
    return b"content-length: %d\r\n\r\n" % (body if isinstance(body, int) else len(body))


@pytest.mark.serial
def test_a_declared_length_over_the_limit_is_refused_before_the_body(gateway: Loopback) -> None:
    began = time.monotonic()
    response = gateway.raw(HEAD + length(4097))
    assert status_of(response) == 413
    assert "more than 4096" in str(error_of(response)["message"])
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("declared", [b"9" * 30, b"1" + b"0" * 18])
def test_an_absurd_declared_length_is_a_4xx(gateway: Loopback, declared: bytes) -> None:
    response = gateway.raw(HEAD + b"content-length: " + declared + b"\r\n\r\n")
    assert 400 <= status_of(response) < 500


def test_a_sender_who_sends_too_much_gets_to_read_why(gateway: Loopback) -> None:
    response = gateway.raw(HEAD + length(3_000_000) + b"x" * 3_000_000)
    assert status_of(response) == 413
    assert error_of(response)["type"] == "invalid_request_error"


def test_a_chunked_body_is_counted_while_it_comes(gateway: Loopback) -> None:
    chunk = b"400\r\n" + b"x" * 1024 + b"\r\n"
    response = gateway.raw(HEAD + b"transfer-encoding: chunked\r\n\r\n" + 6 * chunk)
    assert status_of(response) == 413


def test_an_endless_body_is_cut_off(gateway: Loopback) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as connection:
        connection.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        cut_off = threading.Event()

        def send() -> None:
            try:
                while not cut_off.wait(0.001):
                    connection.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
            except OSError:
                cut_off.set()

        sender = threading.Thread(target=send)
        sender.start()
        response = read_all(connection)
        assert cut_off.wait(5)
        sender.join()
    assert status_of(response) == 413


@pytest.mark.serial
def test_a_body_that_stops_half_way_is_a_408(gateway: Loopback) -> None:
    began = time.monotonic()
    response = gateway.raw(HEAD + length(100) + b'{"model"')
    assert status_of(response) == 408
    assert "did not arrive" in str(error_of(response)["message"])
    assert BODY_TIMEOUT_S <= time.monotonic() - began < BODY_TIMEOUT_S + 3


def test_a_body_that_trickles_is_a_408(gateway: Loopback) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as connection:
        connection.sendall(HEAD + length(1000))
        began = time.monotonic()
        while time.monotonic() - began < 2 * BODY_TIMEOUT_S:
            connection.sendall(b"x")
            time.sleep(0.02)
        assert status_of(read_all(connection)) == 408


def test_the_deadline_counts_from_arrival(gateway: Loopback) -> None:
    body = BODY[:-1] + b', "atlas": {"deadline_s": 4}}'
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as connection:
        connection.sendall(HEAD + b"connection: close\r\n" + length(body) + body[:10])
        time.sleep(0.2)
        connection.sendall(body[10:])
        assert status_of(read_all(connection)) == 200
    assert 1 < gateway.orchestrator.calls[-1].limits.deadline_s < 3.9


def test_a_deadline_that_passed_on_the_way_is_a_504(gateway: Loopback) -> None:
    body = BODY[:-1] + b', "atlas": {"deadline_s": 0.05}}'
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as connection:
        connection.sendall(HEAD + b"connection: close\r\n" + length(body) + body[:10])
        time.sleep(0.2)
        connection.sendall(body[10:])
        assert status_of(read_all(connection)) == 504


def test_a_client_that_leaves_within_its_body_is_forgotten(
    gateway: Loopback, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "serve_app.gateway")
    with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
        connection.sendall(HEAD + length(100) + b"{")
        time.sleep(0.05)
    assert eventually(lambda: any("status=499" in line for line in caplog.messages))


@pytest.fixture
async def haproxy_port(gateway: Loopback) -> AsyncIterator[int]:
    """Where HAProxy, as Ray starts it, listens before the gateway."""
    async with started_haproxy(gateway.port) as haproxy:
        port = haproxy.cfg.frontend_port
        assert eventually(lambda: is_open(port))
        yield port


def test_behind_haproxy_a_client_that_leaves_before_the_answer_is_forgotten(
    gateway: Loopback, haproxy_port: int
) -> None:
    arrived, cancelled = len(gateway.orchestrator.calls), len(gateway.orchestrator.cancelled)
    with socket.create_connection(("127.0.0.1", haproxy_port)) as connection:
        connection.sendall(HEAD + length(HANGING))
        time.sleep(0.05)  # as HTTP clients do: the body is a piece of its own
        connection.sendall(HANGING)
        assert eventually(lambda: len(gateway.orchestrator.calls) == arrived + 1)
        time.sleep(0.2)
        assert len(gateway.orchestrator.cancelled) == cancelled
    assert eventually(lambda: len(gateway.orchestrator.cancelled) == cancelled + 1, 1.5)


def test_headers_over_the_limit_are_a_431(gateway: Loopback) -> None:
    response = gateway.raw(
        b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nx-a: " + b"a" * 3000 + b"\r\n\r\n", 1
    )
    assert status_of(response) == 431
    assert "at most 2048" in str(error_of(response)["message"])


def test_many_small_headers_are_a_431(gateway: Loopback) -> None:
    headers = b"".join(b"x-%d: 1\r\n" % index for index in range(500))
    assert (
        status_of(
            gateway.raw(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n" + headers + b"\r\n", 1)
        )
        == 431
    )


def test_a_long_address_is_a_431(gateway: Loopback) -> None:
    response = gateway.raw(
        b"GET /healthz?" + b"a" * 3000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n", 1
    )
    assert status_of(response) == 431


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        ('Application/JSON;charset="UTF-8"', 200),
        ("application/json; charset=latin-1", 415),
        ("application/x-www-form-urlencoded", 415),
        ("text/plain", 415),
        ("multipart/form-data", 415),
        (None, 415),
    ],
)
def test_only_json_is_read(gateway: Loopback, content_type: str | None, status: int) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    url = gateway.url + "/v1/chat/completions"
    assert httpx2.post(url, content=BODY, headers=headers).status_code == status


def test_a_compressed_body_is_a_415(gateway: Loopback) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    url = gateway.url + "/v1/chat/completions"
    assert httpx2.post(url, content=BODY, headers=headers).status_code == 415


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[" * 4000, b'{"a":' * 800, b"\xff\xfe", b'"\\ud800"', b"null", b"\0"],
    ids=lambda body: repr(body[:8]),
)
def test_a_body_that_is_no_json_object_is_a_400(gateway: Loopback, body: bytes) -> None:
    response = gateway.raw(HEAD + b"connection: close\r\n" + length(body) + body)
    assert status_of(response) == 400
    assert error_of(response)["type"] == "invalid_request_error"


def test_a_body_on_a_get_is_not_waited_for(gateway: Loopback) -> None:
    response = gateway.raw(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n" + length(1000) + b"x")
    assert status_of(response) == 200
    assert b"connection: close" in response


def test_a_body_on_an_unknown_path_is_not_waited_for(gateway: Loopback) -> None:
    response = gateway.raw(b"POST /nowhere HTTP/1.1\r\nhost: localhost\r\n" + length(1000) + b"x")
    assert status_of(response) == 404


@pytest.mark.serial
def test_too_many_at_once_are_refused_at_once_and_probes_are_not(
    gateway: Loopback,
) -> None:
    connections = []
    arrived = len(gateway.orchestrator.calls)
    try:
        for _ in range(4):
            connection = socket.create_connection(("127.0.0.1", gateway.port), timeout=10)
            connections.append(connection)
            connection.sendall(HEAD + length(HANGING) + HANGING)
        assert eventually(lambda: len(gateway.orchestrator.calls) == arrived + 4)
        headers = {"content-type": "application/json"}
        url = gateway.url + "/v1/chat/completions"
        with httpx2.Client() as client:
            client.get(gateway.url + "/healthz")
            began = time.monotonic()
            busy = client.post(url, content=BODY, headers=headers)
            seconds = time.monotonic() - began
            assert busy.status_code == 429
            assert busy.headers["retry-after"] == "1"
            assert busy.json()["error"]["type"] == "rate_limit_error"
            assert seconds < 5
            assert client.get(gateway.url + "/healthz").status_code == 200
            assert client.get(gateway.url + "/readyz").status_code == 200
    finally:
        for connection in connections:
            connection.close()


def test_a_kept_connection_serves_the_next_request_after_an_error(gateway: Loopback) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=10)
    for body, status in ((b"{}", 400), (BODY, 200), (BODY, 200)):
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", body, headers)
        own_end = connection.sock.getsockname()
        response = connection.getresponse()
        response.read()
        assert response.status == status
        assert connection.sock.getsockname() == own_end
    connection.close()


def test_a_reader_who_stops_reading_is_given_up_at_the_deadline(gateway: Loopback) -> None:
    body = json.dumps(
        {
            "model": "atlas",
            "stream": True,
            "messages": [{"role": "user", "content": "!flood"}],
            "atlas": {"deadline_s": 0.5},
        }
    ).encode()
    before = len(gateway.orchestrator.cancelled)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", gateway.port))
        connection.sendall(HEAD + length(body) + body)
        assert eventually(lambda: len(gateway.orchestrator.cancelled) == before + 1)


def test_a_websocket_is_turned_away(gateway: Loopback) -> None:
    response = gateway.raw(
        b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n"
        b"connection: upgrade\r\nupgrade: websocket\r\n"
        b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        1,
    )
    assert status_of(response) < 500


# In front of Serve.


async def headers_behind_the_proxy_edge(
    headers: list[tuple[bytes, bytes]],
) -> tuple[list[tuple[bytes, bytes]], list[tuple[bytes, bytes]]]:
    """Headers as the app gets them, and as the client gets them back."""
    seen: list[tuple[bytes, bytes]] = []
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend(scope["headers"])
        start = {"type": "http.response.start", "status": 200}
        own = [(b"x-request-id", b"req_own"), (b"X-Request-ID", b"serves")]
        await send({**start, "headers": own})

    async def receive() -> Message:
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    await ProxyEdge(app)({"type": "http", "headers": headers}, receive, send)
    return seen, sent[0]["headers"]


async def test_serves_control_headers_do_not_get_through() -> None:
    control = [
        (b"serve_multiplexed_model_id", b"\xff"),
        (b"Serve-Multiplexed-Model-Id", b"x"),
        (b"x-request-timeout-seconds", b"0"),
        (b"x-request-disconnect-disabled", b"?1"),
        (b"x-session-id", b"\xff"),
        (b"x-serve-router-replica", b"x"),
    ]
    seen, _ = await headers_behind_the_proxy_edge([*control, (b"accept", b"*/*")])
    assert seen == [(b"accept", b"*/*"), (b"x-client-request-id", b"")]


async def test_the_callers_request_id_gets_through_under_another_name() -> None:
    seen, _ = await headers_behind_the_proxy_edge([(b"x-request-id", b"mine")])
    assert seen == [(b"x-client-request-id", b"mine")]
    seen, _ = await headers_behind_the_proxy_edge([(b"x-request-id", b"\xff bad")])
    assert seen == [(b"x-client-request-id", b"")]


async def test_only_our_own_request_id_comes_back() -> None:
    _, returned = await headers_behind_the_proxy_edge([])
    assert returned == [(b"x-request-id", b"req_own")]


class Flood:
    """A caller that sends as fast as it is read, as a server gives the pieces to an application."""

    def __init__(self, pieces: int) -> None:
        self.taken = 0
        self._pieces = pieces

    async def receive(self) -> Message:
        if self.taken == self._pieces:
            await asyncio.Event().wait()
        self.taken += 1
        more = self.taken < self._pieces
        return {"type": "http.request", "body": bytes(1024), "more_body": more}


def as_serve_runs_it(app: ASGIApp) -> ASGIApp:
    """An app behind Ray Serve's own reader of requests, which fills a queue."""

    async def ingress(scope: Scope, receive: Receive, send: Send) -> None:
        queue = ASGIDIReceiveProxy(scope, receive, asyncio.get_running_loop())
        reading = queue.fetch_until_disconnect_task()
        try:
            await app(scope, queue, send)
        finally:
            reading.cancel()

    return ProxyEdge(ingress)


async def turns(count: int = 200) -> None:
    """Let every other task run as far as it gets."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_serve_reads_no_body_while_the_key_is_looked_up(
    gateway: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answered = asyncio.Event(), asyncio.Event()

    async def caller(self: Authenticator, *_: object) -> ApiKey:
        asked.set()
        await answered.wait()
        raise Unauthorized("the API key is not known here")

    monkeypatch.setattr(Authenticator, "caller", caller)
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        **{"type": "http", "method": "POST", "path": "/v1/chat/completions", "root_path": ""},
        **{"query_string": b"", "client": ("127.0.0.1", 1)},
        "headers": [(b"host", b"localhost"), (b"transfer-encoding", b"chunked")],
    }
    flood = Flood(pieces=1000)
    asking = asyncio.ensure_future(as_serve_runs_it(gateway.app)(scope, flood.receive, send))
    await asked.wait()
    await turns()
    assert flood.taken <= 1  # held at the gate; all of it, were there none
    answered.set()
    await asking
    assert sent[0]["status"] == 401
    assert flood.taken == 1000  # read and forgotten behind the answer


async def test_a_caller_that_leaves_while_its_body_is_held_back_is_noticed() -> None:
    async def receive() -> Message:
        return {"type": "http.disconnect"}

    gate = BodyGate(receive)
    gate.close()
    assert (await gate.receive())["type"] == "http.disconnect"


async def test_a_gate_may_be_opened_from_another_thread() -> None:
    gate = BodyGate(Flood(pieces=2).receive)
    gate.close()
    waiting = asyncio.create_task(gate.receive())
    await turns()
    assert not waiting.done()
    await asyncio.to_thread(gate.open)
    assert (await waiting)["type"] == "http.request"
    assert (await gate.receive())["type"] == "http.request"


async def test_what_leaves_the_servers_process_has_no_gate() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append(pickle.loads(pickle.dumps(scope)))  # as Serve's proxies send it to a replica

    scopes: list[Scope] = []
    await ProxyEdge(app)({"type": "http", "headers": []}, Flood(0).receive, sent_nowhere)
    (scope,) = scopes
    with body_held_back(scope):
        assert scope["atlas.body_gate"] is None


async def sent_nowhere(message: Message) -> None:
    raise AssertionError


def test_serve_gets_the_proxy_edge_as_a_middleware() -> None:
    (middleware,) = middlewares()
    assert repr(middleware) == "Middleware(ProxyEdge)"
