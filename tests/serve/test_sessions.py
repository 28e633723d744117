"""Sessions on real replicas: the calls of one go to the same replica, the others to any."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest
import ray
from ray import serve

from serve_app.budget import Deadline
from serve_app.config.models import CustomModelConfig
from serve_app.models.clients import ModelClients
from serve_app.models.deploy import DEPLOYING, build_model
from serve_app.models.protocol import ChatBody

pytestmark = [pytest.mark.serve, pytest.mark.usefixtures("ray_session")]


class Tells:
    """An engine that answers with the id of its process."""

    async def complete(self, body: ChatBody) -> dict[str, Any]:
        message = {"role": "assistant", "content": str(os.getpid())}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return {"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}


@pytest.fixture
def two_replicas() -> Any:
    config = CustomModelConfig.model_validate(
        {
            "type": "custom",
            "model_id": "tells",
            "import_path": "tests.serve.test_sessions:Tells",
            "num_cpus": 0,
            "autoscaling": {"min_replicas": 2, "max_replicas": 2},
        }
    )
    name = "tells-alone"  # an application named like a model's, and not in the pool, is deleted
    ray.get(ray.remote(num_cpus=0, runtime_env=DEPLOYING)(_deploy).remote(config, name))
    yield name
    serve.delete(name)


def _deploy(config: CustomModelConfig, name: str) -> None:
    serve.run(build_model(config), name=name, route_prefix=None)


async def test_calls_of_a_session_go_to_one_replica(two_replicas: str) -> None:
    clients = ModelClients()
    clients.use({"tells": two_replicas})

    async def replica(session: str) -> str:
        body: ChatBody = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 8}
        answer = await clients.complete("tells", body, Deadline.after(60), session)
        text: str = answer["choices"][0]["message"]["content"]
        return text

    of_sessions = [{await replica(f"session {number}") for _ in range(6)} for number in range(12)]
    assert [len(replicas) for replicas in of_sessions] == [1] * 12
    assert len(set.union(*of_sessions)) == 2
    spread = set(await asyncio.gather(*(replica("") for _ in range(40))))
    assert len(spread) == 2
