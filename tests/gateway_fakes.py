"""The real gateway on a loopback port, in front of a scripted orchestrator: the one fake part."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import openai
import uvicorn
from starlette.applications import Starlette

from serve_app.config import AtlasConfig
from serve_app.config.patterns.check import members_of_patterns
from serve_app.errors import (
    EngineBusy,
    EngineError,
    InvalidRequest,
    KeyRequired,
    ToolFailed,
    ToolRetry,
    ToolWorkerDied,
)
from serve_app.gateway.app import build_api
from serve_app.jobs import Jobs, Launcher
from serve_app.models.reply import Choice, ChoicePiece
from serve_app.orchestrator.answer import Answer
from serve_app.orchestrator.direct import DirectTools
from serve_app.orchestrator.run import Piece
from serve_app.schemas import (
    Candidate,
    ChatCall,
    DecidedBy,
    Decision,
    Drift,
    MemberState,
    ModelMember,
    Pair,
    PoolLoad,
    PoolState,
    Report,
    SpanKind,
    SpanRecord,
    Step,
    ToolCall,
    Usage,
)
from serve_app.store import OutcomeLog, Store
from serve_app.tools.base import Function, ToolResult
from serve_app.tools.registry import build_tool

T = TypeVar("T")

PAIR = Pair("small", "calculator")


def gateway_config(tools: list[dict[str, Any]] | None = None, **gateway: Any) -> AtlasConfig:
    """Three remote models that nobody calls, a calculator, and the given tools and settings.

    One of the tools may be another calculator of that name.
    """
    models = [
        {
            "type": "remote",
            "model_id": name,
            "base_url": "http://user:secret@127.0.0.1:1/v1",
            "remote_model": "x",
            "api_key_env": "SECRET_KEY_NAME",
            "tools": ["none", "calculator"],
            "price": {"usd_per_1m_prompt_tokens": 1.0, "usd_per_1m_completion_tokens": 2.0},
        }
        for name in ("small", "large", "broken")
    ]
    named = {tool["tool_id"]: tool for tool in tools or ()}
    named.setdefault("calculator", {"type": "calculator", "tool_id": "calculator"})
    hello = {"name": "hello", "do": [{"ask": {"pair": "small"}}]}
    return AtlasConfig.model_validate(
        {"models": models, "tools": [*named.values()], "patterns": [hello], "gateway": gateway}
    )


class ScriptedOrchestrator:
    """Answers with the last user message; certain messages make it misbehave.

    Attributes:
        calls: Every call that arrived.
        cancelled: Request ids whose work was cancelled or closed early.
        acted: Request ids that did what must not happen twice.
        not_closed: Models whose breaker is not closed, and where it stands.
        drifted: What verdicts say of the candidates.
    """

    def __init__(self, config: AtlasConfig, outcomes: OutcomeLog) -> None:
        self.calls: list[ChatCall] = []
        self.cancelled: list[str] = []
        self.acted: list[str] = []
        self.not_closed: dict[str, str] = {}
        self.drifted: tuple[Drift, ...] = ()
        self.is_ready = True
        self.runner = ScriptedRunner(config)
        self.tools = DirectTools(self.runner)  # type: ignore[arg-type]
        self._outcomes = outcomes
        states = {"broken": MemberState.FAILED}
        self._pool = PoolState(
            pool_version=3,
            models=tuple(
                ModelMember(model.model_id, states.get(model.model_id, MemberState.READY))
                for model in config.models
            ),
            tools=("none", "calculator"),
            pairs=config.all_pairs(),
            patterns=members_of_patterns(config),
        )

    def pool(self) -> PoolState:
        return self._pool

    async def load(self) -> PoolLoad | None:
        return PoolLoad({"small": 7, "large": 0}, frozenset({"notes"}))

    def breakers(self) -> dict[str, str]:
        return self.not_closed

    async def drifts(self) -> tuple[Drift, ...]:
        return self.drifted

    def ready(self) -> tuple[bool, dict[str, Any]]:
        return self.is_ready, {"pool_version": self._pool.pool_version}

    async def decide(self, call: ChatCall) -> Decision:
        self.calls.append(call)
        await self._misbehave(call)
        return _decision()

    async def complete(self, call: ChatCall) -> tuple[Answer, Report]:
        self.calls.append(call)
        await self._misbehave(call)
        choices = [
            Choice(index, call.query, finish_reason="stop")
            for index in range(call.sampling.get("n", 1))
        ]
        return Answer(choices, PAIR, DecidedBy.COLD_START, 0), self._report(call)

    async def stream(self, call: ChatCall) -> AsyncGenerator[Piece | Report, None]:
        self.calls.append(call)
        await self._misbehave(call)
        words = [word + " " for word in call.query.split(" ")]
        if call.query.startswith("!flood"):
            words = ["x" * 65536] * 1000
        try:
            for index in range(call.sampling.get("n", 1)):
                for word in words:
                    yield _piece(ChoicePiece(index, word))
                    if call.query.startswith("!break"):
                        raise EngineError("the engine broke")
                    if call.query.startswith("!bug-late"):
                        raise ValueError("/secret/path")
                    if call.query.startswith("!trickle"):
                        await asyncio.sleep(0.05)
                    if call.query.startswith("!stall"):
                        await asyncio.sleep(60)
                yield _piece(ChoicePiece(index, finish_reason="stop"))
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.append(call.request_id)
            raise
        yield self._report(call)

    async def _misbehave(self, call: ChatCall) -> None:
        if "!act" in call.query:
            if call.begin_effect is None:
                raise KeyRequired("send an Idempotency-Key header", "Idempotency-Key")
            await call.begin_effect()
            self.acted.append(call.request_id)
        if call.query.startswith("!refuse"):
            raise InvalidRequest("no", "messages")
        if call.query.startswith("!fail"):
            raise EngineError("the engine failed")
        if call.query.startswith("!busy"):
            raise EngineBusy("the engine asks for a pause", None, 41.2)
        if call.query.startswith("!bug") and not call.query.startswith("!bug-late"):
            raise ValueError("/secret/path")
        if call.query.startswith("!hang"):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled.append(call.request_id)
                raise

    def _report(self, call: ChatCall) -> Report:
        usage = Usage(7, 5, 0.25)
        tool_call = ToolCall("calculator", {"x": "1+1"}, True, "2", 0.01, {"sources": ["s1"]})
        step = Step(PAIR, DecidedBy.COLD_START, 0.5, usage, 0.02, (tool_call,), answer=call.query)
        report = Report(
            request_id=call.request_id,
            decision=_decision(),
            steps=(step,),
            usage=usage,
            seconds=0.02,
            query=call.query,
            embedding=None if call.query.startswith("!unembedded") else b"\0\0\0\0",
            owner=call.owner,
            spans=(
                SpanRecord(
                    0, None, SpanKind.REQUEST, call.request_id, 0, 0.02, None, 7, 5, 0.25, {}
                ),
                SpanRecord(1, 0, SpanKind.PAIR, str(PAIR), 0.0, 0.02, None, 7, 5, 0.25, {}),
            ),
        )
        self._outcomes.record(report, call.limits.alpha)
        return report


class ScriptedRunner:
    """The pool's tools in this process, without Ray; certain expressions make a call misbehave.

    Attributes:
        calls: Function and arguments of every call.
        cancelled: How many calls were.
    """

    def __init__(self, config: AtlasConfig) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.cancelled = 0
        self._tools = {tool.tool_id: build_tool(tool) for tool in config.tools}

    def functions(self, tool_id: str) -> tuple[Function, ...]:
        return self._tools[tool_id].functions()

    async def run(
        self, tool_id: str, arguments: dict[str, Any], *, deadline_s: float, function: str
    ) -> ToolResult:
        self.calls.append((function, arguments))
        tool = self._tools[tool_id]
        expression = arguments.get("expression")
        match expression:
            case None:
                raise ToolRetry("tool 'calculator': 'expression' is a required property")
            case "!die":
                raise ToolWorkerDied("tool 'calculator' failed: its worker stopped")
            case "!die-once" if len(self.calls) == 1:
                raise ToolWorkerDied("tool 'calculator' failed: its worker stopped")
            case "!fail":
                raise ToolFailed("tool 'calculator' failed")
            case "!bug":
                raise ValueError("/secret/path")
            case "!hang":
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    self.cancelled += 1
                    raise
        done = tool.call(function, arguments, deadline_s)
        return ToolResult(done.text, done.data, 0.01, tool.config.price_usd_per_call)


def _piece(choice: ChoicePiece) -> Piece:
    return Piece(PAIR, DecidedBy.COLD_START, [choice])


def _decision() -> Decision:
    candidates = tuple(
        Candidate(pair, 0.9 - 0.1 * rank, 0.95, 0.1)
        for rank, pair in enumerate((PAIR, Pair("large", "none")))
    )
    return Decision(candidates, DecidedBy.COLD_START, 0.8, 0.5, 2, 3, 0.0001)


class IdleLauncher:
    """Takes jobs and does none of them."""

    def __init__(self) -> None:
        self.running: set[str] = set()

    def start(self, config: AtlasConfig, job_id: str) -> None:
        self.running.add(job_id)

    def is_running(self, job_id: str) -> bool:
        return job_id in self.running

    def stop(self, job_id: str) -> None:
        self.running.discard(job_id)


class Loopback:
    """A running gateway: real uvicorn, real store, scripted orchestrator."""

    def __init__(
        self, config: AtlasConfig, store_url: str, launcher: Launcher | None = None
    ) -> None:
        self.config = config
        self.launcher = IdleLauncher()
        self._launcher = launcher or self.launcher
        self.orchestrator: ScriptedOrchestrator
        self.outcomes: OutcomeLog
        self.store: Store
        self.app: Starlette
        self._store_url = store_url
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop
        # asyncio switches Nagle's algorithm off (40 ms per small answer) only where TCP is named.
        self._listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._listener.bind(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._server: uvicorn.Server
        self._thread = threading.Thread(target=self._run, name="loopback-gateway")

    def start(self) -> None:
        self._thread.start()
        self._started.wait(20)
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()
        if self._failure is not None:
            raise self._failure

    def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run a coroutine function in the server's loop."""

        async def wrapped() -> T:
            return await work()

        return asyncio.run_coroutine_threadsafe(wrapped(), self._loop).result(60)

    def client(self, api_key: str = "none", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=20, **options
        )

    def raw(self, data: bytes, timeout_s: float = 10.0) -> bytes:
        """Send bytes, and read until the server closes or `timeout_s` passes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s) as connection:
            connection.sendall(data)
            return read_all(connection)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._failure = error
        finally:
            self._started.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.store = await Store.open(self._store_url)
        self.outcomes = OutcomeLog(self.store, flush_interval_s=0.05)
        self.orchestrator = ScriptedOrchestrator(self.config, self.outcomes)
        self.jobs = Jobs(self.config, self.store, self._launcher)
        self.app = build_api(self.orchestrator, self.store, self.outcomes, self.jobs, self.config)
        options = uvicorn.Config(self.app, log_config=None, access_log=False, lifespan="off")
        self._server = uvicorn.Server(options)
        serving = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        while not self._server.started and not serving.done():
            await asyncio.sleep(0.01)
        self._started.set()
        await serving
        await self.outcomes.close()
        await self.store.close()


def read_all(connection: socket.socket) -> bytes:
    received = b""
    while True:
        try:
            part = connection.recv(65536)
        except (TimeoutError, ConnectionResetError):
            return received
        if not part:
            return received
        received += part


@contextmanager
def running_gateway(
    folder: Path,
    store_url: str | None = None,
    tools: list[dict[str, Any]] | None = None,
    launcher: Launcher | None = None,
    **gateway: Any,
) -> Iterator[Loopback]:
    """A gateway with these settings, with its store in `folder` where no URL says another."""
    url = store_url or f"sqlite+aiosqlite:///{folder / 'atlas.db'}"
    config = gateway_config(tools, **gateway).model_copy(update={"data_dir": str(folder)})
    loopback = Loopback(config, url, launcher)
    loopback.start()
    try:
        yield loopback
    finally:
        loopback.stop()


def eventually(claim: Callable[[], bool], within_s: float = 5.0) -> bool:
    """Whether the claim becomes true in time."""
    ends = time.monotonic() + within_s
    while time.monotonic() < ends:
        if claim():
            return True
        time.sleep(0.01)
    return claim()
