"""Spans of finished requests, as a collector on loopback receives them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from serve_app.config import AtlasConfig
from serve_app.config.telemetry import TracingConfig
from serve_app.errors import ConfigError, EngineUnavailable
from serve_app.telemetry.tracing import NoTracing, tracing_of
from tests.executor_fakes import reply
from tests.otlp_collector import Collector, Span, collector
from tests.telemetry_fakes import Observed, observed, observed_config

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = {"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01", "tracestate": "vendor=1"}


def traced_config(folder: Path, at: Collector, **tracing: Any) -> AtlasConfig:
    content = tracing.get("content", False)
    settings = {"endpoint": at.url, "sample_ratio": 1.0, "interval_s": 0.05} | tracing
    return observed_config(folder, telemetry={"tracing": settings}, store={"keep_content": content})


def calls_once(body: dict[str, Any]) -> Any:
    """A model that calls the calculator, and then answers."""
    if body.get("tools") and body["messages"][-1]["role"] == "user":
        return reply(calls=('{"expression": "1 + 1"}',))
    return "two"


async def composed(gateway: Observed, **how: Any) -> str:
    """Ask a composed question; the request's id."""
    gateway.engines.says["small"] = calls_once
    response = await gateway.ask("What is secret?", model="pattern:composed", **how)
    assert response.status_code == 200, response.text
    return str(response.json()["id"]).removeprefix("chatcmpl-")


def root_of(spans: list[Span]) -> Span:
    (root,) = (span for span in spans if span.kind == "server")
    return root


async def test_a_composed_question_is_one_tree(tmp_path: Path) -> None:
    with collector() as at:
        async with observed(traced_config(tmp_path, at)) as gateway:
            request_id = await composed(gateway)
        root = root_of(at.spans)
        assert sorted(at.tree(root)[1:]) == sorted(
            [
                "  invoke_workflow composed",
                "    atlas.node retrieve found",
                "      retrieval handbook",
                "    atlas.node parallel sums",
                "      atlas.node ask",
                "      atlas.node ask",
                "        invoke_agent small@calculator",
                "          chat small",
                "          execute_tool calculator",
                "          chat small",
                "        invoke_agent large@none",
                "          chat large",
                "    atlas.node ask answer",
                "      atlas.route",
                "        embeddings",
                "      invoke_agent small@none",
                "        chat small",
            ]
        )
        assert len(at.spans) == len(at.tree(root))
        assert {span.trace_id for span in at.spans} == {request_id.removeprefix("req_")}
        assert at.resources[0]["service.name"] == "atlas-serve"


async def test_spans_have_the_names_of_the_genai_conventions(tmp_path: Path) -> None:
    with collector() as at:
        async with observed(traced_config(tmp_path, at)) as gateway:
            request_id = await composed(gateway)
        chat = at.named("chat large")
        assert chat.kind == "client"
        assert chat.attributes["gen_ai.operation.name"] == "chat"
        assert chat.attributes["gen_ai.request.model"] == "large"
        assert chat.attributes["gen_ai.usage.input_tokens"] == 10
        tool = at.named("execute_tool calculator")
        assert tool.attributes["gen_ai.tool.name"] == "calculator"
        assert at.named("retrieval handbook").attributes["gen_ai.data_source.id"] == "handbook"
        assert at.named("invoke_workflow composed").attributes["gen_ai.agent.name"] == "composed"
        assert at.named("atlas.route").attributes["atlas.confidence"] == 1.0
        root = root_of(at.spans)
        assert root.name == "POST /v1/chat/completions"
        assert root.attributes["http.response.status_code"] == 200
        assert root.attributes["gen_ai.response.id"] == f"chatcmpl-{request_id}"
        assert root.attributes["atlas.candidate"] == "pattern:composed"


async def test_a_span_lies_within_the_span_above(tmp_path: Path) -> None:
    with collector() as at:
        async with observed(traced_config(tmp_path, at)) as gateway:
            await composed(gateway)
        spans = {span.span_id: span for span in at.spans}
        for span in at.spans:
            assert span.began_ns <= span.ended_ns
            if span.parent_id and span.kind != "server":
                above = spans[span.parent_id]
                early_ns, late_ns = above.began_ns - span.began_ns, span.ended_ns - above.ended_ns
                # Wall clock and monotonic clock are read one after the other.
                assert max(early_ns, late_ns) < 50_000_000, (span.name, above.name)


@pytest.mark.parametrize("content", [False, True])
async def test_content_is_told_only_where_it_is_asked_for(tmp_path: Path, content: bool) -> None:
    with collector() as at:
        async with observed(traced_config(tmp_path, at, content=content)) as gateway:
            await composed(gateway)
        told = repr(at.spans)
        assert ("secret" in told, "1 + 1" in told, "two" in told) == (content,) * 3
        if content:
            arguments = at.named("execute_tool calculator").attributes["gen_ai.tool.call.arguments"]
            assert arguments == '{"expression": "1 + 1"}'
            assert "What is secret?" in root_of(at.spans).attributes["gen_ai.input.messages"]


async def test_a_request_joins_its_callers_trace(tmp_path: Path) -> None:
    with collector() as at:
        async with observed(traced_config(tmp_path, at, sample_ratio=0.0)) as gateway:
            await gateway.ask(headers=CALLER)
        root = root_of(at.spans)
        assert (root.trace_id, root.parent_id) == (TRACE_ID, "00f067aa0ba902b7")
        assert {span.trace_id for span in at.spans} == {TRACE_ID}


@pytest.mark.parametrize(
    "traceparent",
    ["", "nonsense", f"00-{'0' * 32}-00f067aa0ba902b7-01", f"00-{TRACE_ID}-00f067aa0ba902b7-01-x"],
)
async def test_a_header_that_cannot_be_read_begins_a_new_trace(
    tmp_path: Path, traceparent: str
) -> None:
    with collector() as at:
        async with observed(traced_config(tmp_path, at)) as gateway:
            await gateway.ask(headers={"traceparent": traceparent})
        assert root_of(at.spans).trace_id != TRACE_ID
        assert root_of(at.spans).parent_id == ""


@pytest.mark.parametrize(
    ("settings", "flags", "traced"),
    [
        ({"sample_ratio": 0.0}, None, False),
        ({"sample_ratio": 1.0}, "00", False),
        ({"sample_ratio": 0.0}, "01", True),
        ({"sample_ratio": 0.0, "follow_caller": False}, "01", False),
    ],
)
async def test_what_is_traced_is_a_matter_of_settings_and_caller(
    tmp_path: Path, settings: dict[str, Any], flags: str | None, traced: bool
) -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-{flags}"} if flags else None
    with collector() as at:
        async with observed(traced_config(tmp_path, at, **settings)) as gateway:
            await gateway.ask(headers=headers)
        assert bool(at.spans) is traced


async def test_feedback_is_an_evaluation_of_the_answer(tmp_path: Path) -> None:
    with collector() as at:
        async with observed(traced_config(tmp_path, at)) as gateway:
            asked = await gateway.ask()
            request_id = asked.json()["id"].removeprefix("chatcmpl-")
            await gateway.outcomes.flush(60)
            body = {"request_id": request_id, "score": 1.0}
            await gateway.client.post(f"{gateway.url}/v1/feedback", json=body)
        told = at.named("POST /v1/feedback").events["gen_ai.evaluation.result"]
        assert told["gen_ai.evaluation.score.value"] == 1.0
        assert told["gen_ai.evaluation.score.label"] == "good"
        assert told["gen_ai.response.id"] == asked.json()["id"]


async def test_a_failure_is_told_where_it_happened(tmp_path: Path) -> None:
    with collector() as at:
        async with observed(traced_config(tmp_path, at)) as gateway:
            gateway.engines.says["small"] = EngineUnavailable("away")
            response = await gateway.ask()
        assert response.status_code == 200
        failed = {span.name for span in at.spans if span.failed}
        assert failed == {"chat small", "invoke_agent small@none"}
        assert at.named("invoke_agent small@none").attributes["error.type"] == "passing"


async def test_a_streamed_answer_is_traced_like_a_whole_one(tmp_path: Path) -> None:
    with collector() as at:
        async with observed(traced_config(tmp_path, at)) as gateway:
            await gateway.ask(stream=True)
        assert "invoke_agent small@none" in {span.name for span in at.spans}
        assert root_of(at.spans).attributes["atlas.candidate"] == "small@none"


async def test_many_requests_are_sent_in_batches(tmp_path: Path) -> None:
    with collector() as at:
        async with observed(traced_config(tmp_path, at, interval_s=60.0)) as gateway:
            for _ in range(5):
                await gateway.ask()
            assert at.spans == []
        assert (len([span for span in at.spans if span.kind == "server"]), at.requests) == (5, 1)


async def test_a_collector_that_is_away_costs_no_answer(tmp_path: Path) -> None:
    with collector() as at:
        at.is_away = True
        config = traced_config(tmp_path, at, max_queue_spans=4, max_batch_spans=2)
        async with observed(config) as gateway:
            statuses = [(await gateway.ask()).status_code for _ in range(5)]
            at.is_away = False
        assert statuses == [200] * 5


async def test_probes_are_not_traced(tmp_path: Path) -> None:
    with collector() as at:
        async with observed(traced_config(tmp_path, at)) as gateway:
            await gateway.client.get(f"{gateway.url}/healthz")
        assert at.spans == []


def test_without_settings_nothing_is_traced_and_nothing_of_it_is_loaded() -> None:
    tracing = tracing_of(None)
    assert isinstance(tracing, NoTracing)
    assert tracing.begin({b"traceparent": CALLER["traceparent"].encode()}, "req_1") is None


def test_without_the_extra_the_start_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"atlas-serve\[tracing\]"):
        tracing_of(TracingConfig(endpoint="http://127.0.0.1:1/v1/traces"))


def test_content_is_not_told_where_it_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"telemetry\.tracing\.content: needs store\.keep_content"):
        observed_config(
            tmp_path, telemetry={"tracing": {"endpoint": "http://127.0.0.1:1", "content": True}}
        )
