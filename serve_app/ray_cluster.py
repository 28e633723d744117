"""How a process connects to Ray: it starts a cluster of its own on loopback, or joins one.

Ray asks for a token wherever one is used (`RAY_AUTH_MODE=token`): the value of `RAY_AUTH_TOKEN`, or
the content of the file that `RAY_AUTH_TOKEN_PATH` names, or else of `~/.ray/auth_token`.
"""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants, worker
from ray._private.authentication import authentication_token_setup as token_setup
from ray._private.authentication.authentication_token_setup import AuthenticationTokenLoader
from ray.exceptions import AuthenticationError

from serve_app import environment
from serve_app.private_files import tighten

_TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_HOW_TO_GIVE_IT = (
    "copy the cluster's token to ~/.ray/auth_token (mode 0600), or name it in RAY_AUTH_TOKEN or "
    "RAY_AUTH_TOKEN_PATH"
)

_REACH_S = 5.0
"""How long the address of a cluster may take to accept a connection."""
_LAST_PORT = 65_535


class ClusterRefused(ConnectionError):
    """A Ray cluster does not answer, or refuses this process's token."""


def connect(address: str, **options: Any) -> None:
    """Start a Ray cluster, or join one.

    Args:
        address: `local` starts one that ends with this process; `auto` joins one on this machine;
            otherwise the host and port of one to join.
        options: For `ray.init`.

    Raises:
        ClusterRefused: If the cluster does not answer, or refuses this process's token.
        ConnectionError: If `auto` finds no cluster.
    """
    _keep_loopback_addresses()
    _keep_reports_in_logs()
    if address == "local":
        _prepare_own_cluster()
    else:
        _check_reachable(address)
    _use_token()
    try:
        with nullcontext() if address == "local" else _one_try():
            ray.init(address=address, **options)
    except AuthenticationError as error:
        raise ClusterRefused(
            f"RAY_AUTH_MODE is 'token', and there is no token: {_HOW_TO_GIVE_IT}"
        ) from error
    except ConnectionError as error:
        if "Failed to connect" not in str(error):
            raise
        raise ClusterRefused(
            f"the Ray cluster at {address!r} does not answer, or it asks for another token than "
            f"this process has; if it asks for one, {_HOW_TO_GIVE_IT}"
        ) from error


def _check_reachable(address: str) -> None:
    """See that something listens at an address, before Ray tries for a quarter of an hour.

    Raises:
        ClusterRefused: If nothing does.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():  # `auto`
        return
    try:
        if int(port) > _LAST_PORT:  # some resolvers would take it modulo 65,536
            raise OSError(f"port {int(port)} is above {_LAST_PORT}")
        socket.create_connection((host.strip("[]"), int(port)), _REACH_S).close()
    except OSError as error:
        reason = getattr(error, "strerror", None) or error
        raise ClusterRefused(
            f"no Ray cluster can be reached at {address!r}: {reason}; is the address right, and "
            "does the cluster run?"
        ) from error


@contextmanager
def _one_try() -> Iterator[None]:
    """Have Ray give a cluster up after its first try, which takes up to a minute, and not the 20th.

    Ray tries as often as it may wait seconds for the cluster's first process.
    """
    name = "RAY_gcs_server_port_wait_time_s"
    is_ours = name not in os.environ
    os.environ.setdefault(name, "1")
    try:
        yield
    finally:
        if is_ours:
            del os.environ[name]


def _keep_loopback_addresses() -> None:
    """Have Ray take 127.0.0.1 for what it is.

    Ray replaces it with the machine's own address where clusters of several machines are supported,
    and so would neither bind to loopback nor find a cluster that listens there.
    """
    ray_constants.ENABLE_RAY_CLUSTER = False


def _keep_reports_in_logs() -> None:
    """Have Ray leave out what its processes report to every driver.

    A driver prints these reports ("N PYTHON worker processes have been started …") in a thread of
    their own, whatever `log_to_driver` says: they are about how Ray is used, which the graph
    decides, and fall into the lines of a terminal. `raylet.out` has them too. This is the switch by
    which Ray itself keeps quiet during a breakpoint; workers' output is asked for by nobody here.
    """
    worker._worker_logs_enabled = False


def _prepare_own_cluster() -> None:
    """Close the doors of the cluster that the next `ray.init` starts; its processes inherit it."""
    # With it, whatever of Ray listens binds to 127.0.0.1. Only Serve's replicas also listen on all
    # addresses, to each other (`[::]` is fixed in Ray 2.60); they ask for the token.
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    folder = environment.make_haproxy_folder()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, value in environment.haproxy_places(folder).items():
        os.environ.setdefault(name, value)
    _make_token()


def _make_token() -> None:
    """Make the token that Ray would make, where there is none: readable by this user only."""
    if any(os.environ.get(name) for name in _TOKEN_VARIABLES):
        return
    file = Path.home() / ".ray" / "auth_token"
    if not file.exists():
        file.parent.mkdir(mode=0o700, exist_ok=True)
        # Another process may make one now: the name is given to a complete file, and once.
        descriptor, draft = tempfile.mkstemp(dir=file.parent)  # mode 0600
        try:
            with os.fdopen(descriptor, "w") as out:
                out.write(secrets.token_hex(32))
            file.hardlink_to(draft)
        except FileExistsError:
            pass
        finally:
            os.unlink(draft)
        AuthenticationTokenLoader.instance().reset_cache()
    tighten(file)


def _use_token() -> None:
    """Send the token where there is one; Ray itself does so only where it looks for the cluster."""
    if token_setup.AUTH_MODE_ENV_VAR in os.environ:
        return
    if AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
        token_setup._enable_token_auth()
