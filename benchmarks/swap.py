"""Does swapping policies cost a request, a consistent answer, or time?

How to run: `python -m benchmarks.swap --out FILE.json [--nano | --deployment CONFIG] [--requests N]
[--seconds S]`. It starts Ray and the graph of `configs/bench/swap.yaml` (three engines that answer
at once, two router replicas; `--nano` takes the real engines of `configs/nano.yaml`), waits until
each model answers, and sends one constant open-loop load: whole and streamed requests, of one and
of two steps, to the models without a tool. Meanwhile 20 policies are promoted and rolled back, in
four blocks; between the blocks nothing changes. All of it is one run, so other work on the machine
falls on both alike, and every policy asks engines of the same kind.

Results to expect: no request fails, each one names one policy version, at all its steps, and took
the pairs which that policy takes; p99 during swaps at most 1.5 times the steady one; every replica
serves a new policy within 2 s. See `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.ports import free_port
from benchmarks.serving import machine, show_targets
from benchmarks.stats import Target, percentile
from benchmarks.swap_load import Answer, SwapLoad
from serve_app.config import AtlasConfig
from serve_app.errors import ConfigError
from serve_app.router.rules.cold_start import PairCard, pair_cards
from serve_app.router.snapshots.snapshot import GATE_THRESHOLD, RouterSnapshot, Scale
from serve_app.schemas import NO_TOOL, MemberState

ROOT = Path(__file__).parent.parent
SCRIPTED, NANO = ROOT / "configs" / "bench" / "swap.yaml", ROOT / "configs" / "nano.yaml"
_REQUESTS = {True: (13_200, 10_000), False: (2_640, 2_000)}
"""By whether the engines are scripted: requests of a run, and the fewest that count."""
NUM_POLICIES = 20
NUM_BLOCKS = 4
MAX_STEPS = (1, 1, 1, 2)
"""Of the requests, in turn."""
WARM_UP_S = 5.0
SETTLE_S = 2.0
"""After the last swap of a block: what it stirs up still counts as swapping."""
_GAP_SHARE = 0.5
"""A policy serves for this share of the time between two promotions, then it is rolled back."""
_DIM = 384

console = Console()


@dataclass
class Swap:
    """One publication."""

    policy_version: int
    began_unix_s: float
    done_unix_s: float
    kind: str
    """`promote` or `rollback`."""
    order: tuple[str, ...]
    """Pairs in the order in which the policy takes them."""
    settled_s: float | None = None
    """From the publication to the last request that began with an older policy."""


@dataclass
class Record:
    """What happened."""

    answers: list[Answer] = field(default_factory=list)
    swaps: list[Swap] = field(default_factory=list)
    swapping: list[tuple[float, float]] = field(default_factory=list)
    """When policies were being swapped; the rest of the time was steady."""
    began_unix_s: float = 0.0
    """End of the warm-up: requests before it do not count."""


def ranked_snapshot(
    cards: Sequence[PairCard], encoder: str, order: Sequence[int]
) -> RouterSnapshot:
    """A snapshot with a policy that takes pairs in a fixed order, whatever the question.

    Args:
        cards: The pairs.
        encoder: Name of the encoder.
        order: Indices of the pairs, the first one first.
    """
    num_pairs = len(cards)
    rank = np.empty(num_pairs, np.float32)
    rank[list(order)] = np.arange(num_pairs)
    quality = (0.9 - 0.8 * rank / num_pairs).astype(np.float32)
    strength = 50.0
    axes = np.eye(_DIM, dtype=np.float32)[:2]
    costs_usd = np.array([card.cost_usd for card in cards], np.float32)

    def rows(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.tile(values, (2, 1)).astype(np.float32)

    return RouterSnapshot(
        version=1,
        encoder=encoder,
        pairs=tuple(card.pair for card in cards),
        centroids=axes,
        scales=(Scale(2, 1, 1.0),),
        temperature=0.1,
        score_alpha=rows(strength * quality),
        score_beta=rows(strength * (1 - quality)),
        tokens=np.zeros((2, num_pairs), np.float32),
        seconds=np.zeros((2, num_pairs), np.float32),
        costs_usd=rows(costs_usd),
        pair_alpha=strength * quality,
        pair_beta=strength * (1 - quality),
        pair_costs_usd=costs_usd,
        landmarks=axes,
        head_in=np.zeros((2, 1), np.float32),
        head_out=np.zeros((1, num_pairs), np.float32),
        head_gamma=1.0,
        head_weight=0.0,
        card_weight=0.0,
        outside_card_weight=0.0,
        caution=0.0,
        prior_weights=np.zeros(0, np.float32),
        prior_bias=0.5,
        distance_quantiles=np.linspace(0.0, 1.0, 9, dtype=np.float32),
        trusted_quantile=0.99,
        gate_head=np.zeros(2, np.float32),
        gate_weights=np.zeros(5, np.float32),
        examples=((), ()),
        metadata={"kind": "swap benchmark"},
        policy=eager_policy(_DIM),
    )


def eager_policy(dim: int) -> dict[str, NDArray[np.float32]]:
    """A policy of the usual size that takes the pairs in the order of their expected scores.

    It stops when its steps are over, and path 1 keeps nothing.
    """
    import torch

    from rl.ppo.torch_policy_net import TorchPolicyNet
    from serve_app.router.policy.features import DESCRIPTOR_DIM

    net = TorchPolicyNet(dim)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.candidate.weight[0, DESCRIPTOR_DIM + 2] = 1.0  # the expected score
        net.candidate_logit.weight[0, 0] = 10.0
        net.slot_logits.bias.fill_(-15.0)
    return net.to_tensors() | {GATE_THRESHOLD: np.array([2.0], np.float32)}


class Swapper:
    """Promotes and rolls back while the load runs."""

    def __init__(self, config: AtlasConfig) -> None:
        """Prepare the snapshots; nothing is published.

        Args:
            config: The deployment.

        Raises:
            ConfigError: If it has fewer than two models that answer without a tool.
        """
        self._config = config
        self.record = Record()
        cards = pair_cards(config)
        plain = [row for row, card in enumerate(cards) if card.pair.tool_id == NO_TOOL]
        others = [row for row in range(len(cards)) if row not in plain]
        if len(plain) < 2:
            raise ConfigError("swapping shows where two models answer without a tool")
        self._orders: dict[str | None, tuple[str, ...]] = {}
        self._snapshots: list[tuple[RouterSnapshot, tuple[str, ...]]] = []
        for number in range(NUM_POLICIES + 1):
            order = np.roll(plain, number).tolist()
            made = ranked_snapshot(cards, config.embedder.model, [*order, *others])
            # No two are the same, so that each is loaded from its own files.
            made = replace(made, metadata=dict(made.metadata) | {"number": number})
            self._snapshots.append((made, tuple(str(cards[row].pair) for row in order)))

    async def first(self) -> int:
        """Publish the policy that serves before any swap."""
        swap = await self._promote(0)
        self.record.swaps.append(replace(swap, began_unix_s=0.0, done_unix_s=0.0))
        return swap.policy_version

    async def run(self, block_s: float) -> None:
        """Steady and swapping blocks in turn."""
        per_block = NUM_POLICIES // NUM_BLOCKS
        gap_s = (block_s - SETTLE_S) / per_block
        number = 0
        for block in range(NUM_BLOCKS):
            await asyncio.sleep(block_s)
            began_unix_s = time.time()
            for place in range(per_block):
                number += 1
                due_s = began_unix_s + place * gap_s
                await asyncio.sleep(max(0.0, due_s - time.time()))
                self.record.swaps.append(await self._promote(number))
                await asyncio.sleep(max(0.0, due_s + _GAP_SHARE * gap_s - time.time()))
                self.record.swaps.append(await self._roll_back())
            await asyncio.sleep(SETTLE_S)
            self.record.swapping.append((began_unix_s, time.time()))
            console.print(f"  block {block + 1} of {NUM_BLOCKS}: {2 * per_block} publications")

    async def _promote(self, number: int) -> Swap:
        from rl.publish import keep_snapshot, promote
        from serve_app.store import Store

        snapshot, order = self._snapshots[number]
        store = await Store.open(self._config.store_url())
        try:
            snapshot_id = await keep_snapshot(self._config, store, snapshot)
            self._orders[snapshot_id] = order
            began_unix_s = time.time()
            version = await promote(store, snapshot_id, "swap benchmark")
            return Swap(version, began_unix_s, time.time(), "promote", order)
        finally:
            await store.close()

    async def _roll_back(self) -> Swap:
        from rl.publish import roll_back
        from serve_app.store import Store

        store = await Store.open(self._config.store_url())
        try:
            began_unix_s = time.time()
            version, snapshot_id = await roll_back(store)
            order = self._orders[snapshot_id]
            return Swap(version, began_unix_s, time.time(), "rollback", order)
        finally:
            await store.close()


async def run_load(load: SwapLoad, record: Record) -> None:
    """Run the load in a process of its own, and collect its answers.

    Raises:
        RuntimeError: If that process fails.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.swap_load",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    out, _ = await process.communicate(json.dumps(asdict(load)).encode())
    if process.returncode:
        raise RuntimeError("the load generator failed")
    for line in out.splitlines():
        fields = json.loads(line)
        for name in ("step_versions", "pairs"):
            fields[name] = tuple(fields[name])
        record.answers.append(Answer(**fields))


async def measure(config: AtlasConfig, port: int, *, requests: int, seconds: float) -> Record:
    """Load and swaps, side by side.

    Args:
        config: Of the graph that runs.
        port: Of its HTTP proxy.
        requests: In all, evenly over the run.
        seconds: Of each block.
    """
    swapper = Swapper(config)
    await until_serves(port, await swapper.first())
    in_all_s = WARM_UP_S + 2 * NUM_BLOCKS * seconds
    load = SwapLoad(port, requests / in_all_s, in_all_s, MAX_STEPS)
    console.print(f"{load.rate:.1f} requests/s for {load.seconds:.0f} s …")

    async def swap() -> None:
        await asyncio.sleep(WARM_UP_S)
        swapper.record.began_unix_s = time.time()
        await swapper.run(seconds)

    await asyncio.gather(run_load(load, swapper.record), swap())
    return swapper.record


async def until_serves(port: int, policy_version: int, in_a_row: int = 20) -> None:
    """Wait until a policy answers, at every replica that is asked."""
    import httpx

    body = {"model": "atlas", "messages": [{"role": "user", "content": "Hello?"}]}
    async with asyncio.timeout(120), httpx.AsyncClient(timeout=30) as client:
        seen = 0
        while seen < in_a_row:
            answer = await client.post(f"http://127.0.0.1:{port}/v1/route", json=body)
            decided = answer.json() if answer.status_code == 200 else {}
            seen = seen + 1 if decided.get("policy_version") == policy_version else 0
            await asyncio.sleep(0.02)


def inconsistent(answers: Sequence[Answer], swaps: Sequence[Swap]) -> list[Answer]:
    """Answers that do not name one policy, or took other pairs than that policy takes."""
    orders = {swap.policy_version: swap.order for swap in swaps}
    found = []
    for answer in answers:
        if answer.error is not None:
            continue
        version = answer.policy_version
        order = orders.get(version) if version is not None else None
        one = set(answer.step_versions) == {version}
        if not one or order is None or answer.pairs != order[: len(answer.pairs)]:
            found.append(answer)
    return found


def settle(answers: Sequence[Answer], swaps: Sequence[Swap]) -> None:
    """Note when the last request began that an older policy still served."""
    served = [a for a in answers if a.policy_version is not None]
    for swap in swaps:
        late = [
            answer.began_unix_s - swap.done_unix_s
            for answer in served
            if (answer.policy_version or 0) < swap.policy_version
            and answer.began_unix_s > swap.done_unix_s
        ]
        swap.settled_s = max(late, default=0.0)


def judge(record: Record, min_requests: int) -> tuple[dict[str, Any], list[Target]]:
    """The figures, and what they are held against.

    Args:
        record: What happened.
        min_requests: The fewest that count.
    """
    counted = [a for a in record.answers if a.began_unix_s >= record.began_unix_s]
    settle(record.answers, record.swaps[1:])
    failed = [a for a in record.answers if a.error is not None]
    wrong = inconsistent(record.answers, record.swaps)

    def swapping(answer: Answer) -> bool:
        return any(low <= answer.began_unix_s <= high for low, high in record.swapping)

    latency: dict[str, dict[str, Any]] = {}
    for name, wanted in (("steady", False), ("swapping", True)):
        part = [a.latency_ms for a in counted if a.error is None and swapping(a) is wanted]
        latency[name] = {"requests": len(part)} | {
            f"p{share}_ms": percentile(part, share) for share in (50, 95, 99)
        }
    slowest_s = max((swap.settled_s or 0.0 for swap in record.swaps[1:]), default=0.0)
    steady, swaps = latency["steady"]["p99_ms"] or 0.0, latency["swapping"]["p99_ms"] or 0.0
    figures = {
        "requests": len(record.answers),
        "streamed": sum(a.streamed for a in record.answers),
        "of_several_steps": sum(len(a.pairs) > 1 for a in record.answers),
        "failed": len(failed),
        "failures": [
            asdict(a) | {"after_s": a.began_unix_s - record.began_unix_s} for a in failed[:10]
        ],
        "inconsistent": len(wrong),
        "inconsistent_sample": [asdict(a) for a in wrong[:3]],
        "policies": len({a.policy_version for a in record.answers}),
        "promotions": sum(swap.kind == "promote" for swap in record.swaps[1:]),
        "rollbacks": sum(swap.kind == "rollback" for swap in record.swaps),
        "latency": latency,
        "settled_s": {
            f"p{share}": percentile([swap.settled_s or 0.0 for swap in record.swaps[1:]], share)
            for share in (50, 100)
        },
    }
    targets = [
        Target("failed requests", float(len(failed)), "<=", 0.0),
        Target("requests", float(len(record.answers)), ">=", float(min_requests)),
        Target("answers without one consistent policy", float(len(wrong)), "<=", 0.0),
        Target("p99 during swaps over the steady one", swaps / max(steady, 1e-9), "<=", 1.5),
        Target("slowest swap at every replica, s", slowest_s, "<=", 2.0),
    ]
    return figures, targets


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--nano", action="store_const", dest="deployment", const=NANO,
                       help="the real nano pool")  # fmt: skip
    which.add_argument("--deployment", type=Path, default=SCRIPTED, help="[the scripted engines]")
    parser.add_argument("--requests", type=int,
                        help="in all [13200; of another deployment 2640]")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=40.0, help="of each of the 8 blocks")
    parser.set_defaults(deployment=SCRIPTED)  # argparse would take that of the first of the two
    args = parser.parse_args()
    path: Path = args.deployment.resolve()
    requests, min_requests = _REQUESTS[path == SCRIPTED.resolve()]
    requests = args.requests or requests
    from serve_app.config import load_config
    from serve_app.running import running_graph

    port = free_port()
    with ExitStack() as stack:
        # A store of its own: what other runs left behind must not count.
        os.environ["ATLAS_DATA_DIR"] = stack.enter_context(tempfile.TemporaryDirectory())
        console.print(f"starting the graph of {path.name} …")
        graph = stack.enter_context(running_graph(path, port=port))
        for state in graph.wait_for_pool():
            console.print(*(f"  {m.model_id}: {m.state.value}" for m in state.models))
        if any(member.state is not MemberState.READY for member in state.models):
            raise SystemExit("not every model answers, so there is nothing to measure")
        config = load_config(path)
        record = asyncio.run(measure(config, port, requests=requests, seconds=args.seconds))
        about = machine()
    figures, held = judge(record, min_requests)
    console.print_json(json.dumps(figures))
    show_targets(held)
    written = {
        "machine": about,
        "config": path.name,
        "block_s": args.seconds,
        **figures,
        "swaps": [asdict(swap) for swap in record.swaps[1:]],
        "targets": [target.as_json() for target in held],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(written, indent=2) + "\n")
    console.print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
