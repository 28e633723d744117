"""The engines of the running graph, as processes."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.conftest import Graph

pytestmark = [pytest.mark.serve, pytest.mark.serial]


def heap_of(process: psutil.Process) -> str:
    """Where a process has its heap: a new program has another place each time, a fork has not."""
    maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    (heap,) = [line for line in maps if line.endswith("[heap]")]
    return heap.partition("-")[0]


def test_an_engine_is_a_fork_of_its_replica(graph: Graph) -> None:
    processes = psutil.Process().children(recursive=True)
    engines = [of for of in processes if of.cmdline()[:1] == ["VLLM::EngineCore"]]
    assert len(engines) == 3
    for engine in engines:
        replica = engine.parent()
        assert replica is not None
        assert "ServeReplica:model-nano" in replica.cmdline()[0]
        assert heap_of(engine) == heap_of(replica)
