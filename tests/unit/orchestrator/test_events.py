"""What a run tells of its spans, in its report and while it streams: the real orchestrator, router
and store in front of scripted engines."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from serve_app.errors import EngineError
from serve_app.schemas import Report, SpanKind, StopReason
from tests.path2_fakes import Path2, path2, plain_snapshot
from tests.policy_data import with_policy


@pytest.fixture(autouse=True)
def own_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session's graph may have set another one."""
    monkeypatch.setenv("ATLAS_DATA_DIR", str(tmp_path))


@pytest.fixture
async def graph(tmp_path: Path) -> AsyncIterator[Path2]:
    async with path2(tmp_path) as running:
        yield running


def told(report: Report) -> list[tuple[int | None, SpanKind, str]]:
    return [(span.parent_id, span.kind, span.name) for span in report.spans]


def events(items: list[Any]) -> list[tuple[str, int]]:
    """Phase and span of each event, in the order they came."""
    found = [item["atlas"]["event"] for item in items if is_event(item)]
    return [(event["type"], event["span"]["span_id"]) for event in found]


def is_event(item: Any) -> bool:
    return isinstance(item, dict) and "event" in item.get("atlas", {})


async def test_a_report_has_the_tree_of_what_happened(graph: Path2) -> None:
    _, report = await graph.ask()
    assert told(report)[1:] == [
        (0, SpanKind.DECISION, "router"),
        (0, SpanKind.PAIR, str(report.pair)),
        (2, SpanKind.MODEL, report.pair.model_id),
    ]
    root, decision, pair, model = report.spans
    assert decision.attributes["pair"] == str(report.pair)
    assert (root.prompt_tokens, pair.prompt_tokens, model.prompt_tokens) == (10, 10, 10)
    assert all(span.seconds is not None for span in report.spans)
    assert "says hello" not in repr(report.spans)


async def test_every_decision_of_the_policy_is_told(graph: Path2) -> None:
    await graph.promote(with_policy(plain_snapshot(), answer=0.5))
    _, report = await graph.ask("topic 2")
    decisions = [span for span in report.spans if span.kind is SpanKind.DECISION]
    assert [span.attributes["action"] for span in decisions] == ["route", "answer"]


async def test_a_run_that_fails_is_told_with_its_error(graph: Path2) -> None:
    graph.engines.says["cheap"] = EngineError("broken")
    with pytest.raises(EngineError):
        await graph.ask(model="cheap")
    report = graph.reports[-1]
    assert report.stop is StopReason.FAILED
    assert [span.error for span in report.spans] == ["broken"] * 3


async def test_a_stream_without_events_has_none(graph: Path2) -> None:
    assert events(await graph.stream()) == []


async def test_events_come_in_the_order_of_what_they_tell(graph: Path2) -> None:
    items = await graph.stream(events=True)
    assert events(items) == [
        ("begin", 0),
        ("begin", 1),
        ("end", 1),
        ("begin", 2),
        ("begin", 3),
        ("end", 3),
        ("end", 2),
    ]
    assert all(item["choices"] == [] for item in items if is_event(item))


async def test_the_pieces_of_an_answer_are_the_same_with_events(graph: Path2) -> None:
    plain, with_events = await graph.stream(), await graph.stream(events=True)
    rest = [item for item in with_events if not is_event(item)]
    assert [item["choices"] for item in rest[:-1]] == [item["choices"] for item in plain[:-1]]
    kinds = ["event" if is_event(item) else "piece" for item in with_events[:-1]]
    assert kinds.index("piece") == 5  # after the beginning of the call that says them


async def test_events_stop_where_the_run_fails(graph: Path2) -> None:
    graph.engines.says["cheap"] = EngineError("broken")
    items: list[Any] = []

    async def read() -> None:
        async for item in graph.items(graph.call(model="cheap", events=True)):
            items.append(item)

    with pytest.raises(EngineError, match="broken"):
        await read()
    assert events(items)[-2:] == [("end", 2), ("end", 1)]
    assert items[-1]["atlas"]["event"]["span"]["error"] == "broken"


async def test_content_is_told_where_the_deployment_keeps_it(graph: Path2) -> None:
    graph.orchestrator._keeps_content = True
    _, report = await graph.ask(model="cheap")
    assert report.spans[-1].text == "cheap says hello"
