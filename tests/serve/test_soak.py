"""What the graph holds under load stays flat: half a minute here, half an hour in
`benchmarks.chaos --soak`."""

from __future__ import annotations

import asyncio
import itertools

import openai
import pytest

from benchmarks.chaos.soak import soak
from serve_app.pool.applications import serve_details
from tests.conftest import Graph

pytestmark = pytest.mark.serve

SOAK_S = 30.0
MODELS = ("atlas", "nano-math@calculator", "nano-facts@none")
CLIENTS = 6


async def test_tasks_objects_threads_and_descriptors_stay_flat_under_load(graph: Graph) -> None:
    names = {
        replica["pid"]: f"{name} {replica['replica_id']}"
        for application in serve_details()["applications"].values()
        for name, deployment in application["deployments"].items()
        for replica in deployment["replicas"]
        if replica["state"] == "RUNNING"
    }
    answered = itertools.count()

    async def ask_on(client: openai.AsyncOpenAI, number: int) -> None:
        while True:
            stream = await client.chat.completions.create(
                model=MODELS[number % len(MODELS)],
                messages=[{"role": "user", "content": f"What is {next(answered)} * 7?"}],
                max_tokens=16,
                stream=True,
            )
            async for _ in stream:
                pass

    async with openai.AsyncOpenAI(base_url=f"{graph.url}/v1", api_key="none") as client:
        asking = [asyncio.create_task(ask_on(client, number)) for number in range(CLIENTS)]
        try:
            soaked = await soak(names, SOAK_S)
        finally:
            for task in asking:
                task.cancel()
            ended = await asyncio.gather(*asking, return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError) for end in ended), ended
    assert next(answered) > 50
    assert soaked["looks"] > 5
    # Half a minute says nothing about memory.
    assert [told for told in soaked["not_flat"] if "memory_mb" not in told] == []
