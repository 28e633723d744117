"""build_app: the deployment graph of a configuration, and the only place of a `.bind()` of ours.

client -> Gateway -> Embedder
                  -> Router -> Embedder (once, for the cards)
                  -> model-<id> applications, kept up by PoolController
                  -> tools (Ray tasks)
"""

# Without `from __future__ import annotations`: Serve reads the argument type of `build_app` at run
# time.

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve.deployment import Application

from serve_app.config import DeploymentConfig, load_config
from serve_app.embedder import Embedder
from serve_app.gateway.deployment import Gateway
from serve_app.pool.controller import PoolController
from serve_app.router.deployment import Router
from serve_app.telemetry import SERVE_LOGGING
from serve_app.tools.builtin.toolset import check_tools

APP_NAME = "atlas"
"""Name of the Serve application with the gateway."""


class BuildArgs(BaseModel):
    """Arguments of `serve run serve_app:build_app key=value …`."""

    model_config = ConfigDict(extra="forbid")

    config: str
    """Path of the configuration file."""
    revision: str = ""
    """Any text. Serve builds an application again only if its arguments change: change this one to
    deploy edited settings of the gateway, the router or the embedder."""


def build_app(args: BuildArgs) -> Application:
    """The whole graph as one Serve application; the models follow as their own.

    Raises:
        ConfigError: If the configuration cannot work; the message names the setting.
    """
    config = load_config(args.config)
    check_tools(config.tools)
    controller = serve.deployment(
        PoolController,
        ray_actor_options={"num_cpus": 0, "resources": config.pool.resources},
        max_ongoing_requests=10_000,
    ).bind(config, str(Path(args.config).absolute()))
    embedder = serve.deployment(Embedder, **_options(config.embedder.deployment)).bind(config)
    router = serve.deployment(Router, **_options(config.router.deployment)).bind(
        config, embedder, controller
    )
    gateway = serve.deployment(Gateway, **_options(config.gateway.deployment))
    return gateway.bind(config, embedder, router, controller)


def _options(config: DeploymentConfig) -> dict[str, Any]:
    """Our settings in Serve's names."""
    return {
        "ray_actor_options": {"num_cpus": config.num_cpus, "resources": config.resources},
        "max_ongoing_requests": config.max_ongoing_requests,
        "max_replicas_per_node": config.max_replicas_per_node,
        "autoscaling_config": config.autoscaling.model_dump(),
        "logging_config": SERVE_LOGGING,
    }
