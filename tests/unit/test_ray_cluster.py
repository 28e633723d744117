"""Joining a Ray cluster: what does not answer is said soon; a Serve that is open is left alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from typer.testing import CliRunner

from serve_app import ray_cluster, running
from serve_app.cli.app import app
from serve_app.errors import ConfigError
from serve_app.ray_cluster import ClusterRefused, connect

OPEN = """
models: [{type: remote, model_id: m, base_url: "http://127.0.0.1:1/v1", remote_model: m}]
"""
RETRIES = "RAY_gcs_server_port_wait_time_s"


@pytest.fixture
def inits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """Addresses that Ray is asked to join, each with how often Ray may try."""
    asked: list[tuple[str, str | None]] = []

    def init(address: str, **_: Any) -> None:
        asked.append((address, os.environ.get(RETRIES)))

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray_cluster, "_prepare_own_cluster", lambda: None)
    monkeypatch.setattr(ray_cluster, "_use_token", lambda: None)
    monkeypatch.delenv(RETRIES, raising=False)
    return asked


@pytest.fixture
def closed_port() -> Any:
    with socket.socket() as bound:  # and does not listen
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_an_address_where_nothing_listens_is_refused_before_ray_tries(
    inits: list[Any], closed_port: int, form: str
) -> None:
    address = form.format(closed_port)
    with pytest.raises(ClusterRefused, match=f"can be reached at '{address}': Connection refused"):
        connect(address)
    assert not inits


def test_a_host_that_is_none_is_refused(inits: list[Any]) -> None:
    with pytest.raises(ClusterRefused, match=r"nobody\.invalid:6379"):
        connect("nobody.invalid:6379")
    assert not inits


def test_a_port_that_is_none_is_not_taken_for_another(inits: list[Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1] + 65_536}"
        with pytest.raises(ClusterRefused, match="is above 65535"):
            connect(address)
    assert not inits


def test_status_says_that_nothing_answers_at_an_address(inits: list[Any], closed_port: int) -> None:
    result = CliRunner().invoke(app, ["status", "--address", f"127.0.0.1:{closed_port}"])
    assert result.exit_code == 1
    assert "is the address right" in result.output
    assert not inits


def test_ray_tries_once_to_join_and_as_long_as_ever_to_start(inits: list[Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as cluster:
        address = f"127.0.0.1:{cluster.getsockname()[1]}"
        connect(address)
    connect("auto")
    connect("local")
    assert inits == [(address, "1"), ("auto", "1"), ("local", None)]
    assert RETRIES not in os.environ


def test_a_wait_that_the_user_has_set_is_kept(
    inits: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RETRIES, "7")
    connect("auto")
    assert inits == [("auto", "7")]
    assert os.environ[RETRIES] == "7"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(OPEN)
    return file


def test_no_ray_is_started_for_a_host_that_needs_keys(inits: list[Any], config: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"listens on '0\.0\.0\.0'"),
        running.running_graph(config, host="0.0.0.0"),
    ):
        raise AssertionError
    assert not inits


def test_a_cluster_whose_serve_is_open_to_others_is_left_as_it_was(
    inits: list[Any], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touched = []
    monkeypatch.setattr(running, "http_address", lambda: ("0.0.0.0", 8000))
    monkeypatch.setattr(ray, "shutdown", lambda: touched.append("left"))
    for name in ("start", "run", "shutdown"):
        monkeypatch.setattr(serve, name, lambda *_, name=name, **__: touched.append(name))
    with (
        pytest.raises(ConfigError, match="set Serve's http_options"),
        running.running_graph(config, address="auto"),
    ):
        raise AssertionError
    assert touched == ["left"]


REPORTED = """
import logging, threading
import ray
from ray._private import worker
from ray._private.utils import publish_error_to_driver
from serve_app.ray_cluster import connect

connect("local", log_to_driver=False, logging_level=logging.WARNING, num_cpus=1,
        include_dashboard=False, object_store_memory=80 << 20)
came, printing = threading.Event(), worker.print_to_stdstream

def show(*arguments, **named):
    printing(*arguments, **named)
    came.set()

worker.print_to_stdstream = show  # the thread that waits for reports calls it by this name
text = "WARNING: 8 PYTHON worker processes have been started on node"
while not came.wait(1):
    publish_error_to_driver("worker_pool_large", text, gcs_client=worker.global_worker.gcs_client)
print("the report came")
ray.shutdown()
"""


@pytest.mark.serial
def test_what_ray_s_processes_report_to_drivers_does_not_reach_the_terminal() -> None:
    done = subprocess.run(
        [sys.executable, "-c", REPORTED], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the report came\n"
    assert "worker processes" not in done.stderr
