"""What the owner of a request sees of it: the real orchestrator behind the real gateway, asked by
the real `openai` client and by `atlas`; only the engines and the embedder are scripted."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import uvicorn
from typer.testing import CliRunner

from serve_app.cli.app import app
from serve_app.cli.console import console
from serve_app.config import AuthConfig, GatewayConfig
from serve_app.errors import EngineError
from serve_app.gateway.app import build_api
from serve_app.jobs import Jobs
from serve_app.store import create_key
from tests.gateway_fakes import IdleLauncher
from tests.path2_fakes import Path2, path2

UNKNOWN = "req_" + "0" * 32
PAGE = Path(__file__).parents[3] / "docs" / "api.md"


@pytest.fixture(autouse=True)
def own_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session's graph may have set another one."""
    monkeypatch.setenv("ATLAS_DATA_DIR", str(tmp_path))


@dataclass
class Served:
    """A deployment in this process, and keys of three callers."""

    graph: Path2
    url: str
    ann: str
    bob: str
    admin: str

    def client(self, key: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20)

    async def ask(self, key: str, **options: Any) -> Any:
        options.setdefault("model", "cheap")
        messages: Any = [{"role": "user", "content": "something else"}]
        return await self.client(key).chat.completions.create(messages=messages, **options)

    async def get(self, key: str, request_id: str) -> httpx2.Response:
        headers = {"authorization": f"Bearer {key}"}
        async with httpx2.AsyncClient(timeout=20) as client:
            return await client.get(f"{self.url}/v1/trajectories/{request_id}", headers=headers)

    async def atlas(self, *words: str, code: int = 0) -> str:
        """What a command of ann's prints."""
        options = ["--url", self.url, "--api-key", self.ann]
        result = await asyncio.to_thread(CliRunner().invoke, app, [*words, *options])
        assert result.exit_code == code, result.output
        return result.output


@pytest.fixture
async def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    monkeypatch.setattr(console, "width", 120)
    async with path2(tmp_path) as graph:
        gateway = GatewayConfig(auth=AuthConfig(mode="required"))
        config = graph.config.model_copy(update={"gateway": gateway})
        jobs = Jobs(config, graph.store, IdleLauncher())
        api = build_api(graph.orchestrator, graph.store, graph.outcomes, jobs, config)
        listener = socket.create_server(("127.0.0.1", 0))
        options = uvicorn.Config(api, log_config=None, access_log=False, lifespan="off")
        server = uvicorn.Server(options)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        ann, bob, admin = [
            (await create_key(graph.store, name, scopes))[1]
            for name, scopes in (
                ("ann", ["chat"]),
                ("bob", ["chat"]),
                ("admin", ["chat", "feedback", "admin"]),
            )
        ]
        while not server.started:
            await asyncio.sleep(0.01)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        yield Served(graph, url, ann, bob, admin)
        server.should_exit = True
        await serving


def nested(span: dict[str, Any]) -> Any:
    """Kinds and names of a span and of those below it."""
    return (span["kind"], span["name"], [nested(child) for child in span["children"]])


def happened(chunks: list[Any]) -> list[tuple[str, str]]:
    """Phase and kind of each event."""
    told = [chunk.model_extra["atlas"]["event"] for chunk in chunks if is_event(chunk)]
    return [(event["type"], event["span"]["kind"]) for event in told]


def is_event(chunk: Any) -> bool:
    return "event" in (chunk.model_extra or {}).get("atlas", {})


async def test_the_owner_reads_the_tree_of_a_request_right_after_its_answer(
    served: Served,
) -> None:
    answer = await served.ask(served.ann, model="atlas")
    response = await served.get(served.ann, answer._request_id)
    assert response.status_code == 200
    body = response.json()
    pair = answer.model
    model: Any = ("model", pair.partition("@")[0], [])
    decision: Any = ("decision", "router", [])
    assert nested(body["trace"]) == (
        "request",
        answer._request_id,
        [decision, ("pair", pair, [model])],
    )
    assert (body["decision"]["pair"], body["stop"], body["num_dropped"]) == (pair, "answered", 0)
    counted = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    assert body["usage"] == body["trace"]["usage"] == counted


async def test_the_id_of_the_completion_names_the_request_too(served: Served) -> None:
    answer = await served.ask(served.ann)
    response = await served.get(served.ann, answer.id)
    assert response.json()["request_id"] == answer._request_id


async def test_a_request_of_another_key_looks_like_an_unknown_one(served: Served) -> None:
    request_id = (await served.ask(served.ann))._request_id
    for key in (served.bob, served.admin):
        other = await served.get(key, request_id)
        assert other.status_code == 404
        unknown = await served.get(key, UNKNOWN)
        assert other.text == unknown.text.replace(UNKNOWN, request_id)


async def test_a_request_that_failed_says_why_it_stopped(served: Served) -> None:
    served.graph.engines.says["cheap"] = EngineError("broken")
    with pytest.raises(openai.APIStatusError) as caught:
        await served.ask(served.ann)
    request_id = caught.value.response.headers["x-request-id"]
    body = (await served.get(served.ann, request_id)).json()
    assert (body["stop"], body["error"]) == ("failed", "broken")
    assert body["trace"]["children"][0]["error"] == "broken"


async def test_a_stream_tells_of_spans_in_chunks_that_the_client_reads(served: Served) -> None:
    stream = await served.ask(served.ann, stream=True, extra_body={"atlas": {"events": True}})
    chunks = [chunk async for chunk in stream]
    assert happened(chunks) == [
        ("begin", "request"),
        ("begin", "pair"),
        ("begin", "model"),
        ("end", "model"),
        ("end", "pair"),
    ]
    text = "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices)
    assert text == "cheap says hello"
    assert all(chunk.choices == [] for chunk in chunks if is_event(chunk))
    assert chunks[-1].model_extra["atlas"]["request_id"] == stream.response.headers["x-request-id"]
    assert stream.response.headers["x-atlas-pair"] == "cheap@none"
    assert stream.response.headers["x-atlas-path"] == "pinned"


async def test_without_the_option_a_stream_has_no_event(served: Served) -> None:
    chunks = [chunk async for chunk in await served.ask(served.ann, stream=True)]
    assert happened(chunks) == []
    assert all(chunk.choices for chunk in chunks)


async def test_usage_and_events_go_together(served: Served) -> None:
    stream = await served.ask(
        served.ann,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"atlas": {"events": True}},
    )
    chunks = [chunk async for chunk in stream]
    assert len(happened(chunks)) == 5
    assert chunks[-1].usage.total_tokens == 15


async def test_a_failure_after_the_first_event_is_an_error_event(served: Served) -> None:
    served.graph.engines.says["cheap"] = EngineError("broken")
    stream = await served.ask(served.ann, stream=True, extra_body={"atlas": {"events": True}})
    chunks: list[Any] = []

    async def read() -> None:
        async for chunk in stream:
            chunks.append(chunk)

    with pytest.raises(openai.APIError, match="broken"):
        await read()
    assert happened(chunks)[-1] == ("end", "pair")


async def test_events_of_an_answer_that_is_whole_are_refused(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="only allowed with 'stream': true") as caught:
        await served.ask(served.ann, extra_body={"atlas": {"events": True}})
    assert caught.value.param == "atlas.events"


async def test_the_command_shows_the_tree_and_why_it_stopped(served: Served) -> None:
    request_id = (await served.ask(served.ann, model="atlas"))._request_id
    shown = await served.atlas("trace", request_id)
    assert f"request {request_id}" in shown
    assert "decision router" in shown
    assert "15 tokens · $" in shown
    assert "stop: answered" in shown


async def test_the_command_says_that_there_is_no_such_request(served: Served) -> None:
    shown = await served.atlas("trace", UNKNOWN, code=1)
    assert f"no request '{UNKNOWN}' (404)" in shown


async def test_a_question_is_asked_with_its_trace(served: Served) -> None:
    shown = await served.atlas("ask", "what?", "--pair", "cheap", "--trace")
    lines = [line.rstrip() for line in shown.splitlines()]
    assert "request req_" in shown
    assert "model cheap" in shown
    assert "cheap says hello" in lines
    assert "…" not in shown


# The page.


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


async def test_the_client_of_the_page_prints_events_and_answer(served: Served) -> None:
    (code,) = [block for block in blocks("python") if '"events": True' in block]
    code = code.replace("http://127.0.0.1:8000", served.url)
    code = code.replace('api_key="none"', f"api_key={served.ann!r}")
    ran = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await asyncio.wait_for(ran.communicate(), 60)
    assert ran.returncode == 0, err.decode()
    lines = out.decode().splitlines()
    assert lines[0].startswith("begin request req_")
    assert "end decision router" in lines
    assert "says hello" in out.decode()


async def test_the_event_of_the_page_has_the_fields_of_a_real_one(served: Served) -> None:
    (block,) = [json.loads(block) for block in blocks("json") if '"event"' in block]
    stream = await served.ask(served.ann, stream=True, extra_body={"atlas": {"events": True}})
    real = (await anext(aiter(stream))).model_extra["atlas"]
    assert list(block["atlas"]) == list(real)
    assert list(block["atlas"]["event"]) == list(real["event"])
    assert list(block["atlas"]["event"]["span"]) == list(real["event"]["span"])
    await stream.close()
