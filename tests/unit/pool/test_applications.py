"""What Serve's account of an application means for its model."""

from __future__ import annotations

from typing import Any

import pytest
from ray.serve.schema import ApplicationStatus

from serve_app.pool import applications
from serve_app.pool.applications import (
    ModelApplication,
    model_applications,
    running_replicas,
)


@pytest.mark.parametrize(
    ("status", "replicas", "is_up", "is_down"),
    [
        ("RUNNING", 2, True, False),
        ("RUNNING", 0, True, False),  # scaled to zero
        ("UNHEALTHY", 1, True, False),  # one of two is being replaced
        ("UNHEALTHY", 0, False, True),
        ("DEPLOYING", 1, False, False),
        ("DEPLOY_FAILED", 1, False, True),
    ],
)
def test_a_model_is_down_when_no_replica_is_left(
    status: str, replicas: int, is_up: bool, is_down: bool
) -> None:
    names = tuple("ab"[:replicas])
    found = ModelApplication("model-m-00000000", "m", ApplicationStatus(status), "", names)
    assert (found.is_up, found.is_down) == (is_up, is_down)


def test_replicas_that_a_new_controller_has_yet_to_find_still_run() -> None:
    states = ("RUNNING", "RECOVERING", "STARTING", "STOPPING")
    rows = [{"actor_name": state, "state": state} for state in states]
    assert running_replicas({"replicas": rows}) == ["RUNNING", "RECOVERING"]


def test_the_reason_is_the_deployments_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(message: str, *deployments: tuple[str, str]) -> dict[str, Any]:
        return {
            "status": "DEPLOY_FAILED",
            "message": message,
            "deployments": {
                str(number): {"status": status, "message": said, "replicas": []}
                for number, (status, said) in enumerate(deployments)
            },
        }

    told = {
        "model-a-00000000": row(
            "Failed to update the deployments.", ("UNHEALTHY", "ValueError: no weights")
        ),
        "model-b-00000000": row("It cannot be built.", ("HEALTHY", "")),
        "atlas": row("", ("HEALTHY", "")),
    }
    monkeypatch.setattr(applications, "serve_details", lambda: {"applications": told})
    found = model_applications()
    assert {a.model_id: a.message for a in found.values()} == {
        "a": "ValueError: no weights",
        "b": "It cannot be built.",
    }
