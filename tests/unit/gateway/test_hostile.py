"""Hostile requests and engines against a real gateway: each gets an answer of the right class.

The parts are the benchmark's: gateway, model and stub engine, each a process. What the benchmark
measures, time and memory, is left to it, and so are cases that only end when their time is up.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress

import httpx2
import pytest

from benchmarks.hostile.__main__ import ROOT, running, send
from benchmarks.hostile.cases import CASES, CHAT, Case, body
from benchmarks.ports import free_port
from tests.gateway_fakes import eventually

_LONG = ("endless", "without end", "100 MiB")
CHEAP = [case for case in CASES if not any(word in case.name for word in _LONG)]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(tmp_path_factory.mktemp("hostile")) as (url, _, _):
        yield url


def test_the_benchmark_has_its_cases_each_under_one_name() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names)) >= 40
    assert len(CHEAP) >= 100


@pytest.mark.parametrize("case", CHEAP, ids=lambda case: case.name)
async def test_a_hostile_case_gets_its_status_and_the_gateway_lives(
    gateway: str, case: Case
) -> None:
    async with httpx2.AsyncClient(base_url=gateway, timeout=60) as client:
        status = await send(client, case, case.make(CHEAP.index(case)))
        assert status // 100 in case.wanted, status
        assert (await client.get("/healthz")).status_code == 200


def test_after_all_of_them_a_good_request_is_answered(gateway: str) -> None:
    headers = {"content-type": "application/json"}

    def is_answered() -> bool:
        url = f"{gateway}{CHAT}"
        return bool(httpx2.post(url, content=body(), headers=headers).status_code == 200)

    assert eventually(is_answered, 60)  # the model may still read what an engine said last


def test_an_endless_answer_does_not_keep_the_stub_engine_from_ending() -> None:
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.hostile.engine", str(port)]
    with subprocess.Popen(command, cwd=ROOT) as engine:
        try:
            url = f"http://127.0.0.1:{port}{CHAT}"
            asked = body(messages=[{"role": "user", "content": "endless comments"}], stream=True)
            assert eventually(lambda: listens(port), 60)
            with httpx2.stream("POST", url, content=asked, timeout=60) as answer:
                pieces = answer.iter_raw()
                next(pieces)
                engine.send_signal(signal.SIGTERM)
                with suppress(httpx2.HTTPError):
                    while engine.poll() is None:
                        next(pieces, None)  # until it breaks off
            assert eventually(lambda: engine.poll() is not None, 60)
        finally:
            engine.kill()


def listens(port: int) -> bool:
    try:
        httpx2.get(f"http://127.0.0.1:{port}/")
    except httpx2.ConnectError:
        return False
    return True
