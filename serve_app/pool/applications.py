"""The model applications that Serve runs, as the controller and `atlas status` see them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus

_NAME = re.compile(r"model-(?P<model_id>.+)-[0-9a-f]{8}")
_ANSWER_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class ModelApplication:
    """One Serve application that holds a model."""

    name: str
    model_id: str
    status: ApplicationStatus
    message: str
    """What Serve says of it; may be empty."""
    replicas: tuple[str, ...]
    """Actor names of the replicas that run."""

    @property
    def is_up(self) -> bool:
        """Whether it came up and can answer; one of several replicas may be missing."""
        is_hurt = self.status is ApplicationStatus.UNHEALTHY and bool(self.replicas)
        return is_hurt or self.status is ApplicationStatus.RUNNING

    @property
    def is_down(self) -> bool:
        """Whether Serve says that it cannot answer."""
        is_dead = self.status is ApplicationStatus.UNHEALTHY and not self.replicas
        return is_dead or self.status is ApplicationStatus.DEPLOY_FAILED


def model_applications() -> dict[str, ModelApplication]:
    """All of them by name; asks Serve's controller, blocking."""
    found = {}
    for name, details in serve_details()["applications"].items():
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        found[name] = ModelApplication(
            name=name,
            model_id=match["model_id"],
            status=ApplicationStatus(details["status"]),
            message=_reason(details),
            replicas=tuple(
                actor
                for deployment in details["deployments"].values()
                for actor in running_replicas(deployment)
            ),
        )
    return found


def serve_details() -> dict[str, Any]:
    """What Serve's REST API tells of every application."""
    details: dict[str, Any] = serve.context._get_global_client().get_serve_details()
    return details


def running_replicas(deployment: dict[str, Any]) -> list[str]:
    """Actor names of a deployment's replicas that run.

    A controller of Serve that was started again first has to find them; they answer meanwhile.
    """
    return [
        replica["actor_name"]
        for replica in deployment["replicas"]
        if replica["state"] in ("RUNNING", "RECOVERING")
    ]


def ongoing_requests(replicas: Sequence[str]) -> int:
    """Requests that replicas are working on; one that does not answer counts as none."""
    calls = []
    for name in replicas:
        try:
            actor = ray.get_actor(name, namespace="serve")
        except ValueError:  # gone since
            continue
        calls.append(actor.get_num_ongoing_requests.remote())
    done, _ = (
        ray.wait(calls, num_returns=len(calls), timeout=_ANSWER_TIMEOUT_S) if calls else ([], [])
    )
    total = 0
    for reference in done:
        try:
            total += ray.get(reference)
        except ray.exceptions.RayError:
            continue
    return total


def delete_application(name: str) -> None:
    """Have Serve take an application down; returns at once."""
    serve.delete(name, _blocking=False)


def _reason(details: dict[str, Any]) -> str:
    """The message that says most: a deployment's own where it has one."""
    messages = [
        deployment["message"]
        for deployment in details["deployments"].values()
        if deployment.get("message") and deployment["status"] != "HEALTHY"
    ]
    return "\n".join(messages) or str(details.get("message") or "")
