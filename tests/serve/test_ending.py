"""`atlas serve` leaves no process behind, however it ends; on whole graphs of their own.

Two graphs start while a third ends, which is mostly waiting. All but the first three cases listen
on the ports of one that has ended, so each of them also shows that a start after an end works.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import BoundedSemaphore
from typing import Any

import httpx
import psutil
import pytest
import yaml

from benchmarks.ports import free_port
from tests.haproxy import own_haproxy

pytestmark = [pytest.mark.serve, pytest.mark.timeout(600)]

START_S = 420
GONE_S = 30
SERVE = """
import signal
# What runs these tests may ignore both, as `nohup` does.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from rl.cli.app import main
main()
"""
Json = dict[str, Any]

SCRIPTED: Json = {"type": "custom", "import_path": "tests.fakes:WithHelper", "num_cpus": 0}
ENGINE: Json = {
    "type": "local",
    "model_source": str(Path("configs/nano/weights/nano-math").absolute()),
    "bundle": {"CPU": 0.2},
    "num_cpus": 0.05,
    "engine_kwargs": {
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 1024,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": 64 << 20,
        "distributed_executor_backend": "uni",
    },
    "env": {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    },
}


class Served:
    """An `atlas serve` and every process that it started."""

    def __init__(self, config: Path, environment: dict[str, str], port: int, output: Path) -> None:
        self._output = output
        command = [sys.executable, "-c", SERVE, "serve"]
        with output.open("w") as file:
            self.process = psutil.Popen(
                [*command, "--config", str(config), "--port", str(port)],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started: list[psutil.Process] = []
        try:
            self._wait_until(lambda: "ready at" in self.said(), START_S)
            self.started = self.process.children(recursive=True)
            body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
        except BaseException:
            self.end()
            raise

    def said(self) -> str:
        return self._output.read_text()

    def child(self, name: str) -> psutil.Process:
        (found,) = [process for process in self.started if process.name() == name]
        return found

    def left(self) -> list[psutil.Process]:
        return [p for p in self.started if _is_alive(p)]

    def wait_until_gone(self) -> int:
        """Returns the exit code."""
        self._wait_until(lambda: not _is_alive(self.process) and not self.left(), GONE_S)
        code: int = self.process.wait()
        return code

    def end(self) -> None:
        """After a failure: leave nothing for the next test."""
        for process in (self.process, *self.started):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _wait_until(self, claim: Callable[[], bool], within_s: float) -> None:
        ends_s = time.monotonic() + within_s
        while not claim():
            assert time.monotonic() < ends_s, f"{self.left()}\n{self.said()}"
            time.sleep(0.1)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def to_the_process(number: signal.Signals) -> Callable[[Served], None]:
    return lambda served: served.process.send_signal(number)


def to_the_group(number: signal.Signals) -> Callable[[Served], None]:
    return lambda served: os.killpg(served.process.pid, number)


def kill_raylet(served: Served) -> None:
    served.child("raylet").kill()


def terminate_a_stuck_one(served: Served) -> None:
    """SIGTERM where a process of Ray answers nobody any more."""
    served.child("gcs_server").suspend()
    served.process.terminate()


@dataclass(frozen=True)
class Ending:
    """One way in which `atlas serve` ends, and what it says and leaves as its exit code then."""

    model: Json
    end: Callable[[Served], None]
    code: int
    says: str


@dataclass(frozen=True)
class Ended:
    code: int
    said: str
    names: frozenset[str]
    """Of the processes that it had started."""


CASES = {
    "engine-kill": Ending(ENGINE, to_the_process(signal.SIGKILL), -9, "ready at"),
    "int": Ending(SCRIPTED, to_the_process(signal.SIGINT), 0, "stopped"),
    "term": Ending(SCRIPTED, to_the_process(signal.SIGTERM), 0, "stopped"),
    "hup": Ending(SCRIPTED, to_the_process(signal.SIGHUP), 0, "stopped"),
    "group-int": Ending(SCRIPTED, to_the_group(signal.SIGINT), 0, "stopped"),
    "group-term": Ending(SCRIPTED, to_the_group(signal.SIGTERM), 0, "stopped"),
    "group-hup": Ending(SCRIPTED, to_the_group(signal.SIGHUP), 0, "stopped"),
    "group-kill": Ending(SCRIPTED, to_the_group(signal.SIGKILL), -9, "ready at"),
    "stuck": Ending(SCRIPTED, terminate_a_stuck_one, 0, "did not end in order"),
    "raylet": Ending(SCRIPTED, kill_raylet, 1, "'raylet' has ended"),
}


class Place:
    """A folder and ports of one graph at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port()
        self._environment = {**os.environ, **own_haproxy(), "ATLAS_DATA_DIR": str(folder / "data")}

    def serve(self, model: Json) -> Served:
        """Start `atlas serve` with one model `m`."""
        config = self._folder / "config.yaml"
        pool = {"models": [{"model_id": "m", **model}]}
        config.write_text(yaml.safe_dump(pool))
        return Served(config, self._environment, self._port, self._folder / "output")


@pytest.fixture(scope="module")
def ended(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Ended]]]:
    """The cases that are asked for, each when it has ended."""
    places: SimpleQueue[Place] = SimpleQueue()
    for _ in range(3):
        places.put(Place(tmp_path_factory.mktemp("ending")))
    start = BoundedSemaphore(2)

    def run(case: Ending) -> Ended:
        place = places.get()
        try:
            with start:
                served = place.serve(case.model)
            try:
                names = frozenset(process.name() for process in served.started)
                case.end(served)
                return Ended(served.wait_until_gone(), served.said(), names)
            finally:
                served.end()
        finally:
            places.put(place)

    asked = [
        str(item.callspec.params["case"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.function is test_nothing_is_left
    ]
    with ThreadPoolExecutor(3) as threads:
        yield {case: threads.submit(run, CASES[case]) for case in asked}
        threads.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_left(ended: dict[str, Future[Ended]], case: str) -> None:
    how = ended[case].result()
    assert {"gcs_server", "raylet", "haproxy"} <= how.names
    assert how.code == CASES[case].code
    assert CASES[case].says in how.said
    assert "Traceback" not in how.said
