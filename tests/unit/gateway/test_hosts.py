"""From where and under which name a gateway answers; the server is a real one, on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.config import GatewayConfig, load_config
from serve_app.errors import ConfigError, Forbidden, Misdirected
from serve_app.gateway.deployment import Gateway
from serve_app.gateway.edge.hosts import HostCheck, host_name, is_loopback, require_loopback
from tests.gateway_fakes import Loopback, gateway_config, running_gateway

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def open_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    with running_gateway(tmp_path_factory.mktemp("open")) as loopback:
        yield loopback


@pytest.fixture(scope="module")
def locked_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    folder = tmp_path_factory.mktemp("locked")
    hosts = ["api.example.com", "*.models.example.com", "10.0.0.7"]
    with running_gateway(folder, auth={"mode": "required"}, allowed_hosts=hosts) as loopback:
        yield loopback


def status(gateway: Loopback, path: str, *headers: str, version: str = "1.0") -> int:
    lines = "".join(f"{header}\r\n" for header in headers)
    response = gateway.raw(f"GET {path} HTTP/{version}\r\n{lines}\r\n".encode())
    assert b"x-request-id: req_" in response
    return int(response[9:12])


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", 200),
        ("LocalHost:8000", 200),
        ("localhost.", 200),
        ("127.0.0.1:8000", 200),
        ("127.9.9.9", 200),
        ("[::1]:8000", 200),
        ("[::ffff:127.0.0.1]", 200),
        ("attacker.example", 421),
        ("attacker.example:8000", 421),
        ("localhost.attacker.example", 421),
        ("127.0.0.1.attacker.example", 421),
        ("localhost@attacker.example", 421),
        ("attacker.example#localhost", 421),
        ("0.0.0.0:8000", 421),
        ("192.0.2.1", 421),
        ("[2001:db8::1]", 421),
        ("2130706433", 421),
        ("127.1", 421),
        ("localhost, attacker.example", 421),
        ("", 421),
    ],
)
def test_without_keys_only_a_loopback_name_is_answered(
    open_gateway: Loopback, host: str, expected: int
) -> None:
    for path in ("/v1/models", "/v1/admin/models", "/healthz"):
        assert status(open_gateway, path, f"host: {host}") == expected, path


def test_without_keys_a_host_is_named_once(open_gateway: Loopback) -> None:
    assert status(open_gateway, "/v1/models") == 421
    both = ("host: localhost", "host: attacker.example")
    assert status(open_gateway, "/v1/models", *both) == 421
    assert status(open_gateway, "/v1/models", *reversed(both)) == 421


def test_a_refused_host_gets_an_error_in_openais_shape(open_gateway: Loopback) -> None:
    response = open_gateway.raw(b"GET /v1/models HTTP/1.0\r\nhost: attacker.example\r\n\r\n")
    assert b'"code":"host_not_served"' in response
    assert b"'attacker.example' are not answered here" in response


def test_what_a_proxy_on_this_machine_passes_on_from_elsewhere_is_refused(
    open_gateway: Loopback,
) -> None:
    for forwarded in ("203.0.113.9", "127.0.0.1, 203.0.113.9", "2001:db8::1", "unknown"):
        headers = ("host: localhost", f"x-forwarded-for: {forwarded}")
        assert status(open_gateway, "/v1/models", *headers) == 403, forwarded
    assert status(open_gateway, "/v1/models", "host: localhost", "x-forwarded-for: ::1") == 200


@pytest.mark.parametrize("client", [("203.0.113.9", 4711), ("10.0.0.1", 1), ("::2", 1), None])
def test_without_keys_a_caller_on_another_machine_is_refused(client: Any) -> None:
    scope = {"type": "http", "client": client, "headers": [(b"host", b"localhost")]}
    for is_probe in (False, True):
        with pytest.raises(Forbidden):
            HostCheck("open").check(scope, is_probe=is_probe)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("api.example.com", 401),
        ("API.example.com:443", 401),
        ("a.models.example.com", 401),
        ("10.0.0.7:8000", 401),
        ("models.example.com", 421),
        ("models.example.com.attacker.example", 421),
        ("evilapi.example.com", 421),
        ("10.0.0.8", 421),
        ("localhost", 421),
    ],
)
def test_with_keys_the_configured_names_are_answered(
    locked_gateway: Loopback, host: str, expected: int
) -> None:
    assert status(locked_gateway, "/v1/models", f"host: {host}") == expected


def test_with_keys_probes_are_answered_under_any_name(locked_gateway: Loopback) -> None:
    for headers in (["host: 10.244.1.17:8000"], []):
        assert status(locked_gateway, "/healthz", *headers) == 200
        assert status(locked_gateway, "/readyz", *headers) == 200
        assert status(locked_gateway, "/openapi.json", *headers) == 421


def test_with_keys_and_no_names_every_name_and_caller_is_answered() -> None:
    scope = {"type": "http", "client": ("203.0.113.9", 1), "headers": [(b"host", b"any")]}
    HostCheck("required").check(scope, is_probe=False)


@pytest.mark.parametrize("header", [b"", b":80", b"a b", b"a\0b", b"[::1", b"a:b", b"a/b", b"\xff"])
def test_what_is_no_name_is_none(header: bytes) -> None:
    assert host_name(header) is None
    scope = {"type": "http", "client": ("127.0.0.1", 1), "headers": [(b"host", header)]}
    with pytest.raises(Misdirected):
        HostCheck("required", ["a"]).check(scope, is_probe=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "node.example", "", None])
async def test_a_gateway_without_keys_does_not_start_where_other_machines_can_connect(
    host: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.gateway.deployment.http_address", lambda: (host, 8000))
    gateway = Gateway.__new__(Gateway)
    with pytest.raises(ConfigError, match=r"'open', .*http_options\.host to '127\.0\.0\.1'"):
        await gateway.__init__(gateway_config(), None, None, None)  # type: ignore[misc]
    monkeypatch.delattr(Gateway, "__del__")  # Python would call it


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.53"])
def test_loopback_is_enough_without_keys_and_any_address_with_them(host: str) -> None:
    require_loopback("open", host)
    require_loopback("required", "0.0.0.0")
    assert is_loopback(host)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/serve").glob("*.yaml")), ids=str)
def test_every_serve_file_has_an_address_that_its_gateway_starts_on(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    (application,) = content["applications"]
    config = load_config(ROOT / application["args"]["config"])
    require_loopback(config.gateway.auth.mode, content["http_options"]["host"])


@pytest.mark.parametrize(
    "hosts", [["https://a.example"], ["a.example:443"], ["A.example"], ["*"], ["a.*"], [""]]
)
def test_what_is_no_name_cannot_be_configured(hosts: list[str]) -> None:
    with pytest.raises(ValueError, match="allowed_hosts"):
        GatewayConfig.model_validate({"auth": {"mode": "required"}, "allowed_hosts": hosts})


def test_names_without_keys_are_a_contradiction() -> None:
    with pytest.raises(ValueError, match="allowed_hosts has no effect"):
        GatewayConfig.model_validate({"allowed_hosts": ["a.example"]})
