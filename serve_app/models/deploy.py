"""Puts one model's Serve application in place.

Runs in a process of its own, because naming a vLLM deployment imports vLLM (11 s and 0.8 GB here),
which neither the controller nor the gateway should carry. Models that start together share it.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import json
from typing import Any

import ray
from ray import serve
from ray.serve.deployment import Application

from serve_app.config import LocalModelConfig, ModelConfig, RemoteModelConfig
from serve_app.models.boundary import guarded
from serve_app.models.protocol import HEALTH_CHECK_PERIOD_S
from serve_app.models.session_router import session_routing
from serve_app.telemetry import SERVE_LOGGING

DEPLOYING: dict[str, Any] = {"env_vars": {"RAY_SERVE_ENABLE_HA_PROXY": "0"}}
"""Runtime environment of the deployer. With HAProxy on, Serve refuses a router
of its own for an application's first deployment, because HAProxy passes it by; but a model's
application has no route, and all its calls come from handles."""


def deployment_name(config: ModelConfig) -> str:
    """Name of a model's deployment; holds a fingerprint of what needs a new application."""
    settings = config.model_dump(
        mode="json", exclude={"card", "capabilities", "price", "tools", "max_completion_tokens"}
    )
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return f"{config.model_id}-{digest}"


def application_name(config: ModelConfig) -> str:
    """Name of the Serve application of a model with these settings."""
    return f"model-{deployment_name(config)}"


def build_model(config: ModelConfig) -> Application:
    """The Serve application of a model of any type.

    Raises:
        ImportError: If a custom class cannot be imported.
    """
    if isinstance(config, LocalModelConfig):
        from serve_app.models.local import build_local

        return build_local(config, deployment_name(config))
    options: dict[str, Any] = {
        "name": deployment_name(config),
        "autoscaling_config": config.autoscaling.model_dump(),
        "max_ongoing_requests": config.max_ongoing_requests,
        "max_constructor_retry_count": 1,  # the controller tries again, with its pauses
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "logging_config": SERVE_LOGGING,
        "request_router_config": session_routing(),
    }
    if isinstance(config, RemoteModelConfig):
        from serve_app.models.remote import RemoteModel

        return serve.deployment(RemoteModel, ray_actor_options={"num_cpus": 0}, **options).bind(
            config
        )
    module_name, _, class_name = config.import_path.partition(":")
    custom: Any = guarded(getattr(importlib.import_module(module_name), class_name))
    deployment = serve.deployment(
        custom, ray_actor_options={"num_cpus": config.num_cpus}, **options
    )
    return deployment.bind(**config.settings)


def register_connectors() -> None:
    """Enter Ray's connectors for vLLM's key-value cache in the cluster's registry.

    Importing `ray.serve.llm` does so where they are missing: it looks, and enters. Of two processes
    that do so at once, the second one's import fails ("already registered"). So the controller,
    which is one process, enters them before any process that imports `ray.serve.llm` is started.
    Costs milliseconds: vLLM is not imported.
    """
    importlib.import_module("ray.llm._internal.serve.engines.vllm.kv_transfer.factory")


class Deployer:
    """Hands models' applications to Serve; an actor."""

    def deploy(self, config: ModelConfig) -> None:
        """Hand one application to Serve and return at once; Serve brings it up."""
        name = application_name(config)
        target = serve.RunTarget(build_model(config), name=name, route_prefix=None)
        serve.run_many(
            [target],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )


class DeployerProcess:
    """The deployer as the controller knows it: a process that lives while a model needs it."""

    def __init__(self) -> None:
        self._actor: ray.actor.ActorHandle | None = None
        self._under_way = 0

    async def deploy(self, config: ModelConfig) -> None:
        """Hand a model's application to Serve, beside others or after them.

        Raises:
            Exception: Whatever Ray, Serve or the model's own code raises.
        """
        if isinstance(config, LocalModelConfig):
            await asyncio.to_thread(register_connectors)
        if self._actor is None:
            self._actor = ray.remote(num_cpus=0, runtime_env=DEPLOYING)(Deployer).remote()
        self._under_way += 1
        try:
            await self._actor.deploy.remote(config)
        finally:
            self._under_way -= 1
            if not self._under_way:
                ray.kill(self._actor)
                self._actor = None
