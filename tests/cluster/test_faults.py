"""The chaos benchmark in its shortest form: processes die, a node goes, and callers see little.

It runs as a child, because a process is in one Ray cluster only, and this one is in the session's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.chaos.actions import Done
from benchmarks.chaos.load import Answer, read_answer
from benchmarks.chaos.soak import Sample, growths
from benchmarks.chaos.verdict import Phase, cut_streams, figures
from tests.haproxy import own_haproxy

ERROR = {"error": {"message": "no", "type": "server_error", "param": None, "code": None}}
EVENT = b"data: " + json.dumps(ERROR).encode() + b"\n\n"
CHUNK = b'data: {"choices": []}\n\n'


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a short run wrote: a gateway and an engine killed, a node removed."""
    out = tmp_path_factory.mktemp("chaos") / "chaos.json"
    command = [
        *(sys.executable, "-m", "benchmarks.chaos", "--out", str(out), "--seed", "1"),
        *("--calm-requests", "0", "--rate", "10", "--workers", "2", "--once"),
        *("--actions", "kill gateway,kill engine,remove node"),
    ]
    environment = os.environ | own_haproxy()
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    written: dict[str, Any] = json.loads(out.read_text())
    return written


@pytest.mark.serve
def test_only_what_was_in_flight_at_a_kill_fails(record: dict[str, Any]) -> None:
    (storm,) = record["phases"]
    assert storm["requests"] > 100
    assert storm["failed_otherwise"] == 0, storm["failures"]


@pytest.mark.serve
def test_no_request_outlives_its_deadline(record: dict[str, Any]) -> None:
    (storm,) = record["phases"]
    assert storm["too_late"] == 0


@pytest.mark.serve
def test_everything_comes_back_after_each_fault(record: dict[str, Any]) -> None:
    (storm,) = record["phases"]
    done = [action["name"] for action in storm["actions"]]
    assert done == ["kill gateway", "kill engine", "remove node", "add node"]
    assert [a for a in storm["actions"] if a["missing"]] == []


@pytest.mark.serve
def test_nothing_is_left_behind(record: dict[str, Any]) -> None:
    assert record["orphans"] == {"applications": [], "tasks": [], "processes": []}


@pytest.mark.parametrize(
    ("status", "body", "streamed", "ending"),
    [
        (200, CHUNK + b"data: [DONE]\n\n", True, "whole"),
        (200, CHUNK + EVENT, True, "error_event"),
        (200, CHUNK, True, "cut"),
        (200, b"", True, "cut"),
        (200, b'{"choices": [{"message": {"content": "hi"}}]}', False, "whole"),
        (503, json.dumps(ERROR).encode(), False, "refused"),
        (500, b"Internal Server Error", False, "malformed"),
        (503, json.dumps(ERROR).encode(), True, "refused"),
    ],
)
def test_how_an_answer_ended_is_read_from_it(
    status: int, body: bytes, streamed: bool, ending: str
) -> None:
    assert read_answer(status, body, streamed=streamed)[0] == ending


def test_a_failure_counts_against_us_unless_it_was_in_flight_at_a_kill() -> None:
    kill = Done("kill gateway", 100.0, done_unix_s=100.1)
    update = Done("update model", 200.0, done_unix_s=200.1)
    answers = [
        Answer(99.9, 150.0, "routed", False, "malformed", 500),
        Answer(99.0, 150.0, "routed", False, "malformed", 500),
        Answer(100.05, 300.0, "routed", True, "cut", 200),
        Answer(200.0, 300.0, "routed", True, "cut", 200),
        Answer(200.0, 300.0, "routed", False, "whole", 200),
        Answer(200.0, 12_000.0, "routed", False, "whole", 200),
    ]
    phase = Phase("storm", 90.0, 300.0, [kill, update])
    found = figures(phase, answers, deadline_s=10.0)
    assert (found["failed"], found["failed_otherwise"], found["too_late"]) == (4, 2, 1)
    assert found["in_flight_at_a_kill"] == 2
    assert cut_streams(answers, phase.actions) == (1, 1)


def test_growth_is_told_from_noise() -> None:
    def sample(second: int, process: str, memory_mb: float) -> Sample:
        return Sample(float(second), process, memory_mb, 20.0, 8.0, 0.0, 5.0)

    samples = []
    for second in range(0, 600, 5):
        samples.append(sample(second, "leaks", 200 + second / 10))
        samples.append(sample(second, "noisy", 200 + (second % 15)))
        samples.append(sample(second, "warms up", 300 if second > 100 else 200))
        if second < 100:
            samples.append(sample(second, "was replaced", 200 + second))
    rising = [(growth.process, growth.what) for growth in growths(samples) if not growth.is_flat]
    assert rising == [("leaks", "memory_mb")]
