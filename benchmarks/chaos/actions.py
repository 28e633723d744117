"""What is done to the cluster: faults, and changes that an operator makes.

Each is done while the load runs; then the script waits until everything is as it should be.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx

from benchmarks.chaos.cluster import VLLM_MODEL, ChaosCluster, admin
from benchmarks.swap import ranked_snapshot
from rl.publish import keep_snapshot, promote
from serve_app.config import load_config
from serve_app.graph import APP_NAME
from serve_app.router.rules.cold_start import pair_cards
from serve_app.store import Store

FAULTS = (
    "kill gateway",
    "kill router",
    "kill embedder",
    "kill engine",
    "kill tool worker",
    "kill controller",
    "remove node",
    "add node",
    "kill store",
    "kill Serve's controller",
)
VLLM_FAULTS = ("kill vLLM",)
"""What can only be done where a vLLM engine runs."""
CHANGES = (
    "add model",
    "update model",
    "add tool",
    "promote",
    "edit file",
    "remove tool",
    "remove model",
)
_DEPLOYMENTS = {
    "kill gateway": "Gateway",
    "kill router": "Router",
    "kill embedder": "Embedder",
    "kill controller": "PoolController",
}
STORE_AWAY_S = 5.0
SETTLE_S = 2.0
"""After everything is whole again, until the next action."""
_WHOLE_TIMEOUT_S = 120.0
_POLL_S = 0.25
_TOOL_PATIENCE_S = 15.0
"""How long to wait for a tool to be called."""

Json = dict[str, Any]


@dataclass
class Done:
    """One action."""

    name: str
    began_unix_s: float
    what: str = ""
    """What it was done to."""
    done_unix_s: float = 0.0
    """When it was done; its effects go on."""
    whole_s: float | None = None
    """From its beginning until everything was as it should be; `None` if that never came."""
    missing: str = ""
    """What was missing then."""

    @property
    def is_fault(self) -> bool:
        """Whether something was broken."""
        return self.name in (*FAULTS, *VLLM_FAULTS)


class Script:
    """Does one action after another; drawn from a seed, so that a run can be repeated."""

    def __init__(self, running: ChaosCluster, client: httpx.AsyncClient, seed: int) -> None:
        """Begin with the pool of the configuration file.

        Args:
            running: The cluster.
            client: Of its HTTP API.
            seed: Decides what is done, to whom, and in which order.
        """
        self._running = running
        self._client = client
        self._random = random.Random(seed)
        self._number = 0
        self._added: list[str] = []
        self._tools: list[str] = []
        self._nodes_away = 0
        self._revision = 1
        """Of the pool, after the last change."""
        self._dead: set[str] = set()
        """Names of the killed replicas, and ids of the removed nodes."""
        self._configured = tuple(model.model_id for model in load_config(running.config).models)
        self.done: list[Done] = []

    async def until_whole(self, timeout_s: float = _WHOLE_TIMEOUT_S) -> str | None:
        """Wait until everything is as it should be; what is missing if it never comes."""
        ends_s = time.monotonic() + timeout_s
        missing: str | None = "unknown"
        wanted = {*self._configured, *self._added}
        while time.monotonic() < ends_s:
            try:
                pool = await admin(self._client, "GET", "/models")
                missing = f"revision {pool['revision']} of the pool"
                if (pool["revision"] or 0) >= self._revision:
                    missing = await asyncio.to_thread(
                        self._running.not_whole, wanted, pool, self._dead
                    )
            except Exception as error:  # whoever tells is among those that die
                missing = repr(error)
            if missing is None:
                return None
            await asyncio.sleep(_POLL_S)
        return missing

    async def run(self, names: Sequence[str]) -> None:
        """Do these, in this order; one that makes no sense now gives way to its opposite."""
        for name in names:
            await self._do(self._possible(name))
            await asyncio.sleep(SETTLE_S)

    async def run_until(self, ends_s: float, names: Sequence[str]) -> None:
        """All of these in order, then again and again in random order.

        Args:
            ends_s: When to begin no more; monotonic clock.
            names: The actions.
        """
        order = list(names)
        while time.monotonic() < ends_s:
            for name in order:
                await self.run([name])
                if time.monotonic() >= ends_s:
                    break
            self._random.shuffle(order)

    async def tidy(self) -> str | None:
        """Take out what was added and bring back what was removed; what stays missing."""
        while self._nodes_away:
            await self.run(["add node"])
        for _ in range(len(self._tools)):
            await self.run(["remove tool"])
        for _ in range(len(self._added)):
            await self.run(["remove model"])
        return await self.until_whole()

    def _possible(self, name: str) -> str:
        opposite = {
            "remove node": ("add node", self._nodes_away > 0),
            "add node": ("remove node", self._nodes_away == 0),
            "remove model": ("add model", not self._added),
            "remove tool": ("add tool", not self._tools),
        }
        other, is_needed = opposite.get(name, (name, False))
        return other if is_needed else name

    async def _do(self, name: str) -> None:
        done = Done(name, time.time())
        self.done.append(done)
        self._number += 1
        doers: dict[str, Callable[[], Awaitable[str]]] = {
            "kill engine": self._kill_engine,
            "kill tool worker": self._kill_tool_worker,
            "kill store": self._kill_store,
            "kill Serve's controller": self._kill_serve_controller,
            "kill vLLM": self._kill_vllm,
            "remove node": self._remove_node,
            "add node": self._add_node,
            "add model": self._add_model,
            "update model": self._update_model,
            "remove model": self._remove_model,
            "add tool": self._add_tool,
            "remove tool": self._remove_tool,
            "promote": self._promote,
            "edit file": self._edit_file,
        }
        if name in _DEPLOYMENTS:
            done.what = await self._kill_replica(APP_NAME, _DEPLOYMENTS[name])
        else:
            done.what = await doers[name]()
        done.done_unix_s = time.time()
        missing = await self.until_whole()
        done.missing = missing or ""
        done.whole_s = None if missing else time.time() - done.began_unix_s

    # Faults.

    async def _kill_replica(self, app_name: str, deployment: str) -> str:
        replicas = [
            replica
            for replica in await asyncio.to_thread(self._running.replicas)
            if replica.application == app_name and deployment in ("", replica.deployment)
        ]
        chosen = self._random.choice(sorted(replicas, key=lambda replica: replica.actor_name))
        await asyncio.to_thread(self._running.kill, chosen.pid)
        self._dead.add(chosen.actor_name)
        return f"{chosen.actor_name}, pid {chosen.pid}"

    async def _kill_engine(self) -> str:
        applications = {r.application for r in await asyncio.to_thread(self._running.replicas)}
        models = sorted(name for name in applications if name != APP_NAME)
        return await self._kill_replica(self._random.choice(models), "")

    async def _kill_tool_worker(self) -> str:
        """Of a call, or kept warm for one."""
        pid = await asyncio.to_thread(
            self._running.tool_worker, _TOOL_PATIENCE_S, ("ray::tool:", "ray::warm:")
        )
        if pid is None:
            return "none was found"
        await asyncio.to_thread(self._running.kill, pid)
        return f"pid {pid}"

    async def _kill_serve_controller(self) -> str:
        pid = await asyncio.to_thread(self._running.serve_controller)
        await asyncio.to_thread(self._running.kill, pid)
        return f"pid {pid}"

    async def _kill_vllm(self) -> str:
        """The engine's own process, below the replica, while every routed request goes to it."""
        policy = await self._promote(first=VLLM_MODEL)
        await asyncio.sleep(SETTLE_S)
        replica, pid = await asyncio.to_thread(self._running.engine_core)
        await asyncio.to_thread(self._running.kill, pid)
        self._dead.add(replica.actor_name)  # without its engine it is of no use
        return f"pid {pid}, first choice of {policy}"

    async def _kill_store(self) -> str:
        await asyncio.to_thread(self._running.postgres.kill)
        await asyncio.sleep(STORE_AWAY_S)
        await asyncio.to_thread(self._running.postgres.start)
        return f"away for {STORE_AWAY_S:g} s"

    async def _remove_node(self) -> str:
        index = self._random.randrange(1000)
        self._nodes_away += 1
        node_id = await asyncio.to_thread(self._running.remove_node, index)
        self._dead.add(node_id)
        return "a worker with all it runs"

    async def _add_node(self) -> str:
        self._nodes_away -= 1
        self._running.add_node()  # Ray sets signal handlers: no other thread may
        return "a fresh worker"

    # Changes.

    async def _change(self, method: str, path: str, body: Json | None = None) -> None:
        said = await admin(self._client, method, path, body)
        self._revision = max(self._revision, said.get("revision", 0))

    async def _add_model(self) -> str:
        model_id = f"added-{self._number}"
        body = {
            "type": "custom",
            "model_id": model_id,
            "import_path": "benchmarks.engines:InstantModel",
            "card": {"description": f"Added as number {self._number}."},
        }
        await self._change("POST", "/models", body)
        self._added.append(model_id)
        return model_id

    async def _remove_model(self) -> str:
        model_id = self._added.pop(0)
        await self._change("DELETE", f"/models/{model_id}")
        return model_id

    async def _update_model(self) -> str:
        """Other settings, which need another application."""
        model_id = self._random.choice(self._configured)
        model = load_config(self._running.config).model(model_id).model_dump(mode="json")
        model["max_ongoing_requests"] += 1 + self._number
        await self._change("PUT", f"/models/{model_id}", model)
        return model_id

    async def _add_tool(self) -> str:
        tool_id = f"tool-{self._number}"
        tool = {"type": "calculator", "tool_id": tool_id, "num_cpus": 0.1}
        await self._change("POST", "/tools", {"tool": tool, "models": ["paced", "instant"]})
        self._tools.append(tool_id)
        return tool_id

    async def _remove_tool(self) -> str:
        tool_id = self._tools.pop(0)
        await self._change("DELETE", f"/tools/{tool_id}")
        return tool_id

    async def _promote(self, first: str = "") -> str:
        """A policy that takes the pairs in an order of its own.

        Args:
            first: A model whose pairs it takes before all others.
        """
        config = load_config(self._running.config)
        cards = pair_cards(config)
        order = self._random.sample(range(len(cards)), len(cards))
        order.sort(key=lambda place: cards[place].pair.model_id != first)
        made = ranked_snapshot(cards, config.embedder.model, order)
        made = replace(made, policy={}, metadata={"kind": "chaos", "number": self._number})
        store = await Store.open(config.store_url())
        try:
            snapshot_id = await keep_snapshot(config, store, made)
            version = await promote(store, snapshot_id, "chaos")
        finally:
            await store.close()
        return f"policy {version}"

    async def _edit_file(self) -> str:
        """A price, and settings that need another application."""
        price = {"usd_per_1m_prompt_tokens": 0.02, "usd_per_1m_completion_tokens": self._number}

        def change(config: Json) -> None:
            models = {model["model_id"]: model for model in config["models"]}
            models["instant"]["price"] = price
            models["single"]["max_ongoing_requests"] = 64 + self._number

        pool = await admin(self._client, "GET", "/models")
        self._revision = max(self._revision, (pool["revision"] or 0) + 1)
        await asyncio.to_thread(self._running.edit, change)
        return "the price of instant, the bound of single"
