"""What `/metrics` tells of requests, verdicts, pool and policies, and what it never tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serve_app.errors import EngineUnavailable, ToolFailed
from serve_app.schemas import DecidedBy, Drift, Pair
from serve_app.store import create_key, publish
from serve_app.telemetry import ALL_METRICS, GATEWAY_REQUESTS, Metric
from serve_app.telemetry.ray_page import merged
from serve_app.telemetry.sinks import MAX_SERIES, OTHER, SeriesBound
from tests.executor_fakes import reply
from tests.telemetry_fakes import Observed, Samples, observed, observed_config


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name][tuple(sorted(labels.items()))]


async def composed(gateway: Observed, **body: Any) -> None:
    gateway.engines.says["small"] = lambda asked: (
        reply(calls=('{"expression": "1 + 1"}',))
        if asked.get("tools") and asked["messages"][-1]["role"] == "user"
        else "two"
    )
    response = await gateway.ask(model="pattern:composed", **body)
    assert response.status_code == 200, response.text


async def test_a_composed_question_is_counted_with_every_call_in_it(tmp_path: Path) -> None:
    async with observed(observed_config(tmp_path)) as gateway:
        await composed(gateway)
        samples = await gateway.samples()
    name = "pattern:composed"
    assert value(samples, "atlas_router_decisions_total", path="pinned", candidate=name) == 1
    assert value(samples, "atlas_run_steps_total", kind="route", outcome="ok") == 1
    assert value(samples, "atlas_run_stops_total", stop="answered") == 1
    assert value(samples, "atlas_model_calls_total", model="small", outcome="ok") == 3
    assert value(samples, "atlas_model_seconds_count", model="large") == 1
    assert value(samples, "atlas_tool_calls_total", tool="calculator", outcome="ok") == 1
    assert value(samples, "atlas_tool_calls_total", tool="handbook", outcome="ok") == 1
    assert value(samples, "atlas_router_seconds_count", path="clusters") == 1
    assert value(samples, "atlas_gateway_tokens_total", candidate=name, kind="prompt") == 40
    assert value(samples, "atlas_gateway_cost_usd_total", candidate=name) > 0


async def test_a_routed_question_tells_how_sure_the_router_was(tmp_path: Path) -> None:
    async with observed(observed_config(tmp_path)) as gateway:
        await gateway.ask()
        gateway.chooser.path = DecidedBy.OUT_OF_DISTRIBUTION
        await gateway.ask()
        samples = await gateway.samples()
    assert value(samples, "atlas_router_confidence_count", path="clusters") == 1
    assert value(samples, "atlas_router_out_of_distribution_total") == 1


async def test_a_fallback_is_counted_by_what_failed(tmp_path: Path) -> None:
    async with observed(observed_config(tmp_path)) as gateway:
        gateway.engines.says["small"] = EngineUnavailable("away")
        response = await gateway.ask()
        samples = await gateway.samples()
    assert response.json()["model"] == "large@none"
    assert value(samples, "atlas_run_fallbacks_total", reason="passing") == 1
    assert value(samples, "atlas_model_calls_total", model="small", outcome="failed") == 1
    assert value(samples, "atlas_run_steps_total", kind="route", outcome="failed") == 1


async def test_a_call_that_is_made_again_is_counted_as_a_retry(tmp_path: Path) -> None:
    config = observed_config(tmp_path)
    models = [model.model_copy(update={"max_retries": 1}) for model in config.models]
    answers = [EngineUnavailable("away"), "here"]
    async with observed(config.model_copy(update={"models": tuple(models)})) as gateway:
        gateway.engines.says["small"] = lambda _: answers.pop(0)
        response = await gateway.ask(model="small")
        samples = await gateway.samples()
    assert response.status_code == 200
    assert value(samples, "atlas_model_retries_total", model="small") == 1


async def test_a_tool_that_fails_is_counted(tmp_path: Path) -> None:
    async with observed(observed_config(tmp_path)) as gateway:
        gateway.tools.says["handbook"] = ToolFailed("no")
        await gateway.ask(model="pattern:composed")
        samples = await gateway.samples()
    assert value(samples, "atlas_tool_calls_total", tool="handbook", outcome="failed") == 1


async def test_a_stream_tells_when_its_first_piece_came(tmp_path: Path) -> None:
    async with observed(observed_config(tmp_path)) as gateway:
        await gateway.ask(stream=True)
        samples = await gateway.samples()
    name = "atlas_gateway_first_piece_seconds_count"
    assert value(samples, name, candidate="small@none") == 1


async def test_what_a_limit_keeps_out_is_counted_by_the_limit(tmp_path: Path) -> None:
    async with observed(observed_config(tmp_path)) as gateway:
        response = await gateway.ask(model="small", atlas={"max_cost_usd": 1e-12})
        samples = await gateway.samples()
    assert response.status_code == 400
    assert value(samples, "atlas_limits_refused_total", limit="cost") == 1


async def test_a_verdict_is_counted_for_the_candidate_it_is_about(tmp_path: Path) -> None:
    async with observed(observed_config(tmp_path)) as gateway:
        asked = await gateway.ask()
        await gateway.outcomes.flush(60)
        body = {"request_id": asked.json()["id"].removeprefix("chatcmpl-"), "score": 0.25}
        told = await gateway.client.post(f"{gateway.url}/v1/feedback", json=body)
        samples = await gateway.samples()
    assert told.status_code == 200
    name = "atlas_feedback_verdicts_total"
    assert value(samples, name, candidate="small@none", verdict="bad") == 1


async def test_gauges_tell_of_pool_and_policies(tmp_path: Path) -> None:
    async with observed(observed_config(tmp_path)) as gateway:
        version = await publish(gateway.store, None, "a test")
        gateway.chooser.drifted = (Drift(Pair("small", "none"), 31.0, 0.8, 0.4, -3.5),)
        await gateway.gauges.tell()
        samples = await gateway.samples()
    assert value(samples, "atlas_pool_state", model="small", state="ready") == 1
    assert value(samples, "atlas_pool_state", model="small", state="failed") == 0
    assert value(samples, "atlas_pool_breaker", model="small") == 0
    assert value(samples, "atlas_policy_version", mode="serving") == version
    assert value(samples, "atlas_policy_share", mode="canary") == 0
    assert value(samples, "atlas_router_drift", candidate="small@none") == -3.5


async def test_metrics_are_for_admins(tmp_path: Path) -> None:
    config = observed_config(tmp_path, gateway={"auth": {"mode": "required"}})
    statuses = []
    async with observed(config) as gateway:
        for scope in ("chat", "admin"):
            _, key = await create_key(gateway.store, scope, [scope])
            response = await gateway.client.get(
                f"{gateway.url}/metrics", headers={"authorization": f"Bearer {key}"}
            )
            statuses.append(response.status_code)
        statuses.append((await gateway.client.get(f"{gateway.url}/metrics")).status_code)
    assert statuses == [403, 200, 401]


async def test_no_label_has_a_key_an_owner_an_id_or_a_word_of_a_caller(tmp_path: Path) -> None:
    async with observed(observed_config(tmp_path)) as gateway:
        await gateway.ask("a secret question", model="secret-model")
        await composed(gateway, atlas={"session": "secret-session"})
        await gateway.client.get(f"{gateway.url}/secret/path")
        page = await gateway.metrics.page()
    request_ids = [report.request_id for report in gateway.reports]
    assert request_ids
    assert not [word for word in ("secret", "local", *request_ids) if word in page]


def test_tags_are_names_that_are_bounded() -> None:
    allowed = {"candidate", "kind", "limit", "mode", "model", "outcome", "path", "reason", "route"}
    allowed |= {"state", "status", "stop", "tool", "verdict"}
    assert {tag for metric in ALL_METRICS for tag in metric.tags} <= allowed
    assert len({metric.exported for metric in ALL_METRICS}) == len(ALL_METRICS)


def test_series_beyond_the_bound_are_counted_together() -> None:
    bound = SeriesBound()
    metric = Metric("a/b", "counter", "", ("candidate",))
    told = [bound.bounded(metric, {"candidate": str(n)}) for n in range(MAX_SERIES + 2)]
    assert told[:2] == [("0",), ("1",)]
    assert told[-2:] == [(OTHER,)] * 2
    assert bound.bounded(metric, {"candidate": "1"}) == ("1",)


def test_the_agents_pages_become_one_without_rays_names() -> None:
    about = (
        "# HELP ray_atlas_gateway_requests_total HTTP requests answered.\n"
        "# TYPE ray_atlas_gateway_requests_total counter\n"
    )
    labels = 'Component="core_worker",NodeAddress="10.0.0.{0}",SessionName="s",Version="2",'
    labels += 'WorkerId="{0}bcdef0123",otel_scope_name="x",route="/v1/\\"x",status="200"'
    rays = 'ray_tasks{State="RUNNING"} 1.0\n'
    pages = [
        rays + about + f"ray_atlas_gateway_requests_total{{{labels.format(n)}}} {n}.0\n"
        for n in (1, 2)
    ]
    assert merged(pages) == (
        "# HELP atlas_gateway_requests_total HTTP requests answered.\n"
        "# TYPE atlas_gateway_requests_total counter\n"
        'atlas_gateway_requests_total{worker="1bcdef01",route="/v1/\\"x",status="200"} 1.0\n'
        'atlas_gateway_requests_total{worker="2bcdef01",route="/v1/\\"x",status="200"} 2.0\n'
    )
    assert GATEWAY_REQUESTS.exported == "atlas_gateway_requests"


async def test_the_console_says_which_candidate_is_not_what_it_was(tmp_path: Path) -> None:
    async with observed(observed_config(tmp_path)) as gateway:
        gateway.chooser.drifted = (
            Drift(Pair("small", "none"), 31.0, 0.8, 0.4, -3.5),
            Drift(Pair("large", "none"), 31.0, 0.8, 0.7, -1.0),
        )
        page = (await gateway.client.get(f"{gateway.url}/console/routing")).text
    assert "small@none is not what it was" in page
    assert "large@none is not what it was" not in page
