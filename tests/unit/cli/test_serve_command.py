"""What `atlas serve` says of the pool while it runs, and how its process ends."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from rich.console import Console

from serve_app.cli import app as cli
from serve_app.schemas import MemberState, ModelMember, Pair, PoolState, StartPhase

UP = ModelMember("up", MemberState.READY)
STARTING = ModelMember("late", MemberState.STARTING)
READY = ModelMember("late", MemberState.READY)
PAIRS = (Pair("up", "none"), Pair("late", "none"), Pair("late", "python"))


def failed(*, retry_in_s: float | None) -> ModelMember:
    retry_unix_s = None if retry_in_s is None else time.time() + retry_in_s
    return ModelMember("late", MemberState.FAILED, "ValueError: no", retry_unix_s=retry_unix_s)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    text = io.StringIO()
    monkeypatch.setattr(cli, "console", Console(file=text, width=200))
    return text


def follow(*members: ModelMember) -> None:
    """Run through some states of a model, beside one that is up; ends as by Ctrl-C."""

    def states() -> Iterator[PoolState]:
        for version, member in enumerate(members):
            yield PoolState(version, (UP, member), ("none", "python"), PAIRS)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cli._follow_pool(states(), "http://here/v1", time.monotonic())


def ready_lines(text: str) -> list[str]:
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("ready"))
    return lines[first:]


def test_ready_is_said_when_all_are(said: io.StringIO) -> None:
    follow(STARTING, READY)
    assert ready_lines(said.getvalue())[0].startswith("ready at http://here/v1   (Ctrl-C")


def test_a_start_says_what_it_waits_for(said: io.StringIO) -> None:
    follow(*(replace(STARTING, waits_for=phase) for phase in StartPhase), READY)
    lines = [line.strip().partition(" s  ")[2] for line in said.getvalue().splitlines()]
    assert [line for line in lines if line.startswith("late")] == [
        "late starting: waits for its turn",
        "late starting: waits for its deployment",
        "late starting: waits for its replica to load",
        "late starting: waits for its first answers",
        "late ready",
    ]


def test_ready_names_what_is_missing_and_why_and_when_it_is_tried_again(said: io.StringIO) -> None:
    follow(STARTING, failed(retry_in_s=30.4))
    first, second, *_ = ready_lines(said.getvalue())
    assert first == "ready at http://here/v1, but without late:"
    assert second == "  late failed: ValueError: no; tried again in 30 s"


def test_a_pair_that_does_not_answer_is_missing_too(said: io.StringIO) -> None:
    cold = frozenset({"python"})
    follow(ModelMember("late", MemberState.READY, "with python: no", cold_tools=cold))
    first, second, *_ = ready_lines(said.getvalue())
    assert first.endswith("but without late@python:")
    assert second == "  late ready: with python: no; being tried again"


def test_what_becomes_ready_later_is_reported(said: io.StringIO) -> None:
    follow(failed(retry_in_s=30), failed(retry_in_s=None), READY)
    later = [line.strip().partition(" s  ")[2] for line in ready_lines(said.getvalue())[-3:]]
    assert later[0] == "late failed: ValueError: no; being tried again"
    assert later[1] == "late ready"
    assert said.getvalue().endswith("everything is ready\n")


def test_what_fails_later_is_reported(said: io.StringIO) -> None:
    follow(READY, failed(retry_in_s=60.4))
    assert said.getvalue().endswith("late failed: ValueError: no; tried again in 60 s\n")
    assert "everything" not in said.getvalue()


def test_what_did_not_change_is_said_once(said: io.StringIO) -> None:
    member = failed(retry_in_s=60.4)
    follow(READY, member, member, member)
    assert said.getvalue().count("ValueError") == 1


ENDING = """
import atexit, threading, ray
from serve_app.running import end_process

atexit.unregister(ray.shutdown)
ray.shutdown = threading.Event().wait  # as where the cluster does not answer
atexit.register(ray.shutdown)
atexit.register(print, "the other handlers ran")
threading.Thread(target=threading.Event().wait).start()
print("said last")
end_process(3)
"""


def test_the_process_ends_though_rays_exit_handler_and_a_thread_would_wait() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", ENDING], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.stdout == "said last\nthe other handlers ran\n"
    assert ended.returncode == 3
