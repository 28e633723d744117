"""What the graph adds to a model's answer: milliseconds, requests per second, memory, by stage.

How to run: `python -m benchmarks.serving --out results/serving.json [--quick] [--litellm PYTHON]`.
It starts Ray and the graph of `configs/bench/bench.yaml` (an engine that answers at once) and asks
in turn, round by round: (a) a Serve no-op, (b) the model's application behind the thinnest ingress,
(c) the gateway with the model pinned, (d) the gateway routing questions outside the profile, (e)
the same with questions like the profiled ones, (f) a LiteLLM proxy over an upstream that is as
quick, where PYTHON is an interpreter with `litellm[proxy]`; then, unless `--quick`, (a)-(d) once
more over real engines (`configs/nano.yaml`). Prints tables, writes JSON and a figure.

Results to expect: see `benchmarks/README.md`. A machine that does other work at the same time gives
worse figures; ratios between scenarios of one run hold better than the figures themselves.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.client import Load, Measurement, question, run_load
from benchmarks.engines import MODEL_ID
from benchmarks.ports import free_port
from benchmarks.stats import Summary, Target, merge, percentile, summarise

ROOT = Path(__file__).parent.parent
WARM_UP_S = 2.0
OPEN_SHARE = 0.5
"""The open loop runs at this share of the routed closed loop's throughput."""

console = Console()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Somewhere to send load."""

    name: str
    port: int
    path: str
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)
    profiled: bool = False
    """Whether its questions are of the kinds that the router's snapshot was fitted on."""


@dataclass(frozen=True, slots=True)
class Phase:
    """One shape of load, sent to every endpoint in turn."""

    name: str
    mode: Literal["closed", "open"]
    concurrency: int
    stream: bool = False


CLOSED_1 = Phase("closed_1", "closed", 1)
CLOSED_16 = Phase("closed_16", "closed", 16)
STREAM_1 = Phase("stream_1", "closed", 1, stream=True)
OPEN = Phase("open", "open", 64)


@dataclass(slots=True)
class EngineResults:
    """Everything measured over one kind of engine."""

    scenarios: dict[str, dict[str, Summary]] = field(default_factory=dict)
    """phase -> endpoint -> figures."""
    open_rate_per_s: float = 0.0
    decision_p50_ms: float | None = None
    memory: dict[str, dict[str, float]] = field(default_factory=dict)
    """deployment -> replicas, rss_mb, pss_mb."""


class Bench:
    """Sends every phase to every endpoint, in rounds, so that noise falls on all alike."""

    def __init__(self, seconds: float, rounds: int) -> None:
        """Measure each scenario `rounds` times for `seconds`."""
        self._seconds = seconds
        self._rounds = rounds
        self._next_number = 0

    def run_phase(
        self, phase: Phase, endpoints: list[Endpoint], rate: float = 0.0
    ) -> dict[str, Summary]:
        """Every endpoint under one shape of load."""
        parts: dict[str, list[Measurement]] = {endpoint.name: [] for endpoint in endpoints}
        for _ in range(self._rounds):
            for endpoint in endpoints:
                parts[endpoint.name].append(self.run_once(phase, endpoint, self._seconds, rate))
        return {name: summarise(merge(measured)) for name, measured in parts.items()}

    def run_once(
        self, phase: Phase, endpoint: Endpoint, seconds: float, rate: float = 0.0
    ) -> Measurement:
        """One endpoint, once."""
        self._next_number += 100_000
        load = Load(
            host="127.0.0.1",
            port=endpoint.port,
            path=endpoint.path,
            mode=phase.mode,
            seconds=seconds,
            concurrency=phase.concurrency,
            rate=rate,
            body=endpoint.body,
            stream=phase.stream,
            headers=endpoint.headers,
            profiled=endpoint.profiled,
            first_number=self._next_number,
        )
        return asyncio.run(run_load(load))


@contextmanager
def _process(command: list[str], ready_url: str, timeout_s: float = 300.0) -> Iterator[None]:
    """A server process while it is needed, once it answers."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        try:
            end_s = time.monotonic() + timeout_s
            while True:
                try:
                    urllib.request.urlopen(ready_url, timeout=2).close()
                    break
                except OSError:
                    if process.poll() is not None or time.monotonic() > end_s:
                        log.seek(0)
                        tail = log.read()[-2000:].decode(errors="replace")
                        raise RuntimeError(f"{command[0]} did not come up:\n{tail}") from None
                    time.sleep(0.3)
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def litellm_proxy(python: Path) -> Iterator[Endpoint]:
    """A LiteLLM proxy with one worker over the instant HTTP upstream.

    It refuses to start without a master key, so it gets one that lives as long as the process.
    """
    upstream_port, port = free_port(), free_port()
    base = f"http://127.0.0.1:{upstream_port}/v1"
    key = f"sk-{secrets.token_hex(32)}"
    config = f"""
general_settings: {{master_key: {key}}}
model_list:
  - model_name: {MODEL_ID}
    litellm_params: {{model: openai/{MODEL_ID}, api_base: {base}, api_key: none}}
"""
    upstream = [sys.executable, "-m", "benchmarks.engines", "--port", str(upstream_port)]
    with ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "litellm.yaml"
        path.write_text(config)
        stack.enter_context(_process(upstream, f"{base}/models"))
        proxy = [str(python.parent / "litellm"), "--config", str(path), "--port", str(port)]
        proxy += ["--host", "127.0.0.1", "--num_workers", "1"]
        stack.enter_context(_process(proxy, f"http://127.0.0.1:{port}/health/liveliness"))
        headers = {"authorization": f"Bearer {key}"}
        yield Endpoint("litellm", port, "/v1/chat/completions", {"model": MODEL_ID}, headers)


def replica_memory() -> dict[str, dict[str, float]]:
    """Memory of every deployment's replicas, in MB (10^6 bytes), found through Serve's state."""
    from ray.serve.context import _get_global_client

    found: dict[str, dict[str, float]] = {}
    applications = _get_global_client().get_serve_details()["applications"]
    for application, details in applications.items():
        for name, deployment in details["deployments"].items():
            rss = pss = count = 0.0
            for replica in deployment["replicas"]:
                if replica.get("pid") is None:
                    continue
                memory = psutil.Process(replica["pid"]).memory_full_info()
                rss, pss, count = rss + memory.rss / 1e6, pss + memory.pss / 1e6, count + 1
            key = f"{application}/{name}"
            found[key] = {"replicas": count, "rss_mb": rss, "pss_mb": pss}
    return found


def decision_ms(port: int, num_requests: int) -> float | None:
    """Median time of a decision as the router's replica reports it: no embedding, no hop."""
    seconds = []
    for number in range(num_requests):
        body = {"model": "atlas", "messages": [{"role": "user", "content": question(number)}]}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/route",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            answer = json.load(response)
        seconds.append(answer.get("decision", answer)["seconds"] * 1e3)
    return percentile(seconds, 50)


def measure_graph(
    config: Path,
    model_id: str,
    bench: Bench,
    extra: list[Endpoint],
    *,
    quick: bool,
    profiled: bool = False,
) -> EngineResults:
    """Bring a graph up and measure all of it.

    Args:
        config: Of the graph.
        model_id: The model that is named.
        bench: How it is measured.
        extra: Endpoints beside the graph's.
        quick: Whether fewer requests will do.
        profiled: Whether the router gets a snapshot, and questions like those it was fitted on.
    """
    from ray import serve

    from benchmarks.probes import direct_application, noop_application
    from serve_app.running import running_graph

    port = free_port()
    results = EngineResults()
    with ExitStack() as stack:
        # A store of its own: what other runs left behind must not count.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ["ATLAS_DATA_DIR"] = str(folder)
        if profiled:
            config = with_snapshot(config, folder)
        graph = stack.enter_context(running_graph(config, port=port))
        for state in graph.wait_for_pool():
            console.print(*(f"  {m.model_id}: {m.state.value}" for m in state.models))
        serve.run(noop_application(), name="bench-noop", route_prefix="/bench/noop")
        serve.run(direct_application(model_id), name="bench-direct", route_prefix="/bench/direct")
        chat = "/v1/chat/completions"
        sampling = {"max_tokens": 16, "temperature": 0}
        endpoints = [
            Endpoint("noop", port, "/bench/noop/", {"model": model_id}),
            Endpoint("direct", port, "/bench/direct/", {"model": model_id} | sampling),
            Endpoint("pinned", port, chat, {"model": model_id} | sampling),
            Endpoint("routed", port, chat, {"model": "atlas"} | sampling),
            *extra,
        ]
        if profiled:
            known = Endpoint("profiled", port, chat, {"model": "atlas"} | sampling, profiled=True)
            endpoints.insert(4, known)
        for endpoint in endpoints:
            bench.run_once(CLOSED_16, endpoint, WARM_UP_S)
        for phase in (CLOSED_1, CLOSED_16):
            console.print(f"measuring {phase.name} …")
            results.scenarios[phase.name] = bench.run_phase(phase, endpoints)
        console.print("measuring stream_1 …")
        results.scenarios[STREAM_1.name] = bench.run_phase(STREAM_1, endpoints[1:])
        rate = OPEN_SHARE * results.scenarios["closed_16"]["routed"].requests_per_s
        results.open_rate_per_s = rate
        console.print(f"measuring open loop at {rate:.0f} requests/s …")
        results.scenarios[OPEN.name] = bench.run_phase(OPEN, endpoints[:4], rate)
        results.decision_p50_ms = decision_ms(port, 50 if quick else 300)
        results.memory = replica_memory()
    return results


def with_snapshot(config: Path, folder: Path) -> Path:
    """A configuration whose router decides by a snapshot fitted on the profiled questions."""
    from benchmarks.profiled import save_profiled

    share = save_profiled(config, folder / "profiled")
    console.print(f"first look: expected to decide {share:.0%} of the profiled questions")
    written = yaml.safe_load(config.read_text())
    written["router"] = {**written.get("router", {}), "snapshot": str(folder / "profiled")}
    path = folder / config.name
    path.write_text(yaml.safe_dump(written))
    return path


def measure_encoder_apart(num_queries: int) -> dict[str, float]:
    """`benchmarks.encoder` in a process of its own, because it needs torch."""
    command = [sys.executable, "-m", "benchmarks.encoder", "--num-queries", str(num_queries)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=900
    )
    figures: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def stages(results: EngineResults) -> dict[str, float]:
    """Milliseconds each stage adds at concurrency 1: differences of medians."""
    p50 = {name: summary.p50_ms or 0.0 for name, summary in results.scenarios["closed_1"].items()}
    return {
        "ingress": p50["noop"],
        "model_hop": p50["direct"] - p50["noop"],
        "gateway": p50["pinned"] - p50["direct"],
        "routing": p50["routed"] - p50["pinned"],
    }


def graph_memory_mb(results: EngineResults) -> float:
    """Resident memory of gateway, router and embedder replicas together."""
    return sum(
        memory["rss_mb"]
        for name, memory in results.memory.items()
        if name.rpartition("/")[2] in ("Gateway", "Router", "Embedder")
    )


def targets(instant: EngineResults, encoder: dict[str, float]) -> list[Target]:
    """What was asked for and what was reached."""
    closed_1, closed_16 = instant.scenarios["closed_1"], instant.scenarios["closed_16"]
    stream = instant.scenarios["stream_1"]
    routed_p50_ms = closed_1["routed"].p50_ms or float("inf")
    routed_rps = closed_16["routed"].requests_per_s
    first = (stream["routed"].first_p50_ms or float("inf")) - (stream["direct"].first_p50_ms or 0)
    held = [
        Target("routed p50 at concurrency 1, ms", routed_p50_ms, "<=", 8.0),
        Target("routed requests/s at concurrency 16", routed_rps, ">=", 250.0),
        Target("decision alone p50, ms", instant.decision_p50_ms or float("inf"), "<=", 0.5),
        Target("first streamed token delayed by, ms", first, "<=", routed_p50_ms),
        Target("encoder speed-up over sentence-transformers", encoder["speedup"], ">=", 2.5),
        Target("encoder lowest cosine", encoder["min_cosine"], ">=", 0.9999),
        Target("gateway + router + embedder RSS, MB", graph_memory_mb(instant), "<=", 2000.0),
    ]
    profiled_ms = closed_1["profiled"].p50_ms or float("inf")
    over_named = profiled_ms / (closed_1["pinned"].p50_ms or float("inf"))
    held.append(Target("profiled p50 over a named request's, at 1", over_named, "<=", 2.0))
    if "litellm" in closed_16:
        unrouted_rps = max(closed_16["litellm"].requests_per_s, 1e-9)
        over_ms = profiled_ms / (closed_1["litellm"].p50_ms or float("inf"))
        for name, least in (("routed", 2.5), ("profiled", 4.0)):
            ratio = closed_16[name].requests_per_s / unrouted_rps
            what = f"{name} over LiteLLM unrouted, requests/s at 16"
            held.append(Target(what, ratio, ">=", least))
        held.append(Target("profiled p50 over LiteLLM's, at 1", over_ms, "<=", 0.4))
    return held


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import ray

    return {
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load_average_1min": os.getloadavg()[0],
        "python": platform.python_version(),
        "ray": ray.__version__,
        "serve_environment": {
            name: value.removeprefix(f"{ROOT.absolute()}/")
            for name, value in os.environ.items()
            if name.startswith("RAY_SERVE_")
        },
    }


def show(title: str, results: EngineResults) -> None:
    """Print the tables."""
    for phase, rows in results.scenarios.items():
        table = Table("", "p50 ms", "p95 ms", "p99 ms", "first ms", "req/s", "errors")
        table.title = f"{title}, {phase}"
        for name, summary in rows.items():
            figures = (summary.p50_ms, summary.p95_ms, summary.p99_ms, summary.first_p50_ms)
            cells = ("-" if figure is None else f"{figure:.2f}" for figure in figures)
            table.add_row(name, *cells, f"{summary.requests_per_s:.0f}", str(summary.errors))
        console.print(table)
    added = "   ".join(f"{name} {ms:.2f}" for name, ms in stages(results).items())
    console.print(f"added at concurrency 1, ms: {added}", highlight=False)
    for name, memory in results.memory.items():
        console.print(f"  {name}: {memory['rss_mb']:.0f} MB RSS, {memory['pss_mb']:.0f} MB PSS")


def show_targets(held: list[Target]) -> None:
    """Print what was reached."""
    table = Table("target", "reached", "wanted", "", title="targets")
    for target in held:
        mark = "[green]holds[/green]" if target.holds else "[red]missed[/red]"
        wanted = f"{target.relation} {target.target:.4g}"
        table.add_row(target.name, f"{target.value:.4g}", wanted, mark)
    console.print(table)


def write(path: Path, record: dict[str, Any], instant: EngineResults) -> None:
    """JSON, and a figure of the same name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    from benchmarks.figure import draw

    draw(instant.scenarios, record["targets"], path.with_suffix(".png"))
    console.print(f"wrote {path} and {path.with_suffix('.png')}")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; the figure lies beside")
    parser.add_argument("--quick", action="store_true", help="one short round, no nano engines")
    parser.add_argument("--litellm", type=Path, help="interpreter that has litellm[proxy]")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each scenario and round")
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    seconds, rounds = (1.0, 1) if args.quick else (args.seconds, args.rounds)
    bench = Bench(seconds, rounds)
    skipped: dict[str, str] = {}
    record: dict[str, Any] = {"machine": machine(), "skipped": skipped}
    console.print("measuring the encoder …")
    encoder = measure_encoder_apart(30 if args.quick else 200)
    with ExitStack() as stack:
        extra = []
        if args.litellm is None:
            skipped["litellm"] = "no --litellm given"
        elif not (args.litellm.parent / "litellm").exists():
            skipped["litellm"] = f"no litellm beside {args.litellm.name}"
        else:
            extra.append(stack.enter_context(litellm_proxy(args.litellm)))
        console.print("starting the graph over instant engines …")
        instant = measure_graph(
            ROOT / "configs" / "bench" / "bench.yaml",
            MODEL_ID,
            bench,
            extra,
            quick=args.quick,
            profiled=True,
        )
    show("instant engine", instant)
    nano_config = ROOT / "configs" / "nano.yaml"
    if args.quick or not nano_config.exists():
        skipped["nano"] = "--quick" if args.quick else "configs/nano.yaml is missing"
    else:
        console.print("starting the graph over nano engines (some minutes) …")
        nano = measure_graph(nano_config, "nano-math", bench, [], quick=args.quick)
        show("nano engine", nano)
        record["nano"] = asdict(nano) | {"stages_ms": stages(nano)}
    held = targets(instant, encoder)
    show_targets(held)
    record["instant"] = asdict(instant) | {"stages_ms": stages(instant)}
    record["encoder"] = encoder
    record["targets"] = [target.as_json() for target in held]
    write(args.out, record, instant)


if __name__ == "__main__":
    main()
