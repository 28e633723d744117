"""Two processes may import `ray.serve.llm` at once: its connectors are in the registry by then."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from typing import Any

import pytest
import ray

from serve_app.config import CustomModelConfig, LocalModelConfig
from serve_app.models import deploy

PROGRAM = """
import importlib, sys
from ray.experimental import internal_kv

FACTORY = "ray.llm._internal.serve.engines.vllm.kv_transfer.factory"
REGISTRY = "ray.llm._internal.serve.utils.registry"
held, looked = {}, set()

def exists(key):
    # Another process is where this one is: it enters the key right after this one has looked.
    if is_racing and key not in looked:
        looked.add(key)
        return key in held or held.update({key: b""})
    return key in held

internal_kv._internal_kv_initialized = lambda: True
internal_kv._internal_kv_exists = exists
internal_kv._internal_kv_put = lambda key, value, overwrite: held.update({key: value})

def in_a_new_process(work):
    for name in (FACTORY, REGISTRY):
        sys.modules.pop(name, None)
    try:
        work()
    except ValueError as error:
        print("failed:", error)
    else:
        print("fine,", len(held), "entered")

is_racing = True
in_a_new_process(lambda: importlib.import_module(FACTORY))
held.clear(), looked.clear()
is_racing = False
from serve_app.models.deploy import register_connectors
in_a_new_process(register_connectors)
is_racing = True
in_a_new_process(lambda: importlib.import_module(FACTORY))
print("vllm" in sys.modules)
"""


def test_the_race_is_over_once_one_process_has_registered_the_connectors() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True
    )
    without, controllers, later, vllm = run.stdout.splitlines()
    assert "already registered" in without
    assert re.fullmatch("fine, [1-9] entered", controllers)
    assert later == controllers
    assert vllm == "False", "the controller must not carry vLLM"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LocalModelConfig(type="local", model_id="m", model_source="/w"), ["register", "deploy"]),
        (CustomModelConfig(type="custom", model_id="m", import_path="a:B"), ["deploy"]),
    ],
    ids=["local", "custom"],
)
def test_they_are_registered_before_a_process_is_started_that_needs_them(
    config: Any, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    class Actor:
        """Stands for the deployer's process."""

        deploy = property(lambda self: self)

        def remote(self, *arguments: Any) -> Any:
            if not arguments:
                return self
            done.append("deploy")
            return asyncio.sleep(0)

    monkeypatch.setattr(deploy, "register_connectors", lambda: done.append("register"))
    monkeypatch.setattr(ray, "remote", lambda **options: lambda actor_class: Actor())
    monkeypatch.setattr(ray, "kill", lambda actor: done.append("end"))
    asyncio.run(deploy.DeployerProcess().deploy(config))
    assert done == [*expected, "end"]


async def test_models_that_start_together_share_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    may_end = asyncio.Event()

    class Actor:
        """Stands for the deployer's process."""

        deploy = property(lambda self: self)

        def __init__(self) -> None:
            done.append("process")

        def remote(self, *arguments: Any) -> Any:
            return may_end.wait() if arguments else self

    monkeypatch.setattr(ray, "remote", lambda **options: lambda actor_class: Actor())
    monkeypatch.setattr(ray, "kill", lambda actor: done.append("end"))
    deployer = deploy.DeployerProcess()
    models = [CustomModelConfig(type="custom", model_id=name, import_path="a:B") for name in "abc"]
    deploys = [asyncio.create_task(deployer.deploy(model)) for model in models]
    await asyncio.sleep(0)
    may_end.set()
    await asyncio.gather(*deploys)
    assert done == ["process", "end"]
    await deployer.deploy(models[0])
    assert done == ["process", "end"] * 2
