"""One gateway without Ray, and its remote model in a process of its own, as in the deployed graph.

Both are real: the HTTP API and the orchestrator under uvicorn, and `RemoteModel` behind a socket.
How to run: `python -m benchmarks.hostile.gateway PORT ENGINE_PORT FOLDER`. Requests name the model;
nothing is embedded or routed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import pickle
import struct
import sys
import time
from collections.abc import AsyncIterator, Generator
from pathlib import Path
from typing import Any

import uvicorn

from serve_app.budget import Deadline
from serve_app.config import AtlasConfig
from serve_app.gateway.app import build_api
from serve_app.jobs import Jobs
from serve_app.models.clients import ModelClients
from serve_app.models.protocol import ChatBody
from serve_app.orchestrator.orchestrator import Orchestrator
from serve_app.schemas import MemberState, ModelMember, PoolState
from serve_app.store import OutcomeLog, Store
from serve_app.tools.runner import ToolRunner

WATCH_FILE = "loop"
_FRAME_BYTES = 8
_DOUBLE = struct.Struct("d")


def config_of(engine_port: int, folder: Path) -> AtlasConfig:
    """One remote model at the stub engine, with a tool of each kind that needs no process."""
    model = {
        "type": "remote",
        "model_id": "stub",
        "base_url": f"http://127.0.0.1:{engine_port}/v1",
        "remote_model": "m",
        "health_path": None,
        "max_retries": 0,
        "tools": ["none", "calculator", "best_of"],
    }
    tools = [
        {"type": "calculator", "tool_id": "calculator"},
        {"type": "best_of", "tool_id": "best_of", "num_samples": 8},
    ]
    limits = {"default_deadline_s": 10.0, "adapt_to_load": False}
    return AtlasConfig.model_validate(
        {
            "models": [model],
            "tools": tools,
            "gateway": {"limits": limits},
            "data_dir": str(folder),
        }
    )


class LoopWatch:
    """The longest time of its own processor that a process's event loop spent in one callback.

    Other work on the machine does not count. Kept in a file, for another process to read.
    """

    def __init__(self, path: Path) -> None:
        """Use a file; it is made where it is missing."""
        with path.open("ab") as file:
            file.truncate(_DOUBLE.size)
        with path.open("r+b") as file:
            self._shared = mmap.mmap(file.fileno(), _DOUBLE.size)

    def start(self) -> None:
        """Begin to watch the loops of this process."""
        run = asyncio.Handle._run

        def timed(handle: asyncio.Handle) -> None:
            began_s = time.thread_time()
            run(handle)
            taken_s = time.thread_time() - began_s
            if taken_s > _DOUBLE.unpack(self._shared)[0]:
                self._shared[:] = _DOUBLE.pack(taken_s)

        asyncio.Handle._run = timed  # type: ignore[assignment, method-assign]

    def take_ms(self) -> float:
        """The longest since the last look, in milliseconds."""
        held_ms: float = 1000 * _DOUBLE.unpack(self._shared)[0]
        self._shared[:] = _DOUBLE.pack(0.0)
        return held_ms


async def write_frame(writer: asyncio.StreamWriter, value: Any) -> None:
    """Send one value."""
    data = pickle.dumps(value)
    writer.write(len(data).to_bytes(_FRAME_BYTES, "big") + data)
    await writer.drain()


async def read_frame(reader: asyncio.StreamReader) -> Any:
    """Receive one value."""
    size = int.from_bytes(await reader.readexactly(_FRAME_BYTES), "big")
    return pickle.loads(await reader.readexactly(size))


async def serve_model(config: AtlasConfig, path: str) -> None:
    """Run the remote model behind a socket; one connection per call."""
    from serve_app.models.remote import RemoteModel

    model = RemoteModel(config.models[0])  # type: ignore[arg-type]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        method, body = await read_frame(reader)

        async def work() -> None:
            try:
                if method == "complete":
                    await write_frame(writer, ("item", await model.complete(body)))
                else:
                    async for batch in model.stream(body):
                        await write_frame(writer, ("item", batch))
            except Exception as error:
                await write_frame(writer, ("error", error))
            else:
                await write_frame(writer, ("end", None))

        working = asyncio.create_task(work())
        leaving = asyncio.create_task(reader.read(1))  # the other side sends no more: it left
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
        writer.close()

    server = await asyncio.start_unix_server(answer, path)
    async with server:
        await server.serve_forever()


class _Response:
    """What a Serve handle gives: awaited for a whole answer, iterated for a stream."""

    def __init__(self, path: str, method: str, body: ChatBody) -> None:
        self._path, self._method, self._body = path, method, body
        self._items = self._read()
        self._writer: asyncio.StreamWriter | None = None

    def __await__(self) -> Generator[Any, None, Any]:
        return anext(self._items).__await__()

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._items

    async def _read(self) -> AsyncIterator[Any]:
        reader, self._writer = await asyncio.open_unix_connection(self._path)
        try:
            await write_frame(self._writer, (self._method, self._body))
            while True:
                kind, value = await read_frame(reader)
                if kind == "error":
                    raise value
                if kind == "end":
                    return
                yield value
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Leave; the model's process sees it."""
        if self._writer is not None:
            self._writer.close()


class _Method:
    def __init__(self, path: str, name: str) -> None:
        self._path, self._name = path, name

    def remote(self, body: ChatBody) -> _Response:
        return _Response(self._path, self._name, body)


class _Handle:
    def __init__(self, path: str) -> None:
        self.complete = _Method(path, "complete")
        self.stream = _Method(path, "stream")

    def options(self, **_: Any) -> _Handle:
        return self


class _Clients(ModelClients):
    def __init__(self, path: str) -> None:
        super().__init__()
        self._one = _Handle(path)

    async def _handle(self, model_id: str, deadline: Deadline) -> Any:
        return self._one


class _Told:
    """A controller's long poll: one pool, and then silence."""

    def __init__(self, config: AtlasConfig) -> None:
        self._pool = PoolState(
            pool_version=1,
            models=tuple(ModelMember(m.model_id, MemberState.READY) for m in config.models),
            tools=("none", *(tool.tool_id for tool in config.tools)),
            pairs=config.all_pairs(),
        )

    @property
    def state(self) -> _Told:
        return self

    async def remote(self, known_version: int, watcher: str) -> PoolState:
        if known_version == self._pool.pool_version:
            await asyncio.Event().wait()
        return self._pool


class _NoLauncher:
    def start(self, config: AtlasConfig, job_id: str) -> None: ...

    def is_running(self, job_id: str) -> bool:
        return False

    def stop(self, job_id: str) -> None: ...


async def serve_gateway(
    config: AtlasConfig, port: int, clients: ModelClients, runner: ToolRunner | None = None
) -> None:
    """Run a gateway until it is told to stop.

    Args:
        config: Its models and tools; all are taken to be ready.
        port: Of loopback.
        clients: Reaches the models.
        runner: Runs the tools; `None`: as in the deployed graph, by Ray.
    """
    store = await Store.open(config.store_url())
    outcomes = OutcomeLog(store)
    told: Any = _Told(config)
    nobody: Any = None  # requests name their pair: nothing is embedded or decided
    orchestrator = Orchestrator(config, nobody, nobody, told, outcomes.record, clients)
    if runner is not None:
        orchestrator._pairs._runner = orchestrator._pairs.parts.tools._runner = runner
    while not orchestrator.ready()[0]:
        await asyncio.sleep(0.01)
    app = build_api(orchestrator, store, outcomes, Jobs(config, store, _NoLauncher()), config)
    options = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=port,
        log_level="critical",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=1,
    )
    await uvicorn.Server(options).serve()
    orchestrator.close()
    await outcomes.close()
    await store.close()


def main() -> None:
    """Run the gateway, or with a fourth argument its model."""
    port, engine_port, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    config, path = config_of(engine_port, folder), str(folder / "model.sock")
    logging.disable(logging.CRITICAL)  # each case would leave a trace
    if not sys.argv[4:]:
        LoopWatch(folder / WATCH_FILE).start()
    run = serve_model(config, path) if sys.argv[4:] else serve_gateway(config, port, _Clients(path))
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run)


if __name__ == "__main__":
    main()
