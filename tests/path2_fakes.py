"""The whole path of a request without Ray: the real orchestrator, router, follower and store, in
front of an embedder that knows a few texts and engines that answer as they are told."""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve_app.budget import Deadline
from serve_app.config import AtlasConfig, StoreConfig
from serve_app.config.patterns.check import members_of_patterns
from serve_app.errors import DeadlineExceeded, EngineError, InvalidRequest
from serve_app.gateway.chat.extension import completion_extension
from serve_app.gateway.chat.writing import ChunkWriter, completion
from serve_app.models.clients import ModelClients
from serve_app.models.engine_output import StreamChecker, checked_completion
from serve_app.models.protocol import ChatBody
from serve_app.orchestrator.orchestrator import Orchestrator
from serve_app.router.deployment import Router
from serve_app.router.snapshots.library import SnapshotLibrary
from serve_app.router.snapshots.snapshot import RouterSnapshot
from serve_app.schemas import (
    ChatCall,
    Limits,
    MemberState,
    ModelMember,
    Pair,
    PoolState,
    Report,
)
from serve_app.store import Mode, OutcomeLog, Store, add_snapshot, publish
from tests.router_data import DIM, make_snapshot, topics

MODELS = ("cheap", "math", "strong")
PAIRS = tuple(Pair(model, "none") for model in MODELS)
CHEAP, MATH, STRONG = PAIRS


class Response:
    """What a handle's `remote` returns."""

    def __init__(self, work: Awaitable[Any]) -> None:
        self._task = asyncio.ensure_future(work)

    def __await__(self) -> Any:
        return self._task.__await__()

    def cancel(self) -> None:
        self._task.cancel()


class Method:
    """A handle's method."""

    def __init__(self, run: Callable[..., Awaitable[Any]]) -> None:
        self._run = run

    def remote(self, *arguments: Any) -> Response:
        return Response(self._run(*arguments))


class Handle:
    """A handle to an object in this process.

    Attributes:
        calls: Arguments of every call, by method.
        away: Methods that fail as if the other side were gone.
    """

    def __init__(self, target: Any) -> None:
        self._target = target
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.away: set[str] = set()

    def __getattr__(self, name: str) -> Method:
        async def run(*arguments: Any) -> Any:
            self.calls.append((name, arguments))
            if name in self.away:
                raise EngineError("it is away")
            return await getattr(self._target, name)(*arguments)

        return Method(run)


class WordEmbedder:
    """Embeds texts that name a topic (`topic 1`) onto it, and any other onto an axis of its own."""

    async def embed(self, texts: Sequence[str], alone: bool = False) -> NDArray[np.float32]:
        return np.stack([self.one(text) for text in texts])

    async def embed_lasting(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return await self.embed(texts)

    @staticmethod
    def one(text: str) -> NDArray[np.float32]:
        for number, topic in enumerate(topics()):
            if f"topic {number}" in text:
                return np.array(topic, np.float32)
        vector: NDArray[np.float32] = np.eye(DIM, dtype=np.float32)[4 + sum(text.encode()) % 12]
        return vector


class Controller:
    """A pool in which every model is ready."""

    def __init__(self, config: AtlasConfig) -> None:
        self._state = PoolState(
            pool_version=7,
            models=tuple(ModelMember(m.model_id, MemberState.READY) for m in config.models),
            tools=tuple(tool.tool_id for tool in config.tools),
            pairs=config.all_pairs(),
            patterns=members_of_patterns(config),
        )

    async def state(self, known_version: int = -1, watcher: str | None = None) -> PoolState:
        if known_version == self._state.pool_version:
            await asyncio.Event().wait()
        return self._state


@dataclass
class Engines(ModelClients):
    """Engines that say what they are told to, checked as those in processes of their own are.

    Attributes:
        says: Model to what it answers: a text, a whole completion, an error, or a function of the
            request's body.
        bodies: Every request, in the order it came.
        sessions: Of every request, empty where it has none.
    """

    says: dict[str, Any] = field(default_factory=dict)
    bodies: list[tuple[str, ChatBody]] = field(default_factory=list)
    sessions: list[str] = field(default_factory=list)

    def use(self, applications: Mapping[str, str]) -> None:
        """Whatever answers for a model, it is this object."""

    def asked(self, model_id: str) -> list[ChatBody]:
        return [body for asked, body in self.bodies if asked == model_id]

    async def complete(
        self, model_id: str, body: ChatBody, deadline: Deadline, session: str = ""
    ) -> dict[str, Any]:
        self.bodies.append((model_id, body))
        self.sessions.append(session)
        said = self.says.get(model_id, f"{model_id} says hello")
        if callable(said):
            said = said(body)
        if asyncio.iscoroutine(said):
            try:
                async with asyncio.timeout(deadline.remaining_s()):
                    said = await said
            except TimeoutError:
                raise DeadlineExceeded("too slow") from None
        if isinstance(said, Exception):
            raise said
        if isinstance(said, dict):
            return checked_completion(said, body)
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": said},
            "finish_reason": "stop",
        }
        if body.get("logprobs"):
            choice["logprobs"] = {"content": [{"token": said, "logprob": -0.25}]}
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        return {"choices": [choice], "usage": usage}

    async def stream(
        self, model_id: str, body: ChatBody, deadline: Deadline, session: str = ""
    ) -> AsyncGenerator[dict[str, Any], None]:
        completion = await self.complete(model_id, body, deadline, session)
        checker = StreamChecker(body)
        for choice in completion["choices"]:
            for chunk in _pieces(choice):
                for checked in checker.checked([chunk]):
                    yield checked
        yield {"choices": [], "usage": completion.get("usage")}


def _pieces(choice: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The chunks of a choice."""
    head, message = {"index": choice["index"]}, choice["message"]
    text = message.get("content") or ""
    for piece in (text[:3], text[3:]):
        part = head | {"delta": {"content": piece}, "finish_reason": None}
        yield {"choices": [part | {"logprobs": choice.get("logprobs")}]}
    for number, call in enumerate(message.get("tool_calls") or ()):
        yield {"choices": [head | {"delta": {"tool_calls": [{"index": number, **call}]}}]}
    yield {"choices": [head | {"delta": {}, "finish_reason": choice.get("finish_reason")}]}


def refuses_logprobs(body: ChatBody) -> Any:
    """An engine that gives none."""
    return InvalidRequest("no logprobs here") if body.get("logprobs") else "plain"


def path2_config(
    folder: Path,
    store_url: str = StoreConfig().url,
    patterns: Sequence[Any] = (),
    capabilities: Mapping[str, Any] = MappingProxyType({}),
    rules: Sequence[Any] = (),
    breaker_failures: int = 5,
    **router: Any,
) -> AtlasConfig:
    """Three models without tools, the third one dear."""
    models = [
        {
            "type": "remote",
            "model_id": name,
            "base_url": "http://127.0.0.1:1/v1",
            "remote_model": "x",
            "capabilities": capabilities.get(name, {}),
            "price": {"usd_per_1m_prompt_tokens": price, "usd_per_1m_completion_tokens": price},
        }
        for name, price in zip(MODELS, (1.0, 10.0, 100.0), strict=True)
    ]
    return AtlasConfig.model_validate(
        {
            "models": models,
            "patterns": patterns,
            "rules": rules,
            "embedder": {"model": "test-encoder"},
            "router": {"refresh_interval_s": 0.05, "rollback": {"interval_s": 0.05}} | router,
            "data_dir": str(folder),
            "store": {"url": store_url},
            "gateway": {"breaker_failures": breaker_failures},
        }
    )


@dataclass
class Path2:
    """Everything of one deployment."""

    config: AtlasConfig
    store: Store
    embedder: Handle
    router: Handle
    replica: Router
    orchestrator: Orchestrator
    engines: Engines
    outcomes: OutcomeLog
    reports: list[Report] = field(default_factory=list)
    number: int = 0

    async def promote(self, snapshot: RouterSnapshot | None, **how: Any) -> int:
        """Publish a snapshot, and wait until the replica serves it (or has it on trial)."""
        snapshot_id = None
        if snapshot is not None:
            snapshot_id = SnapshotLibrary(self.config.snapshots_path()).add(snapshot)
            await add_snapshot(self.store, snapshot_id, snapshot.metadata)
        version = await publish(self.store, snapshot_id, "a test", **how)
        assert version is not None
        mode = how.get("mode", Mode.SERVING)
        await self.until(lambda following: version == {
            Mode.SERVING: following.policy_version,
            Mode.CANARY: following.canary,
            Mode.SHADOW: following.shadow,
        }[mode])  # fmt: skip
        return version

    async def until(self, holds: Callable[[Any], bool]) -> None:
        async with asyncio.timeout(30):
            while not holds(await self.replica.following()):
                await asyncio.sleep(0.01)

    def call(self, query: str = "something else", **changes: Any) -> ChatCall:
        self.number += 1
        limits = Limits(alpha=0.0, deadline_s=changes.pop("deadline_s", 30.0), max_steps=4)
        limits = replace(limits, **changes.pop("limits", {}))
        return ChatCall(
            request_id=changes.pop("request_id", f"req_{self.number:032x}"),
            model=changes.pop("model", "atlas"),
            messages=changes.pop("messages", ({"role": "user", "content": query},)),
            sampling=changes.pop("sampling", {}),
            limits=limits,
            **changes,
        )

    async def ask(self, query: str = "something else", **changes: Any) -> tuple[str, Report]:
        """The text of a whole answer, and its report."""
        completion, report = await self.complete(self.call(query, **changes))
        return completion["choices"][0]["message"]["content"], report

    async def complete(self, call: ChatCall) -> tuple[dict[str, Any], Report]:
        """A whole answer as the gateway writes it, and its report."""
        answer, report = await self.orchestrator.complete(call)
        extension = completion_extension(report, alpha=call.limits.alpha, explain=False)
        return completion(call, answer, extension), report

    async def items(self, call: ChatCall) -> AsyncIterator[Any]:
        """What a stream gives, as the gateway writes it: chunks, and the report."""
        writer = ChunkWriter(call)
        async for item in self.orchestrator.stream(call):
            if isinstance(item, Report):
                yield item
                continue
            for chunk in writer.chunks(item):
                yield chunk

    async def stream(self, query: str = "something else", **changes: Any) -> list[Any]:
        """Everything that a stream gives."""
        return [item async for item in self.items(self.call(query, **changes))]


@asynccontextmanager
async def path2(
    folder: Path,
    store_url: str = StoreConfig().url,
    patterns: Sequence[Any] = (),
    capabilities: Mapping[str, Any] = MappingProxyType({}),
    rules: Sequence[Any] = (),
    breaker_failures: int = 5,
    **router: Any,
) -> AsyncIterator[Path2]:
    """A deployment in this process."""
    config = path2_config(
        folder, store_url, patterns, capabilities, rules, breaker_failures, **router
    )
    store = await Store.open(config.store_url())
    embedder, controller = Handle(WordEmbedder()), Handle(Controller(config))
    replica = Router.__new__(Router)
    await replica.__init__(config, embedder, controller)  # type: ignore[misc]
    engines, handle = Engines(), Handle(replica)
    outcomes = OutcomeLog(store, flush_interval_s=0.01)
    reports: list[Report] = []

    def record(report: Report, alpha: float) -> None:
        reports.append(report)
        outcomes.record(report, alpha)

    orchestrator = Orchestrator(config, embedder, handle, controller, record, engines)
    await orchestrator._watcher.first()
    await orchestrator._rules.start()
    try:
        yield Path2(
            config, store, embedder, handle, replica, orchestrator, engines, outcomes, reports
        )
    finally:
        await outcomes.close()
        tasks = (*replica._tasks, replica._watcher._task, orchestrator._watcher._task)
        async with replica._follower.at_work:  # a query is not left half done
            for task in tasks:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        orchestrator.close()
        await store.close()
        if replica._follower.store is not None:
            await replica._follower.store.close()


def plain_snapshot() -> RouterSnapshot:
    """A snapshot of the three pairs, without a policy: path 1 alone."""
    return replace(make_snapshot(), pairs=PAIRS)
