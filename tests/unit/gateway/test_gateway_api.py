"""The HTTP API through the real `openai` client, over loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from serve_app.store import create_key, revoke_key
from tests.gateway_fakes import PAIR, Loopback, eventually, running_gateway


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    with running_gateway(tmp_path_factory.mktemp("open")) as loopback:
        yield loopback


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    folder = tmp_path_factory.mktemp("locked")
    with running_gateway(folder, auth={"mode": "required"}) as loopback:
        yield loopback


def ask(gateway: Loopback, text: str, **options: Any) -> Any:
    options.setdefault("model", "atlas")
    return gateway.client().chat.completions.create(
        messages=[{"role": "user", "content": text}], **options
    )


def extension_of(answer: Any) -> dict[str, Any]:
    found: dict[str, Any] = answer.model_extra["atlas"]
    return found


def post(gateway: Loopback, path: str, body: Any, **headers: str) -> httpx2.Response:
    return httpx2.post(gateway.url + path, json=body, headers=headers, timeout=20)


def get(gateway: Loopback, path: str, **headers: str) -> httpx2.Response:
    return httpx2.get(gateway.url + path, headers=headers, timeout=20)


def chat(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "atlas", "messages": [{"role": "user", "content": text}], **fields}


def events_of(response: httpx2.Response) -> list[str]:
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    return [event.removeprefix("data: ") for event in response.text.split("\n\n") if event]


def make_key(gateway: Loopback, *scopes: str) -> tuple[str, str]:
    return gateway.run(lambda: create_key(gateway.store, "test", scopes))


# Completions.


def test_completion_carries_answer_pair_and_extension(gateway: Loopback) -> None:
    answer = ask(gateway, "What is 1+1?", extra_body={"atlas": {"alpha": 0.3}})
    assert answer.choices[0].message.content == "What is 1+1?"
    assert answer.model == str(PAIR)
    assert answer.usage.total_tokens == 12
    extension = extension_of(answer)
    assert extension["alpha"] == 0.3
    assert extension["request_id"] == answer._request_id
    assert extension["steps"][0]["tool_calls"][0]["sources"] == ["s1"]
    assert (extension["policy_version"], extension["pool_version"]) == (2, 3)
    assert "decision" not in extension


def test_explain_lists_every_candidate(gateway: Loopback) -> None:
    answer = ask(gateway, "hi", extra_body={"atlas": {"explain": True}})
    candidates = extension_of(answer)["decision"]["candidates"]
    assert [candidate["pair"] for candidate in candidates] == ["small@calculator", "large@none"]


def test_headers_name_the_request_and_the_pair(gateway: Loopback) -> None:
    response = post(gateway, "/v1/chat/completions", chat("hi"))
    assert response.headers["x-atlas-pair"] == str(PAIR)
    assert response.headers["x-atlas-path"] == "cold_start"
    assert response.headers["x-request-id"] == response.json()["atlas"]["request_id"]


async def test_the_async_client_works_too(gateway: Loopback) -> None:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none") as client:
        answer = await client.chat.completions.create(**chat("hello"))
        assert answer.choices[0].message.content == "hello"
        stream = await client.chat.completions.create(**chat("one two", stream=True))
        words = [chunk.choices[0].delta.content async for chunk in stream]
    assert words == ["one ", "two ", None]


def test_a_callers_own_tools_reach_the_orchestrator(gateway: Loopback) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    ask(gateway, "hi", tools=[tool], tool_choice="auto")
    assert gateway.orchestrator.calls[-1].tools == (tool,)
    assert gateway.orchestrator.calls[-1].tool_choice == "auto"


def test_unusual_text_survives_the_round_trip(gateway: Loopback) -> None:
    text = 'NUL \0, astral 😀, separator \u2028, quote " and \\n\n\ndata: x'
    assert ask(gateway, text).choices[0].message.content == text
    chunks = ask(gateway, text, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text + " "


# Streams.


def test_every_chunk_of_a_stream_has_a_choice_and_the_last_the_extension(
    gateway: Loopback,
) -> None:
    chunks = list(ask(gateway, "one two", stream=True))
    assert all(chunk.choices for chunk in chunks)
    assert all(chunk.usage is None for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert extension_of(chunks[-1])["pair"] == str(PAIR)
    assert extension_of(chunks[0]) == {"pair": str(PAIR), "path": "cold_start"}
    assert all("atlas" not in (chunk.model_extra or {}) for chunk in chunks[1:-1])
    assert {chunk.model for chunk in chunks} == {str(PAIR)}


def test_usage_comes_in_a_last_chunk_of_its_own_when_asked_for(gateway: Loopback) -> None:
    chunks = list(ask(gateway, "one", stream=True, stream_options={"include_usage": True}))
    assert [chunk.usage is not None for chunk in chunks] == [False, False, True]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 12
    assert extension_of(chunks[-1])["pair"] == str(PAIR)


def test_a_stream_of_several_choices_keeps_every_finish_reason(gateway: Loopback) -> None:
    chunks = list(ask(gateway, "a b", stream=True, n=3))
    finished = [c.choices[0].index for c in chunks if c.choices[0].finish_reason]
    assert finished == [0, 1, 2]
    assert extension_of(chunks[-1])


def test_a_stream_ends_with_done(gateway: Loopback) -> None:
    response = post(gateway, "/v1/chat/completions", chat("hi", stream=True))
    events = events_of(response)
    assert events[-1] == "[DONE]"
    assert response.headers["x-atlas-pair"] == str(PAIR)
    assert json.loads(events[-2])["atlas"]["request_id"] == response.headers["x-request-id"]


def test_a_failure_before_the_first_chunk_is_a_status(gateway: Loopback) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        ask(gateway, "!fail", stream=True)
    assert caught.value.status_code == 502
    assert caught.value.code == "engine_error"


def test_a_failure_after_the_first_chunk_is_an_error_event_without_done(
    gateway: Loopback,
) -> None:
    response = post(gateway, "/v1/chat/completions", chat("!break it", stream=True))
    assert response.status_code == 200
    events = events_of(response)
    assert json.loads(events[-1])["error"]["message"] == "the engine broke"
    with pytest.raises(openai.APIError, match="the engine broke"):
        list(ask(gateway, "!break it", stream=True))


def test_a_bug_after_the_first_chunk_says_nothing_about_the_server(
    gateway: Loopback, caplog: pytest.LogCaptureFixture
) -> None:
    response = post(gateway, "/v1/chat/completions", chat("!bug-late x", stream=True))
    assert json.loads(events_of(response)[-1])["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert "/secret/path" in caplog.text


def test_a_stream_that_stalls_ends_at_its_deadline(gateway: Loopback) -> None:
    body = chat("!stall x", stream=True, atlas={"deadline_s": 0.3})
    response = post(gateway, "/v1/chat/completions", body)
    assert json.loads(events_of(response)[-1])["error"]["code"] == "deadline_exceeded"
    assert eventually(lambda: response.headers["x-request-id"] in gateway.orchestrator.cancelled)


def test_leaving_a_stream_cancels_its_work(gateway: Loopback) -> None:
    with ask(gateway, "!trickle" + " x" * 500, stream=True) as stream:
        next(iter(stream))
        request_id = stream.response.headers["x-request-id"]
    assert eventually(lambda: request_id in gateway.orchestrator.cancelled)


def test_leaving_before_the_answer_cancels_its_work(gateway: Loopback) -> None:
    before = len(gateway.orchestrator.cancelled)
    with pytest.raises(openai.APITimeoutError):
        ask(gateway, "!hang", timeout=0.3)
    assert eventually(lambda: len(gateway.orchestrator.cancelled) == before + 1)


# Errors.


def test_an_engine_failure_keeps_its_words(gateway: Loopback) -> None:
    with pytest.raises(openai.InternalServerError, match="the engine failed") as caught:
        ask(gateway, "!fail")
    assert caught.value.status_code == 502
    assert str(caught.value.request_id).startswith("req_")


def test_a_bug_is_a_500_that_says_nothing_and_is_logged(
    gateway: Loopback, caplog: pytest.LogCaptureFixture
) -> None:
    response = post(gateway, "/v1/chat/completions", chat("!bug"))
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert response.headers["x-request-id"] in caplog.text
    assert "/secret/path" in caplog.text


def test_a_deadline_is_a_504(gateway: Loopback) -> None:
    response = post(gateway, "/v1/chat/completions", chat("!hang", atlas={"deadline_s": 0.2}))
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"
    assert eventually(lambda: response.headers["x-request-id"] in gateway.orchestrator.cancelled)


@pytest.mark.parametrize("model", ["nobody", "small@python", "atlas@none", "small@", "@", "\0"])
def test_an_unknown_model_is_a_404(gateway: Loopback, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        ask(gateway, "hi", model=model)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


@pytest.mark.parametrize("model", ["small", "small@none", "large@calculator"])
def test_a_pinned_model_or_pair_is_passed_on(gateway: Loopback, model: str) -> None:
    ask(gateway, "hi", model=model)
    assert gateway.orchestrator.calls[-1].model == model


def test_a_failed_model_is_a_503(gateway: Loopback) -> None:
    response = post(gateway, "/v1/chat/completions", chat("hi", model="broken@none"))
    assert response.status_code == 503
    assert response.headers["retry-after"] == "5"
    assert "failed" in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_asks_for_a_pause_is_a_503_that_says_how_long(
    gateway: Loopback, stream: bool
) -> None:
    response = post(gateway, "/v1/chat/completions", chat("!busy", stream=stream))
    assert response.status_code == 503
    assert response.headers["retry-after"] == "42"
    assert response.json()["error"]["code"] == "engine_busy"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"models": ["nobody"]}, "atlas.models"),
        ({"tools": ["python"]}, "atlas.tools"),
        ({"models": ["large"]}, "atlas.models"),
        ({"tools": ["none"]}, "atlas.tools"),
    ],
)
def test_allow_lists_must_fit_the_pool_and_the_pin(
    gateway: Loopback, options: dict[str, Any], param: str
) -> None:
    body = chat("hi", model="small@calculator", atlas=options)
    response = post(gateway, "/v1/chat/completions", body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("POST", "/nowhere", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/v1/models/a/b", 404),
        ("GET", "/v1/chat/completions/", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("OPTIONS", "/v1/route", 405),
        ("PATCH", "/healthz", 405),
    ],
)
def test_wrong_paths_and_methods_are_errors_in_openais_shape(
    gateway: Loopback, method: str, path: str, status: int
) -> None:
    response = httpx2.request(method, gateway.url + path, timeout=20)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert ("allow" in response.headers) == (status == 405)


# Decisions, models, health, administration.


def test_route_shows_the_decision_and_runs_nothing(gateway: Loopback) -> None:
    response = post(gateway, "/v1/route", chat("hi", atlas={"alpha": 0.7}))
    decision = response.json()
    assert decision["pair"] == str(PAIR)
    assert decision["alpha"] == 0.7
    scores = {"pair", "utility", "quality", "quality_low", "quality_high", "cost", "cost_usd"}
    assert [set(c) for c in decision["candidates"]] == [scores] * 2
    assert gateway.orchestrator.calls[-1].explain
    assert decision["request_id"] == response.headers["x-request-id"]


def test_models_lists_router_models_and_pairs(gateway: Loopback) -> None:
    models = {model.id: extension_of(model) for model in gateway.client().models.list()}
    assert len(models) == 1 + 3 + 6 + 1
    assert (models["pattern:hello"]["kind"], models["pattern:hello"]["state"]) == (
        "pattern",
        "ready",
    )
    assert models["atlas"]["kind"] == "router"
    assert models["small"]["kind"] == "model"
    assert models["broken"]["state"] == "failed"
    assert models["small@calculator"]["kind"] == "pair"
    assert models["small@calculator"]["price"]["usd_per_1m_completion_tokens"] == 2.0
    assert gateway.client().models.retrieve("large@none").id == "large@none"
    with pytest.raises(openai.NotFoundError):
        gateway.client().models.retrieve("nobody")


def test_health_and_readiness(gateway: Loopback) -> None:
    assert get(gateway, "/healthz").json() == {"status": "ok"}
    assert get(gateway, "/readyz").json() == {"status": "ready", "pool_version": 3}
    gateway.orchestrator.is_ready = False
    try:
        assert get(gateway, "/readyz").status_code == 503
        assert get(gateway, "/healthz").status_code == 200
    finally:
        gateway.orchestrator.is_ready = True


def test_administration_shows_no_secret_address_or_path(gateway: Loopback) -> None:
    models = get(gateway, "/v1/admin/models")
    tools = get(gateway, "/v1/admin/tools")
    assert {row["model_id"] for row in models.json()["data"]} == {"small", "large", "broken"}
    assert {row["tool_id"] for row in tools.json()["data"]} == {"none", "calculator"}
    for text in (models.text, tools.text):
        assert not any(word in text for word in ("secret", "SECRET", "127.0.0.1", "://"))


def test_administration_shows_where_a_models_breaker_stands(gateway: Loopback) -> None:
    gateway.orchestrator.not_closed = {"large": "open"}
    try:
        rows = get(gateway, "/v1/admin/models").json()["data"]
    finally:
        gateway.orchestrator.not_closed = {}
    assert {row["model_id"]: row["breaker"] for row in rows} == {
        "small": "closed",
        "large": "open",
        "broken": "closed",
    }


def test_administration_shows_what_a_pattern_does_and_its_worst_case(gateway: Loopback) -> None:
    (row,) = get(gateway, "/v1/admin/patterns").json()["data"]
    assert row["pattern"] == {"name": "hello", "do": [{"ask": {"pair": "small"}}]}
    assert row["worst_case"]["model_calls"] >= 1


def test_a_pattern_is_named_as_the_model(gateway: Loopback) -> None:
    assert ask(gateway, "hi", model="pattern:hello").choices[0].message.content == "hi"


@pytest.mark.parametrize("extra", [{"n": 2}, {"stop": ["x"]}, {"logprobs": True}])
def test_what_a_pattern_cannot_give_is_a_400(gateway: Loopback, extra: dict[str, Any]) -> None:
    body = chat("hi", model="pattern:hello", **extra)
    response = post(gateway, "/v1/chat/completions", body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, next(iter(extra)))


def test_a_pattern_that_does_not_exist_is_a_404(gateway: Loopback) -> None:
    response = post(gateway, "/v1/chat/completions", chat("hi", model="pattern:nobody"))
    assert response.status_code == 404


def test_a_pattern_over_http_names_its_wrong_field(gateway: Loopback) -> None:
    body = {"name": "x", "do": [{"ask": {"pair": "small", "loops": 3}}]}
    response = post(gateway, "/v1/admin/patterns", body)
    assert response.status_code == 400
    assert "loops" in response.json()["error"]["message"]


# Request ids.


def test_the_callers_request_id_is_echoed_but_never_used(gateway: Loopback) -> None:
    response = post(gateway, "/v1/chat/completions", chat("hi"), **{"x-request-id": "mine-1"})
    assert response.headers["x-client-request-id"] == "mine-1"
    assert response.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("value", ["a b", "x" * 65, "../x", ""])
def test_an_odd_request_id_is_not_echoed(gateway: Loopback, value: str) -> None:
    response = get(gateway, "/healthz", **{"x-request-id": value})
    assert response.status_code == 200
    assert "x-client-request-id" not in response.headers


def test_serves_control_headers_change_nothing_here(gateway: Loopback) -> None:
    headers = {
        "serve_multiplexed_model_id": "x",
        "x-request-timeout-seconds": "0.0001",
        "x-request-disconnect-disabled": "?1",
        "x-session-id": "s",
        "x-serve-router-x": "y",
    }
    response = post(gateway, "/v1/chat/completions", chat("hi"), **headers)
    assert response.status_code == 200


# Feedback.


def test_feedback_is_taken_once(gateway: Loopback) -> None:
    request_id = extension_of(ask(gateway, "hi"))["request_id"]
    body = {"request_id": request_id, "score": 1, "comment": "good \0"}
    assert post(gateway, "/v1/feedback", body).json()["request_id"] == request_id
    assert post(gateway, "/v1/feedback", body).status_code == 409


@pytest.mark.parametrize(("said", "kept"), [(7, 1.0), (-0.5, 0.0), (0.25, 0.25)])
def test_a_score_is_clipped_to_the_scale(gateway: Loopback, said: float, kept: float) -> None:
    request_id = extension_of(ask(gateway, "hi"))["request_id"]
    answer = post(gateway, "/v1/feedback", {"request_id": request_id, "score": said})
    assert answer.json()["score"] == kept


def test_a_query_without_an_embedding_is_embedded_once_it_is_rated(
    gateway: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(gateway.outcomes, "embed_rated", lambda *of: asked.append(of))
    request_id = extension_of(ask(gateway, "!unembedded"))["request_id"]
    post(gateway, "/v1/feedback", {"request_id": request_id, "score": 1})
    assert asked == [(request_id, "!unembedded")]


def test_too_much_feedback_is_a_429_that_says_when_to_come_back(tmp_path: Path) -> None:
    # One in 1,000 minutes, so that a slow machine does not fill the bucket again meanwhile.
    with running_gateway(tmp_path, limits={"feedback_per_minute": 0.001}) as strict:
        body = {"request_id": "unknown", "score": 1}
        responses = [post(strict, "/v1/feedback", body) for _ in range(2)]
    assert [response.status_code for response in responses] == [404, 429]
    assert responses[-1].headers["retry-after"]


def test_feedback_on_an_unknown_request_is_a_404(gateway: Loopback) -> None:
    response = post(gateway, "/v1/feedback", {"request_id": "req_" + "0" * 32, "score": 0})
    assert response.status_code == 404


@pytest.mark.parametrize("score", ["NaN", "Infinity", "1e999", '"1"', "true", "null"])
def test_a_score_that_is_no_finite_number_is_a_400(gateway: Loopback, score: str) -> None:
    body = f'{{"request_id": "req_1", "score": {score}}}'.encode()
    response = httpx2.post(
        gateway.url + "/v1/feedback", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400


def test_feedback_of_another_owner_looks_like_an_unknown_request(locked: Loopback) -> None:
    _, mine = make_key(locked, "chat", "feedback")
    _, other = make_key(locked, "feedback")
    answer = locked.client(mine).chat.completions.create(**chat("hi"))
    body = {"request_id": extension_of(answer)["request_id"], "score": 1}
    foreign = post(locked, "/v1/feedback", body, authorization=f"Bearer {other}")
    body_of_unknown = {"request_id": "req_" + "0" * 32, "score": 1}
    unknown = post(locked, "/v1/feedback", body_of_unknown, authorization=f"Bearer {other}")
    assert (foreign.status_code, unknown.status_code) == (404, 404)
    told = foreign.json()["error"]["message"].replace(body["request_id"], "")
    assert told == unknown.json()["error"]["message"].replace(body_of_unknown["request_id"], "")
    own = post(locked, "/v1/feedback", body, authorization=f"Bearer {mine}")
    assert own.status_code == 200


# Keys.


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer x", "Basic abc", "Bearer atlas_" + "x" * 43, "Bearer atlas_\xe9"],
)
def test_a_missing_or_unknown_key_is_a_401(locked: Loopback, header: str | None) -> None:
    headers = [] if header is None else [(b"authorization", header.encode("latin-1"))]
    response = httpx2.get(locked.url + "/v1/models", headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"


def test_each_scope_opens_its_own_routes_only(locked: Loopback) -> None:
    paths = {"chat": "/v1/models", "admin": "/v1/admin/models"}
    for scope in paths:
        _, key = make_key(locked, scope)
        for needed, path in paths.items():
            response = get(locked, path, authorization=f"Bearer {key}")
            assert response.status_code == (200 if needed == scope else 403), (scope, path)


def test_the_owner_of_a_call_is_its_key(locked: Loopback) -> None:
    key_id, key = make_key(locked, "chat")
    locked.client(key).chat.completions.create(**chat("hi"))
    assert locked.orchestrator.calls[-1].owner == key_id


def test_a_revoked_key_stops_working_within_seconds(locked: Loopback) -> None:
    key_id, key = make_key(locked, "chat")
    headers = {"authorization": f"Bearer {key}"}
    assert get(locked, "/v1/models", **headers).status_code == 200
    locked.run(lambda: revoke_key(locked.store, key_id))
    assert eventually(lambda: get(locked, "/v1/models", **headers).status_code == 401)


def test_health_and_the_document_need_no_key(locked: Loopback) -> None:
    for path in ("/healthz", "/readyz", "/openapi.json"):
        assert get(locked, path).status_code == 200


def test_an_unread_body_of_an_unauthorised_caller_is_not_waited_for(locked: Loopback) -> None:
    response = locked.raw(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: 1000\r\n\r\n"
    )
    assert response.startswith(b"HTTP/1.1 401")
    assert b"connection: close" in response


# The log.


def test_each_request_writes_one_line_with_its_facts(
    gateway: Loopback, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "serve_app.gateway")
    request_id = extension_of(ask(gateway, "hi"))["request_id"]
    assert eventually(lambda: any(request_id in line for line in caplog.messages))
    (line,) = [line for line in caplog.messages if request_id in line]
    fields = dict(field.split("=", 1) for field in line.split(" "))
    assert fields["model"] == "atlas"
    assert fields["pair"] == str(PAIR)
    assert (fields["status"], fields["prompt_tokens"], fields["policy_version"]) == (
        "200",
        "7",
        "2",
    )
    assert float(fields["cost_usd"]) == 0.25
    assert float(fields["seconds"]) > 0


@pytest.mark.parametrize("stream", [False, True])
def test_the_line_says_that_the_gateways_deadline_ended_a_request(
    gateway: Loopback, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    caplog.set_level("INFO", "serve_app.gateway")
    body = chat("!stall x" if stream else "!hang", stream=stream, atlas={"deadline_s": 0.2})
    request_id = post(gateway, "/v1/chat/completions", body).headers["x-request-id"]
    assert eventually(lambda: any(request_id in line for line in caplog.messages))
    (line,) = [line for line in caplog.messages if f"request_id={request_id}" in line]
    assert "error=DeadlineExceeded stop=deadline" in line


def test_the_line_says_that_a_client_left(
    gateway: Loopback, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "serve_app.gateway")
    with ask(gateway, "!trickle" + " x" * 500, stream=True) as answer:
        next(iter(answer))
        request_id = answer.response.headers["x-request-id"]
    assert eventually(lambda: any(request_id in line for line in caplog.messages))
    (line,) = [line for line in caplog.messages if f"request_id={request_id}" in line]
    assert "status=499" in line
    assert "stop=left" in line


def test_a_hostile_model_name_cannot_forge_a_log_line(
    gateway: Loopback, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "serve_app.gateway")
    post(gateway, "/v1/chat/completions", chat("hi", model="x\nrequest_id=forged status=200"))
    assert eventually(lambda: any("forged" in line for line in caplog.messages))
    (line,) = [line for line in caplog.messages if "forged" in line]
    assert r'model="x\nrequest_id=forged status=200"' in line
