"""Nobody in without a key: every route under every spelling of its path, by a real server."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from urllib.parse import unquote

import pytest

from serve_app.gateway.console.assets import SERVED
from serve_app.gateway.edge.routes import PUBLIC, Endpoint
from serve_app.store import Scope, create_key
from tests.gateway_fakes import Loopback, running_gateway

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
SPELLINGS: dict[str, Callable[[str], str]] = {
    "as declared": lambda path: path,
    "line feed": lambda path: path + "%0A",
    "carriage return": lambda path: path + "%0D",
    "carriage return and line feed": lambda path: path + "%0D%0A",
    "NUL": lambda path: path + "%00",
    "DEL": lambda path: path + "%7F",
    "line feed first": lambda path: "/%0A" + path[1:],
    "two slashes first": lambda path: "/" + path,
    "two slashes last": lambda path: "//".join(path.rsplit("/", 1)),
    "parameter": lambda path: path + ";x",
    "dot": lambda path: path + "/.",
    "encoded dot": lambda path: path + "/%2e",
    "parent": lambda path: path + "/%2e%2e/jobs",
    "trailing slash": lambda path: path + "/",
    "other case": lambda path: path.upper(),
    "encoded slash": lambda path: path[0] + path[1:].replace("/", "%2F"),
    "encoded slash last": lambda path: path + "%2F",
    "encoded twice": lambda path: path[0] + path[1:].replace("/", "%252F") + "%250A",
    "question mark": lambda path: path + "%3F",
    "number sign": lambda path: path + "%23",
    "blank": lambda path: path + "%20",
    "backslash": lambda path: path.replace("/v1/", "/v1%5C"),
}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    folder = tmp_path_factory.mktemp("doors")
    with running_gateway(folder, auth={"mode": "required"}) as loopback:
        yield loopback


@pytest.fixture(scope="module")
def endpoints(gateway: Loopback) -> list[Endpoint]:
    found = [route for route in gateway.app.routes if isinstance(route, Endpoint)]
    assert len(found) == len(gateway.app.routes)
    return found


def example(endpoint: Endpoint) -> str:
    """A path of the endpoint that names things that exist."""
    parameters = {
        "model_id": "small", "tool_id": "calculator", "job_id": "job_1", "name": "hello",
        "request_id": "req_1",
    }  # fmt: skip
    return endpoint.path_format.format(**parameters)


def ask(
    connection: http.client.HTTPConnection, method: str, path: str, key: str | None
) -> tuple[int, bytes]:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    return response.status, response.read()


def keys_without(gateway: Loopback, scope: Scope) -> str:
    others = [other for other in Scope if other is not scope]
    return gateway.run(lambda: create_key(gateway.store, "other", others))[1]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_no_spelling_of_a_path_gets_past_its_key(
    gateway: Loopback, endpoints: list[Endpoint], spelling: str
) -> None:
    wrong_keys = {scope: keys_without(gateway, scope) for scope in Scope}
    locked = {example(e): e.rule.access for e in endpoints if e.rule.access != PUBLIC}
    calls = len(gateway.orchestrator.calls)
    with closing(http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=20)) as connection:
        for path, access in locked.items():
            assert isinstance(access, Scope)
            for method in METHODS:
                for key in (None, wrong_keys[access]):
                    tried = SPELLINGS[spelling](path)
                    status, body = ask(connection, method, tried, key)
                    assert status in (401, 403, 404, 405), (method, tried, status)
                    if method != "HEAD" and not body.startswith(b"<!doctype html>"):
                        assert list(json.loads(body)) == ["error"], (method, tried, body)
    assert len(gateway.orchestrator.calls) == calls


@pytest.mark.parametrize("spelling", [name for name in SPELLINGS if name != "as declared"])
def test_a_public_path_under_another_spelling_is_nothing(
    gateway: Loopback, endpoints: list[Endpoint], spelling: str
) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=20)) as connection:
        for endpoint in endpoints:
            tried = SPELLINGS[spelling](endpoint.path)
            if endpoint.rule.access == PUBLIC and unquote(tried) != endpoint.path:
                for method in METHODS:
                    status, _ = ask(connection, method, tried, None)
                    assert status == 404, (method, tried, status)


def test_only_probes_the_document_and_the_console_s_files_are_public(
    endpoints: list[Endpoint],
) -> None:
    public = {e.path: e.rule.is_probe for e in endpoints if e.rule.access == PUBLIC}
    assert public == {
        "/": False,  # leads to the console
        "/healthz": True,
        "/readyz": True,
        "/openapi.json": False,
        **{f"/console/static/{name}": False for name in SERVED},
    }


def test_the_right_key_opens_every_list(gateway: Loopback) -> None:
    _, key = gateway.run(lambda: create_key(gateway.store, "all", list(Scope)))
    with closing(http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=20)) as connection:
        for path in ("/v1/models", "/v1/models/small", "/v1/admin/jobs", "/v1/admin/snapshots"):
            for method in ("GET", "HEAD"):
                assert ask(connection, method, path, key)[0] == 200, path
        assert ask(connection, "GET", "/v1/admin/jobs%0A", key)[0] == 404


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/models", 401),
        ("GET", "/v1/models/", 401),
        ("GET", "/v1/admin/jobs/job_1", 401),
        ("BREW", "/v1/models", 405),
        ("DELETE", "/v1/models", 405),
    ],
)
def test_without_a_key_a_path_is_unknown_or_locked_or_not_taken(
    gateway: Loopback, method: str, path: str, status: int
) -> None:
    response = gateway.raw(f"{method} {path} HTTP/1.0\r\nhost: x\r\n\r\n".encode())
    # The server itself refuses methods that are in no standard.
    assert int(response[9:12]) == (400 if method == "BREW" else status)


def test_a_refused_method_names_every_method_of_the_path(gateway: Loopback) -> None:
    response = gateway.raw(b"GET /v1/admin/models/small HTTP/1.0\r\n\r\n")
    assert response.startswith(b"HTTP/1.1 405")
    assert b"\r\nallow: DELETE, PATCH, PUT\r\n" in response
