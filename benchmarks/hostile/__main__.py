"""Does a hostile request, engine or model text hold a gateway, fill it, or get the wrong answer?

How to run: `python -m benchmarks.hostile --out FILE.json`. It starts one real gateway without Ray
(`gateway`), its remote model and a stub engine (`engine`), sends each case of `cases` by itself,
and asks for `/healthz` every 5 ms meanwhile. The least of up to three tries counts as the delay, as
other work on the machine delays too: how much, a control without any request shows. What the
gateway's event loop spends in one callback is measured in time of its own processor.

Results to expect: no callback above 50 ms, no delay above 100 ms on an otherwise idle machine,
memory that grows by less than 64 MiB in any case, and for every request the class of status that is
right. See `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx2
import psutil
from rich.console import Console

from benchmarks.hostile.cases import CASES, CHAT, Case, body
from benchmarks.hostile.gateway import WATCH_FILE, LoopWatch
from benchmarks.ports import free_port
from benchmarks.serving import machine, show_targets
from benchmarks.stats import Target
from serve_app.watchdog import watched

ROOT = Path(__file__).parent.parent.parent
MAX_HELD_MS = 50.0
MAX_DELAY_MS = 100.0
MAX_GROWTH_MIB = 64.0
"""A body of 1 MiB parses to a third of it; what an engine may say in one answer is the rest."""
TRIES = 3
_PROBE_EVERY_S = 0.005
_CONTROL_S = 3.0
_START_TIMEOUT_S = 300.0
_SETTLE_TIMEOUT_S = 60.0
_REQUEST_TIMEOUT_S = 30.0

console = Console()


@dataclass(frozen=True, slots=True)
class Result:
    """What one case did."""

    name: str
    status: int
    """The last one; 0: none came."""
    is_right: bool
    delay_ms: float
    """The longest time that `/healthz` took."""
    held_ms: float
    """The longest callback of the gateway's event loop, in time of its processor."""
    growth_mib: float
    """The gateway's memory at its highest less what it was before."""
    seconds: float
    """Of the last try, to the last byte."""
    model_busy_s: float
    """How long the remote model's process, which read the engine's answer, then kept others
    waiting."""


@contextmanager
def running(folder: Path) -> Iterator[tuple[str, psutil.Process, LoopWatch]]:
    """The gateway's address, its process, and the watch of its event loop."""
    port, engine_port = free_port(), free_port()
    modules = (
        ("benchmarks.hostile.engine", str(engine_port)),
        ("benchmarks.hostile.gateway", str(port), str(engine_port), str(folder), "model"),
        ("benchmarks.hostile.gateway", str(port), str(engine_port), str(folder)),
    )
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for command in modules:
            processes.append(subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT))
        url = f"http://127.0.0.1:{port}"
        ends_s = time.monotonic() + _START_TIMEOUT_S
        while not _answers(url):
            if time.monotonic() > ends_s or any(p.poll() is not None for p in processes):
                raise RuntimeError("the gateway, its model or the engine did not start")
            time.sleep(0.1)
        yield url, psutil.Process(processes[-1].pid), LoopWatch(folder / WATCH_FILE)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(url: str) -> bool:
    """Whether gateway, model and engine answer."""
    with suppress(httpx2.HTTPError):
        asked = httpx2.post(
            f"{url}/v1/chat/completions",
            content=body(),
            headers={"content-type": "application/json"},
            timeout=5,
        )
        return asked.status_code == 200
    return False


async def _watch(port: int, process: psutil.Process, seen: list[float]) -> None:
    """Ask for `/healthz` until cancelled; keeps the worst delay and the most memory in `seen`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        while True:
            began_s = time.perf_counter()
            writer.write(b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            length = head.lower().split(b"content-length:")[1].split(b"\r\n")[0]
            await reader.readexactly(int(length))
            seen[0] = max(seen[0], 1000 * (time.perf_counter() - began_s))
            seen[1] = max(seen[1], process.memory_info().rss / 2**20)
            await asyncio.sleep(_PROBE_EVERY_S)
    finally:
        writer.close()


async def send(client: httpx2.AsyncClient, case: Case, content: bytes) -> int:
    """The status of a case; of a stream that breaks off, that of the error in it.

    A client that leaves is no answer: 0.
    """
    headers = {"content-type": "application/json"} | case.headers
    size, tail, status = 0, b"", 0
    try:
        async with asyncio.timeout(_REQUEST_TIMEOUT_S):
            async with client.stream("POST", case.path, content=content, headers=headers) as reply:
                status = reply.status_code
                async for part in reply.aiter_bytes():
                    size += len(part)
                    tail = (tail + part)[-4096:]
    except (httpx2.HTTPError, TimeoutError):
        return 0
    return 500 if b'data: {"error":' in tail else status


async def _settle(client: httpx2.AsyncClient) -> float:
    """Wait until the model answers again, so that each case meets a model at rest."""
    began_s = time.monotonic()
    ends_s = began_s + _SETTLE_TIMEOUT_S
    while time.monotonic() < ends_s:
        with suppress(httpx2.HTTPError):
            headers = {"content-type": "application/json"}
            reply = await client.post(CHAT, content=body(), headers=headers)
            if reply.status_code == 200:
                break
    return time.monotonic() - began_s


async def measure(
    url: str, process: psutil.Process, watch: LoopWatch, cases: Sequence[Case], tries: int = TRIES
) -> list[Result]:
    """Send the cases, one after the other."""
    port = int(url.rpartition(":")[2])
    results = []
    async with httpx2.AsyncClient(base_url=url, timeout=_REQUEST_TIMEOUT_S) as client:
        for number, case in enumerate(cases):
            delay_ms = held_ms = float("inf")
            growth_mib = 0.0
            status, seconds, busy_s = 0, 0.0, 0.0
            for attempt in range(tries):
                content = case.make(number * tries + attempt)
                before = process.memory_info().rss / 2**20
                seen = [0.0, before]
                watch.take_ms()
                watching = asyncio.create_task(_watch(port, process, seen))
                await asyncio.sleep(4 * _PROBE_EVERY_S)
                began_s = time.monotonic()
                status = await send(client, case, content)
                seconds = time.monotonic() - began_s
                await asyncio.sleep(4 * _PROBE_EVERY_S)
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
                delay_ms = min(delay_ms, seen[0])
                held_ms = min(held_ms, watch.take_ms())
                growth_mib = max(growth_mib, seen[1] - before)
                busy_s = max(busy_s, await _settle(client))
                if delay_ms <= MAX_DELAY_MS / 2 and held_ms <= MAX_HELD_MS:
                    break
            is_right = status // 100 in case.wanted
            results.append(
                Result(case.name, status, is_right, delay_ms, held_ms, growth_mib, seconds, busy_s)
            )
            if not _is_fine(results[-1]):
                console.print(f"[red]{results[-1]}[/red]", highlight=False)
    return results


def _is_fine(result: Result) -> bool:
    return (
        result.is_right
        and result.delay_ms <= MAX_DELAY_MS
        and result.held_ms <= MAX_HELD_MS
        and result.growth_mib <= MAX_GROWTH_MIB
    )


def judge(results: Sequence[Result], growth_mib: float) -> list[Target]:
    """What the results are held against."""
    wrong = sum(not result.is_right for result in results)
    late = max(result.delay_ms for result in results)
    held = max(result.held_ms for result in results)
    grown = max(result.growth_mib for result in results)
    return [
        Target("cases", float(len(results)), ">=", 40),
        Target("longest callback of the event loop, ms of its processor", held, "<=", MAX_HELD_MS),
        Target("longest /healthz meanwhile, ms", late, "<=", MAX_DELAY_MS),
        Target("most memory more in one case, MiB", grown, "<=", MAX_GROWTH_MIB),
        Target("memory more after all cases, MiB", growth_mib, "<=", MAX_GROWTH_MIB),
        Target("statuses of a wrong class", float(wrong), "<=", 0),
    ]


async def control(url: str, process: psutil.Process) -> float:
    """The longest time in ms that `/healthz` takes in a few seconds without any other request."""
    seen = [0.0, 0.0]
    watching = asyncio.create_task(_watch(int(url.rpartition(":")[2]), process, seen))
    await asyncio.sleep(_CONTROL_S)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    return seen[0]


@dataclass(frozen=True, slots=True)
class Record:
    """What one run of the benchmark saw."""

    results: list[Result]
    growth_mib: float
    """Memory of the gateway after all cases less what it was before."""
    control_ms: float
    """The longer of two controls, before and after."""


def run(cases: Sequence[Case], tries: int = TRIES) -> Record:
    """Start everything, send the cases."""
    # However this process ends, the others end too.
    with watched(), tempfile.TemporaryDirectory() as folder, running(Path(folder)) as gateway:
        url, process, watch = gateway
        before = process.memory_info().rss
        control_ms = asyncio.run(control(url, process))
        results = asyncio.run(measure(url, process, watch, cases, tries))
        control_ms = max(control_ms, asyncio.run(control(url, process)))
        return Record(results, (process.memory_info().rss - before) / 2**20, control_ms)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    args = parser.parse_args()
    about = machine()
    record = run(CASES)
    held = judge(record.results, record.growth_mib)
    show_targets(held)
    written = {
        "machine": about,
        "tries": TRIES,
        "control_ms": record.control_ms,
        "cases": [asdict(result) for result in record.results],
        "targets": [target.as_json() for target in held],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(written, indent=2) + "\n")
    console.print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
