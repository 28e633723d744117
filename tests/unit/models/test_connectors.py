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
from serve_app.pool import controller
from serve_app.pool.controller import PoolController
from serve_app.schemas import MemberState, ModelMember

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
    done = []

    class Task:
        def remote(self, config: Any) -> Any:
            done.append("deploy")
            return asyncio.sleep(0)

    monkeypatch.setattr(controller, "register_connectors", lambda: done.append("register"))
    monkeypatch.setattr(ray, "remote", lambda **options: lambda function: Task())
    model = controller._Model(config, ModelMember("m", MemberState.STARTING))
    asyncio.run(PoolController._start(object.__new__(PoolController), model))
    assert done == expected
