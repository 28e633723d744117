"""How far the start of a model is."""

from __future__ import annotations

import pytest
from ray.serve.schema import ApplicationStatus

from serve_app.config import CustomModelConfig
from serve_app.pool.applications import ModelApplication
from serve_app.pool.progress import ModelProgress
from serve_app.schemas import MemberState, ModelMember, StartPhase

CONFIG = CustomModelConfig(type="custom", model_id="m", import_path="somewhere:Model")


def progress(
    state: MemberState = MemberState.STARTING, began_s: float | None = 1.0
) -> ModelProgress:
    return ModelProgress(CONFIG, ModelMember("m", state), began_s=began_s)


def application(status: ApplicationStatus) -> ModelApplication:
    return ModelApplication("model-m-12345678", "m", status, "", ())


@pytest.mark.parametrize(
    ("began_s", "status", "phase"),
    [
        (None, None, StartPhase.TURN),
        (1.0, None, StartPhase.DEPLOYMENT),
        (1.0, ApplicationStatus.DEPLOYING, StartPhase.LOADING),
        (None, ApplicationStatus.RUNNING, StartPhase.ANSWERS),
    ],
)
def test_a_start_waits_for_one_thing_after_another(
    began_s: float | None, status: ApplicationStatus | None, phase: StartPhase
) -> None:
    there = None if status is None else application(status)
    assert progress(began_s=began_s).waits_for(there) is phase


@pytest.mark.parametrize("state", [MemberState.READY, MemberState.FAILED])
def test_a_model_that_is_not_starting_waits_for_nothing(state: MemberState) -> None:
    assert progress(state).waits_for(application(ApplicationStatus.DEPLOYING)) is None
