"""Does `atlas serve` start every time, with every model?

How to run: `python -m benchmarks.starts --out FILE.json [--count N] [--config FILE]`. Each start is
the command itself, on its own ports and in an empty data folder. It counts when the command says
that everything is ready and `/v1/models` agrees, each model then answers one question, and SIGTERM
ends the command and all its processes. Starts that the file already has are kept, so that a long
series can run in parts; the target is about all of them.

Results to expect: no start without a model, about 80 s each on two cores. See
`benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil
from rich.console import Console

from benchmarks.ports import free_port
from benchmarks.serving import machine, show_targets
from benchmarks.stats import Target
from serve_app import environment

ROOT = Path(__file__).parent.parent
COUNT = 20
SERVE = (sys.executable, "-m", "serve_app.cli.app", "serve")
_READY_TIMEOUT_S = 600.0
_END_TIMEOUT_S = 60.0
_LOOK_S = 0.5

console = Console()


@dataclass(slots=True)
class Start:
    """One start, and how it ended."""

    problems: list[str] = field(default_factory=list)
    """Empty: every model was ready, answered, and all processes ended."""
    ready_s: float | None = None
    """Until the command said `ready`; `None`: never."""
    end_s: float | None = None
    """From SIGTERM to the end of the last process; `None`: some did not end."""
    said: str = ""
    """The command's output, where there is a problem."""


def _wait_until(claim: Callable[[], bool], within_s: float) -> float | None:
    """Seconds until the claim held; `None`: never."""
    began_s = time.monotonic()
    while not claim():
        if time.monotonic() - began_s > within_s:
            return None
        time.sleep(_LOOK_S)
    return time.monotonic() - began_s


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _check_models(url: str) -> list[str]:
    """What is wrong with the pool, as a client sees it."""
    problems = []
    with httpx2.Client(base_url=url, timeout=60) as client:
        entries: list[dict[str, Any]] = client.get("/v1/models").json()["data"]
        models = [entry for entry in entries if entry["atlas"]["kind"] == "model"]
        if not models:
            problems.append("no model is listed")
        for model in models:
            if model["atlas"]["state"] != "ready" or model["atlas"]["reason"]:
                problems.append(f"{model['id']}: {model['atlas']}")
                continue
            messages = [{"role": "user", "content": "What is 12 times 7?"}]
            body = {"model": model["id"], "messages": messages, "max_tokens": 8}
            answer = client.post("/v1/chat/completions", json=body)
            if answer.status_code != 200:
                problems.append(f"{model['id']} answers {answer.status_code}: {answer.text[:300]}")
    return problems


def start_once(config: Path) -> Start:
    """Start the command, look at the pool, end the command."""
    start = Start()
    port, haproxy = free_port(), environment.make_haproxy_folder()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        ports = {
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        }
        with output.open("wb") as file:
            process = psutil.Popen(
                [*SERVE, "--config", str(config), "--port", str(port)],
                cwd=ROOT,
                env={**os.environ, **ports, **environment.haproxy_places(haproxy)}
                | {"ATLAS_DATA_DIR": f"{folder}/data"},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            start.ready_s = _wait_until(
                lambda: b"ready at" in output.read_bytes() or not _is_alive(process),
                _READY_TIMEOUT_S,
            )
            said = output.read_text()
            if "ready at" not in said:
                start.ready_s = None
                start.problems.append("the command did not say that it is ready")
            elif "but without" in said:
                start.problems.append("the command is ready without some models")
            if start.ready_s is not None:
                start.problems += _check_models(f"http://127.0.0.1:{port}")
        except (httpx2.HTTPError, KeyError, ValueError) as error:
            start.problems.append(f"{type(error).__name__}: {error}")
        finally:
            _end(process, start)
            shutil.rmtree(haproxy, ignore_errors=True)
        start.said = output.read_text() if start.problems else ""
    return start


def _end(process: psutil.Popen, start: Start) -> None:
    """End the command, and see whether all its processes end."""
    processes = [process, *(process.children(recursive=True) if _is_alive(process) else ())]
    with suppress(psutil.NoSuchProcess):
        process.terminate()
    start.end_s = _wait_until(lambda: not any(map(_is_alive, processes)), _END_TIMEOUT_S)
    left = [p for p in processes if _is_alive(p)]
    if left:
        start.problems.append(f"{len(left)} processes did not end")
    for orphan in left:
        with suppress(psutil.NoSuchProcess):
            orphan.kill()
    process.wait()


def judge(starts: list[dict[str, Any]]) -> list[Target]:
    """What the starts are held against."""
    failed = sum(bool(start["problems"]) for start in starts)
    return [
        Target("starts", float(len(starts)), ">=", float(COUNT)),
        Target("starts with a problem", float(failed), "<=", 0),
    ]


def main() -> None:
    """Start, and start again; write after each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; earlier starts stay")
    parser.add_argument("--count", type=int, default=COUNT, help="starts to make now")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "nano.yaml")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what is running on the way out
    about = {name: value for name, value in machine().items() if name != "serve_environment"}
    starts: list[dict[str, Any]] = []
    if args.out.exists():
        starts = json.loads(args.out.read_text())["starts"]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(args.count):
        start = start_once(args.config.absolute())
        starts.append({"load_average_1min": os.getloadavg()[0], **asdict(start)})
        console.print(f"{len(starts)}: {start}", highlight=False)
        record = {
            "machine": about,
            "starts": starts,
            "targets": [target.as_json() for target in judge(starts)],
        }
        args.out.write_text(json.dumps(record, indent=2) + "\n")
    show_targets(judge(starts))


if __name__ == "__main__":
    main()
