"""Tools as real Ray tasks: errors cross processes, deadlines and cancellation free what they
held."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sqlite3
import textwrap
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from serve_app.config.tools import (
    BestOfConfig,
    CalculatorConfig,
    CustomToolConfig,
    FetchConfig,
    FilesConfig,
    NoneConfig,
    OpenApiConfig,
    PythonConfig,
    RetrievalConfig,
    SqlConfig,
    ToolsetConfig,
)
from serve_app.errors import ToolFailed, ToolRetry, ToolTimeout
from serve_app.tools import runner as runner_module
from serve_app.tools.base import ToolResult
from serve_app.tools.entry import run_tool
from serve_app.tools.runner import ToolRunner
from tests.web_fakes import running_site

pytestmark = [pytest.mark.serve, pytest.mark.usefixtures("ray_session")]

START_S = 120.0
"""A worker may have to start first."""


def make_runner(**settings: Any) -> ToolRunner:
    settings = {"num_cpus": 0, **settings}
    return ToolRunner(
        [
            NoneConfig(tool_id="none"),
            CalculatorConfig(tool_id="calculator", **{"timeout_s": 30, **settings}),
            PythonConfig(tool_id="python", **{"timeout_s": 30, "cpu_seconds": 60, **settings}),
            BestOfConfig(tool_id="best_of"),
        ]
    )


def replace_task(runner: ToolRunner, function: Callable[..., Any]) -> None:
    """Let the calculator's calls run another function as their Ray task."""
    runner._entries["calculator"].call = ray.remote(function).options(num_cpus=0, max_retries=0)


async def until(claim: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not claim():
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.02)


def sandboxed() -> list[psutil.Process]:
    """Supervisors and confined children of this session's sandbox servers."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = process.parent()
            if parent is not None and "sandbox/server.py" in " ".join(parent.cmdline()):
                found.append(process)
    return found


async def call(runner: ToolRunner, tool_id: str, arguments: Any) -> ToolResult:
    return await runner.run(tool_id, arguments, deadline_s=START_S)


async def test_tool_runs_in_another_process_and_reports_seconds_and_price() -> None:
    runner = make_runner(price_usd_per_call=0.25)
    result = await call(runner, "calculator", {"expression": "6 * 7"})
    assert result.text == "42"
    assert result.cost_usd == 0.25
    assert result.seconds > 0
    result = await call(runner, "python", {"code": "import os\nprint(os.getppid())"})
    assert int(result.text) != os.getpid()


async def test_a_call_of_a_toolset_runs_as_its_members_task() -> None:
    settings = {"import_path": "tests.own_tools:Notes", "price_usd_per_call": 2.0, "num_cpus": 0}
    members = ("calculator", "notes")
    runner = ToolRunner(
        [
            CalculatorConfig(tool_id="calculator", timeout_s=30, num_cpus=0),
            CustomToolConfig.model_validate({"tool_id": "notes", "timeout_s": 60} | settings),
            ToolsetConfig(tool_id="desk", description="sums and notes", members=members),
        ]
    )
    runs = [
        runner.run("desk", arguments, deadline_s=START_S, function=function)
        for function, arguments in (
            ("calculator", {"expression": "6 * 7"}),
            ("read_note", {"number": 3}),
        )
    ]
    first, second = await asyncio.gather(*runs)
    assert (first.text, first.cost_usd) == ("42", 0.0)
    assert (second.text, second.cost_usd) == ("read_note 3", 2.0)
    with pytest.raises(ToolFailed, match="'desk' has no function 'delete_note'"):
        await runner.run("desk", {}, deadline_s=START_S, function="delete_note")


async def test_a_database_and_a_folder_are_asked_in_other_processes(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "shop.db")) as database:
        database.execute("CREATE TABLE items (name TEXT)")
        database.execute("INSERT INTO items VALUES ('tea')")
        database.commit()
    runner = ToolRunner(
        [
            SqlConfig(tool_id="shop", database=tmp_path / "shop.db", num_cpus=0, timeout_s=60),
            FilesConfig(tool_id="docs", root=tmp_path, num_cpus=0),
        ]
    )
    (function,) = runner.functions("shop")
    assert function.description.endswith("Tables:\nitems(name TEXT)")
    assert (await call(runner, "shop", {"query": "SELECT name FROM items"})).text == "name\ntea"
    with pytest.raises(ToolRetry, match="only one SELECT"):
        await call(runner, "shop", {"query": "DROP TABLE items"})
    listed = await runner.run("docs", {}, deadline_s=START_S, function="docs__list")
    assert listed.data["names"] == ["shop.db"]
    arguments = {"path": "shop.db", "num_lines": 0}
    with pytest.raises(ToolRetry, match="num_lines: 0 is less than"):
        await runner.run("docs", arguments, deadline_s=START_S, function="docs__read")


async def test_retry_crosses_the_process_border_as_itself() -> None:
    runner = make_runner()
    with pytest.raises(ToolRetry, match=r"^division by zero$"):
        await call(runner, "calculator", {"expression": "1/0"})
    with pytest.raises(ToolRetry, match=r"^ValueError: no \(line 1, in <module>\)$"):
        await call(runner, "python", {"code": "raise ValueError('no')"})


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "'expression' is a required property"),
        ({"expression": 5}, "expression: 5 is not of type 'string'"),
        ({"expression": "1", "extra": 1}, "Additional properties"),
        ({"expression": ""}, "expression: '' should be non-empty"),
        ("1+1", "is not of type 'object'"),
        (None, "None is not of type 'object'"),
        ({"expression": "1" * 100_000}, "is too long"),
    ],
)
async def test_arguments_are_checked_before_anything_is_dispatched(
    arguments: Any, reason: str
) -> None:
    runner = make_runner()
    runner._entries["calculator"].call = None
    with pytest.raises(ToolRetry) as caught:
        await call(runner, "calculator", arguments)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("tool_id", ["none", "best_of", "absent"])
async def test_what_is_no_function_cannot_be_called(tool_id: str) -> None:
    with pytest.raises(ToolFailed):
        await call(make_runner(), tool_id, {})


async def test_unforeseen_error_fails_without_its_text() -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("/secret/path")

    runner = make_runner()
    replace_task(runner, broken)
    with pytest.raises(ToolFailed) as caught:
        await call(runner, "calculator", {"expression": "1"})
    assert str(caught.value) == "tool 'calculator' failed"
    assert runner.load()["calculator"] == {"running": 0, "waiting": 0}


async def test_worker_that_dies_fails_the_call_and_the_next_one_works() -> None:
    def die(*_: Any) -> None:
        os._exit(1)

    runner = make_runner()
    works = runner._entries["calculator"].call
    replace_task(runner, die)
    with pytest.raises(ToolFailed, match="its worker stopped"):
        await call(runner, "calculator", {"expression": "1"})
    runner._entries["calculator"].call = works
    assert (await call(runner, "calculator", {"expression": "2"})).text == "2"


async def test_deadline_ends_the_code_and_keeps_the_worker() -> None:
    runner = make_runner()
    await call(runner, "python", {"code": "1"})
    begin = time.monotonic()
    with pytest.raises(ToolTimeout):
        await runner.run("python", {"code": "while True: pass"}, deadline_s=0.5)
    assert time.monotonic() - begin < 5
    await until(lambda: sandboxed() == [])
    assert (await runner.run("python", {"code": "2"}, deadline_s=20)).text == "2"


async def test_own_timeout_of_the_tool_is_a_deadline_too() -> None:
    runner = make_runner()
    await call(runner, "python", {"code": "1"})
    short = make_runner(timeout_s=0.5)
    with pytest.raises(ToolTimeout, match=r"0\.5 s"):
        await call(short, "python", {"code": "while True: pass"})


async def test_a_worker_that_has_to_start_does_not_count_as_the_tool_s_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner_module, "START_S", START_S)
    cold = {"tool_id": "cold", "import_path": "tests.own_tools:Notes", "num_cpus": 0}
    runner = ToolRunner([CustomToolConfig.model_validate(cold | {"timeout_s": 0.2})])
    begin = time.monotonic()
    result = await runner.run("cold", {"number": 3}, deadline_s=START_S, function="read_note")
    assert result.text == "read_note 3"
    assert time.monotonic() - begin > 0.2  # a worker of its own had to start


async def test_a_call_past_its_tool_s_time_is_interrupted_in_its_worker() -> None:
    slow = {"tool_id": "slow", "import_path": "tests.own_tools:Slow", "num_cpus": 0}
    runner = ToolRunner([CustomToolConfig.model_validate(slow | {"timeout_s": 0.2})])
    with pytest.raises(ToolTimeout, match=r"'slow' did not finish in 0\.7 s"):
        await call(runner, "slow", {})
    assert runner.load()["slow"] == {"running": 0, "waiting": 0}


async def test_task_that_ignores_its_deadline_is_killed_and_its_place_is_free_again() -> None:
    def stubborn(*_: Any) -> None:
        while True:
            try:
                time.sleep(60)
            except BaseException:
                continue

    runner = make_runner(max_concurrency=1)
    works = runner._entries["calculator"].call
    await call(runner, "calculator", {"expression": "1"})
    replace_task(runner, stubborn)
    with pytest.raises(ToolTimeout):
        await runner.run("calculator", {"expression": "1"}, deadline_s=0.3)
    assert runner.load()["calculator"]["running"] == 1
    await until(lambda: runner.load()["calculator"]["running"] == 0)
    runner._entries["calculator"].call = works
    assert (await call(runner, "calculator", {"expression": "3"})).text == "3"


async def test_cancelled_caller_ends_the_code_and_frees_the_place() -> None:
    runner = make_runner(max_concurrency=1)
    await call(runner, "python", {"code": "1"})
    task = asyncio.create_task(call(runner, "python", {"code": "while True: pass"}))
    await until(lambda: len(sandboxed()) >= 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: sandboxed() == [])
    await until(lambda: runner.load()["python"]["running"] == 0)
    assert (await call(runner, "python", {"code": "4"})).text == "4"


async def test_caller_cancelled_in_the_queue_leaves_no_trace() -> None:
    runner = make_runner(max_concurrency=1)
    running = asyncio.create_task(
        call(runner, "python", {"code": "import time\ntime.sleep(1)\nprint('done')"})
    )
    await until(lambda: runner.load()["python"]["running"] == 1)
    waiting = asyncio.create_task(call(runner, "python", {"code": "1"}))
    await until(lambda: runner.load()["python"]["waiting"] == 1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert runner.load()["python"] == {"running": 1, "waiting": 0}
    assert (await running).text == "done"
    assert runner.load()["python"] == {"running": 0, "waiting": 0}


async def test_no_more_than_max_concurrency_run_at_once() -> None:
    def timed(*_: Any) -> ToolResult:
        begin = time.time()
        time.sleep(0.3)
        return ToolResult("", {"begin": begin, "end": time.time()})

    runner = make_runner(max_concurrency=2)
    replace_task(runner, timed)
    results = await asyncio.gather(
        *(call(runner, "calculator", {"expression": "1"}) for _ in range(6))
    )
    spans = [(result.data["begin"], result.data["end"]) for result in results]
    at_once = [sum(b <= begin < e for b, e in spans) for begin, _ in spans]
    assert max(at_once) <= 2
    assert runner.load()["calculator"] == {"running": 0, "waiting": 0}


async def test_call_beyond_the_queue_is_refused_at_once() -> None:
    def slow(*_: Any) -> ToolResult:
        time.sleep(1)
        return ToolResult("slow")

    runner = make_runner(max_concurrency=1, max_queued=1)
    replace_task(runner, slow)
    accepted = [
        asyncio.create_task(call(runner, "calculator", {"expression": "1"})) for _ in range(2)
    ]
    await until(lambda: runner.load()["calculator"] == {"running": 1, "waiting": 1})
    begin = time.monotonic()
    with pytest.raises(ToolFailed, match="busy"):
        await call(runner, "calculator", {"expression": "1"})
    assert time.monotonic() - begin < 0.2
    assert [result.text for result in await asyncio.gather(*accepted)] == ["slow", "slow"]


async def test_waiting_in_the_queue_counts_against_the_deadline() -> None:
    def slow(*_: Any) -> ToolResult:
        time.sleep(1)
        return ToolResult("slow")

    runner = make_runner(max_concurrency=1)
    replace_task(runner, slow)
    first = asyncio.create_task(call(runner, "calculator", {"expression": "1"}))
    await until(lambda: runner.load()["calculator"]["running"] == 1)
    with pytest.raises(ToolTimeout, match="busy"):
        await runner.run("calculator", {"expression": "1"}, deadline_s=0.2)
    assert (await first).text == "slow"


def call_twice_in_one_worker(
    config_json: str, queries: tuple[str, str], between: Callable[[], None]
) -> list[ToolResult]:
    """Two calls of a tool in one process; which worker takes a task is for Ray to say."""
    first, second = (
        partial(run_tool, config_json, "retrieval", {"query": query}, START_S) for query in queries
    )
    result = first()
    between()
    return [result, second()]


async def test_worker_loads_an_index_once_and_keeps_it(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"id": "a", "text": "Oslo is the capital of Norway."}))
    config = RetrievalConfig(
        tool_id="retrieval", corpus=corpus, encoder=None, cache_dir=tmp_path / "cache"
    )
    first, second = (
        await ray.remote(call_twice_in_one_worker)
        .options(num_cpus=0)
        .remote(config.model_dump_json(), ("Norway", "Oslo"), corpus.unlink)
    )
    assert first.text == "[1] Oslo is the capital of Norway.\nQuery: Norway"
    assert second.data["sources"][0]["id"] == "a#0"


async def test_start_warms_what_it_can_and_leaves_the_rest_to_its_calls(tmp_path: Path) -> None:
    runner = ToolRunner(
        [
            PythonConfig(tool_id="python", num_cpus=0),
            RetrievalConfig(tool_id="retrieval", corpus=tmp_path / "absent", num_cpus=0),
        ]
    )
    await runner.start()
    try:
        await asyncio.sleep(2.5)
        result = await runner.run("python", {"code": "1"}, deadline_s=10)
        assert result.text == "1"
        with pytest.raises(ToolFailed, match="the corpus does not exist"):
            await call(runner, "retrieval", {"query": "x"})
    finally:
        runner.close()


async def test_tools_of_the_web_run_as_tasks_and_their_refusals_cross(tmp_path: Path) -> None:
    spec = tmp_path / "api.json"
    operation = {"operationId": "read", "parameters": [
        {"name": "id", "in": "path", "required": True, "schema": {"type": "integer"}}]}  # fmt: skip
    spec.write_text(json.dumps({"openapi": "3.1.0", "paths": {"/{id}": {"get": operation}}}))
    with running_site() as site:
        site.page("/7", '{"id": 7}', "application/json")
        runner = ToolRunner(
            [
                FetchConfig(tool_id="fetch", allow=(f"127.0.0.1:{site.port}",), num_cpus=0),
                OpenApiConfig(
                    tool_id="api", description="x", spec=spec, server=site.url, num_cpus=0
                ),
            ]
        )
        page = await call(runner, "fetch", {"url": f"{site.url}/7"})
        assert page.text.endswith('{"id": 7}')
        with pytest.raises(ToolRetry, match="no public address"):
            await call(runner, "fetch", {"url": "http://127.0.0.1/"})
        (function,) = runner.functions("api")
        read = await runner.run("api", {"id": 7}, deadline_s=START_S, function=function.name)
        assert read.text.endswith('{"id":7}')
        with pytest.raises(ToolRetry, match="answers 404"):
            await runner.run("api", {"id": 8}, deadline_s=START_S, function=function.name)
        with pytest.raises(ToolRetry, match="'extra' was unexpected"):
            await runner.run(
                "api", {"id": 7, "extra": 1}, deadline_s=START_S, function=function.name
            )


async def test_ray_is_out_of_reach_of_sandboxed_code() -> None:
    node = ray._private.worker.global_worker.node
    sockets = [node.raylet_socket_name, node.plasma_store_socket_name]
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    # They are there, and reachable from here.
    for path in sockets:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
    socket.create_connection((host, int(port)), timeout=5).close()
    code = f"""
    import os, socket
    out = []
    def attempt(name, door):
        try:
            door()
            out.append(name)
        except (OSError, ImportError):
            pass
    for path in {sockets!r}:
        attempt(path, lambda: socket.socket(socket.AF_UNIX).connect(path))
    attempt('gcs', lambda: socket.create_connection(({host!r}, {port}), 2))
    attempt('session', lambda: os.listdir({node.get_session_dir_path()!r}))
    attempt('logs', lambda: open({node.get_session_dir_path()!r} + '/logs/raylet.out').read())
    attempt('shared memory', lambda: os.listdir('/dev/shm'))
    attempt('package', lambda: __import__('ray'))
    attempt('worker', lambda: open(f'/proc/{{os.getppid()}}/environ').read())
    out += [name for name in os.environ if 'RAY' in name or 'ATLAS' in name]
    print(out)
    """
    result = await call(make_runner(), "python", {"code": textwrap.dedent(code)})
    assert result.text == "[]"
