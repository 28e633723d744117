"""HAProxy as Ray Serve starts it, and one that shares nothing with another graph's here."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from benchmarks.ports import free_port
from serve_app import environment


def own_ports() -> dict[str, str]:
    return {
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
    }


def own_haproxy() -> dict[str, str]:
    """Environment of a process that starts such a graph; Ray reads it when it is imported."""
    return own_ports() | environment.haproxy_places(environment.make_haproxy_folder())


@asynccontextmanager
async def started_haproxy(*gateway_ports: int, **settings: Any) -> AsyncIterator[Any]:
    """Ray's own manager of HAProxy, with HAProxy running before gateways.

    Args:
        gateway_ports: Where the gateways listen on 127.0.0.1; each is up that can be connected to.
        settings: Of Ray's `HAProxyConfig`.
    """
    from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
    from ray.serve.config import HTTPOptions

    with tempfile.TemporaryDirectory(prefix="haproxy-") as folder:
        config = HAProxyConfig(
            http_options=HTTPOptions(host="127.0.0.1", port=free_port()),
            metrics_port=free_port(),
            stats_port=free_port(),
            socket_path=f"{folder}/admin.sock",
            metrics_socket_path=f"{folder}/metrics.sock",
            server_state_base=folder,
            server_state_file=f"{folder}/server-state",
            **settings,
        )
        api = HAProxyApi(config, config_file_path=f"{folder}/haproxy.cfg")
        gateways = [
            ServerConfig(name=f"gateway-{port}", host="127.0.0.1", port=port)
            for port in gateway_ports
        ]
        backend = BackendConfig(
            name="atlas",
            path_prefix="/",
            app_name="atlas",
            servers=gateways,
            http_health_check_path="",
        )
        api.set_backend_configs({"atlas": backend})
        await api.start()
        try:
            yield api
        finally:
            await api.stop()
