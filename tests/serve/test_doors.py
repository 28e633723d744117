"""What a graph, started as `atlas serve` starts it, leaves open to others on the machine."""

from __future__ import annotations

import ipaddress
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc  # type: ignore[import-untyped]
import psutil
import pytest
import ray

from serve_app.config import load_config
from tests.conftest import Graph

pytestmark = pytest.mark.serve


def listening(process: psutil.Process) -> Iterator[tuple[str, str, int]]:
    """Name of the process, address and port of everything it listens on."""
    try:
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                yield process.name(), connection.laddr.ip, connection.laddr.port
    except psutil.NoSuchProcess:
        return


def is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def call_without_token(port: int) -> grpc.StatusCode:
    """How a replica answers another process's call."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
        with pytest.raises(grpc.RpcError) as raised:
            call(b"", timeout=30)
    code: grpc.StatusCode = raised.value.code()
    return code


def test_all_but_the_replicas_listens_on_loopback_and_they_ask_for_the_token(graph: Graph) -> None:
    processes = psutil.Process().children(recursive=True)
    found = [door for process in processes for door in listening(process)]
    assert {"raylet", "gcs_server", "haproxy"} <= {name for name, _, _ in found}
    open_to_others = [door for door in found if not is_loopback(door[1])]
    # Ray Serve 2.60 binds the servers through which replicas call each other to `[::]`.
    assert {name[:15] for name, _, _ in open_to_others} <= {"ray::ServeRepli"}, open_to_others
    for _, _, port in open_to_others:
        assert call_without_token(port) is grpc.StatusCode.UNAUTHENTICATED


def test_ray_s_token_is_this_user_s(graph: Graph) -> None:
    assert os.environ["RAY_AUTH_MODE"] == "token"
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        assert mode(Path.home() / ".ray" / "auth_token") == 0o600


def test_without_the_token_a_command_is_told_to_bring_it(graph: Graph) -> None:
    command = [sys.executable, "-m", "serve_app.cli.app", "status", "--address"]
    command.append(ray.get_runtime_context().gcs_address)
    environment = os.environ | {"COLUMNS": "300"}
    del environment["RAY_AUTH_MODE"]  # `atlas` finds out by itself that there is a token

    def run(**token: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env=environment | token,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    refused = run(RAY_AUTH_TOKEN="wrong")
    assert refused.returncode == 1
    assert "asks for another token" in refused.stdout
    let_in = run()
    assert let_in.returncode == 0, let_in.stderr
    assert "Gateway" in let_in.stdout


def test_haproxy_s_admin_socket_and_its_folder_are_this_user_s(graph: Graph) -> None:
    folder = Path(os.environ["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent
    assert mode(folder) == 0o700
    (socket,) = folder.rglob("admin.sock")
    assert mode(socket) == 0o600


def test_the_deployment_s_data_is_this_user_s(graph: Graph) -> None:
    folder = load_config(graph.config).data_path()
    assert mode(folder) == 0o700
    databases = list(folder.glob("*.db*"))
    assert any(file.suffix == ".db" for file in databases)
    assert {mode(file) for file in databases} == {0o600}
    assert {mode(path) for path in folder.iterdir() if path.is_dir()} <= {0o700}
