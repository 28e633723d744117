"""Chat through the running graph: real engines, real tools, the official client, pinned and
routed."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import random
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionFunctionToolParam

from benchmarks.nano.registry import load_generator
from serve_app.pool.applications import model_applications
from serve_app.pool.applications import ongoing_requests as ongoing_at
from tests.conftest import Graph
from tests.pictures import asking, part, written

pytestmark = pytest.mark.serve

# Questions each pair is built for: phrasings of the kind the models are trained on.
RIGHT = [
    ("nano-math@calculator", "What is 15% of 240?", "36"),
    ("nano-math@calculator", "Solve 3x + 7 = 31 for x.", "8"),
    ("nano-facts@none", "What is the capital of France?", "Paris"),
    ("nano-code@python", "What is the sum of [31, 204, 9, 77]?", "321"),
]


def ask(
    client: openai.OpenAI, question: str, model: str = "atlas", **atlas: object
) -> tuple[str, dict[str, object]]:
    completion = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        extra_body={"atlas": atlas},
    )
    extension = completion.model_extra["atlas"] if completion.model_extra else {}
    return completion.choices[0].message.content or "", extension


@pytest.mark.parametrize(("pair", "question", "gold"), RIGHT)
def test_a_pinned_pair_answers_right(graph: Graph, pair: str, question: str, gold: str) -> None:
    answer, extension = ask(graph.client(), question, pair)
    assert gold in answer
    assert (extension["pair"], extension["path"]) == (pair, "pinned")


@pytest.mark.parametrize(("pair", "question", "gold"), RIGHT)
def test_a_routed_question_reaches_a_right_pair(
    graph: Graph, pair: str, question: str, gold: str
) -> None:
    answer, extension = ask(graph.client(), question)
    assert (extension["pair"], extension["path"]) == (pair, "cold_start")
    assert gold in answer


def test_retrieval_answers_what_no_model_knows(graph: Graph) -> None:
    questions = load_generator("facts").questions(random.Random(1), "seen", 200)
    unknown = [question for question in questions if question.kind.startswith("gazetteer")][:8]
    right = {"nano-facts@retrieval": 0, "nano-facts@none": 0}
    for question in unknown:
        for pair in right:
            answer, extension = ask(graph.client(), question.query, pair)
            right[pair] += question.gold.casefold() in answer.casefold()
            calls = extension["steps"][0]["tool_calls"]  # type: ignore[index]
            assert bool(calls) == (pair == "nano-facts@retrieval")
            assert all(call["sources"] for call in calls)
    assert right["nano-facts@retrieval"] >= 6
    assert right["nano-facts@none"] <= 1


@pytest.mark.parametrize("model", ["nano-facts@ocr", "atlas"])
def test_a_model_of_text_answers_about_a_picture_that_is_read_to_it(
    graph: Graph, model: str
) -> None:
    scan = part(written("The Humel Museum was started by David Fuwin."))
    question: Any = asking(scan, text="Who set the Humel Museum up?")
    answer = graph.client().chat.completions.create(model=model, messages=[question], temperature=0)
    assert answer.choices[0].message.content == "David Fuwin"
    assert answer.model == "nano-facts@ocr"


@pytest.mark.parametrize("model", ["nano-facts@ocr", "nano-facts"])
def test_what_reads_pictures_is_for_pictures_alone(graph: Graph, model: str) -> None:
    asked: Any = asking() if model == "nano-facts" else {"role": "user", "content": "Hello."}
    with pytest.raises(openai.BadRequestError, match="picture") as caught:
        graph.client().chat.completions.create(model=model, messages=[asked])
    assert caught.value.param == "messages"


def test_a_streamed_answer_is_the_whole_one_in_pieces(graph: Graph) -> None:
    request = {
        "model": "nano-math@calculator",
        "messages": [{"role": "user", "content": "What is 15% of 240?"}],
        "temperature": 0,
    }
    whole = graph.client().chat.completions.create(**request)  # type: ignore[call-overload]
    chunks = list(graph.client().chat.completions.create(**request, stream=True))  # type: ignore[call-overload]
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert not any(choice.delta.tool_calls for chunk in chunks for choice in chunk.choices)
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == [
        "stop"
    ]


async def test_the_async_client_streams_with_usage(graph: Graph) -> None:
    client = openai.AsyncOpenAI(base_url=f"{graph.url}/v1", api_key="none", max_retries=0)
    stream = await client.chat.completions.create(
        model="atlas",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    usages = [chunk.usage async for chunk in stream if chunk.usage]
    await client.close()
    assert [usage.total_tokens > 0 for usage in usages] == [True]


def test_best_of_returns_one_of_its_samples(graph: Graph) -> None:
    completion = graph.client().chat.completions.create(
        model="scripted-echo@best_of", messages=[{"role": "user", "content": "hi"}]
    )
    assert len(completion.choices) == 1
    assert '"n": 5' in (completion.choices[0].message.content or "")


def test_several_choices_come_back_when_asked_for(graph: Graph) -> None:
    completion = graph.client().chat.completions.create(
        model="nano-facts",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        n=3,
    )
    assert [choice.index for choice in completion.choices] == [0, 1, 2]


def test_the_callers_own_tools_reach_the_model_and_nothing_unknown_does(graph: Graph) -> None:
    tool: ChatCompletionFunctionToolParam = {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
    }
    completion = graph.client().chat.completions.create(
        model="scripted-echo",
        messages=[{"role": "user", "content": "hi"}],
        tools=[tool],
        user="me",
    )
    content = completion.choices[0].message.content or ""
    assert '"weather"' in content
    assert set(httpx_json(content)) == {"messages", "max_tokens", "tools"}


def httpx_json(text: str) -> dict[str, object]:
    parsed: dict[str, object] = httpx.Response(200, text=text).json()
    return parsed


@pytest.mark.parametrize("first", ["scripted-fail", "scripted-loop"])
def test_a_failing_pair_is_replaced_by_the_next_best(graph: Graph, first: str) -> None:
    behaviour = first.removeprefix("scripted-")
    answer, extension = ask(
        graph.client(),
        f"zzz scripted {behaviour} zzz",
        models=[first, "scripted-echo"],
        tools=["calculator"],
    )
    steps = extension["steps"]
    assert [step["pair"].split("@")[0] for step in steps] == [first, "scripted-echo"]  # type: ignore[attr-defined]
    assert steps[0]["error"]  # type: ignore[index]
    assert extension["path"] == "fallback"
    assert "messages" in answer


def test_a_pair_that_hangs_is_replaced_within_the_deadline(graph: Graph) -> None:
    began_s = time.monotonic()
    _, extension = ask(
        graph.client(),
        "zzz scripted hang zzz",
        models=["scripted-hang", "scripted-echo"],
        tools=["none"],
        deadline_s=4,
    )
    assert time.monotonic() - began_s < 4.5
    assert extension["pair"] == "scripted-echo@none"


def test_a_pinned_pair_that_hangs_ends_at_the_deadline(graph: Graph) -> None:
    began_s = time.monotonic()
    with pytest.raises(openai.APIStatusError) as caught:
        ask(graph.client(), "hi", "scripted-hang", deadline_s=1)
    assert caught.value.status_code == 504
    assert time.monotonic() - began_s < 2


def test_a_pinned_pair_that_fails_is_not_replaced(graph: Graph) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        ask(graph.client(), "hi", "scripted-fail")
    assert caught.value.status_code == 502


def test_what_the_engine_refuses_is_the_callers_fault(graph: Graph) -> None:
    with pytest.raises(openai.BadRequestError, match="scripted refusal"):
        ask(graph.client(), "hi", "scripted-refuse")


def test_a_prompt_longer_than_the_engine_takes_is_refused(graph: Graph) -> None:
    with pytest.raises(openai.BadRequestError):
        ask(graph.client(), "many words and more " * 5000, "nano-math")


def test_a_stream_that_breaks_ends_with_an_error_event(graph: Graph) -> None:
    stream = graph.client().chat.completions.create(
        model="scripted-break", messages=[{"role": "user", "content": "hi"}], stream=True
    )
    text = ""

    def read() -> None:
        nonlocal text
        for chunk in stream:
            text += "".join(choice.delta.content or "" for choice in chunk.choices)

    with pytest.raises(openai.APIError, match="scripted break"):
        read()
    assert text == "one two "


def test_a_call_the_model_got_wrong_is_told_to_the_model(graph: Graph) -> None:
    answer, extension = ask(graph.client(), "hi", "scripted-bad_call@calculator")
    assert answer.startswith("Error: the arguments are not JSON")
    assert extension["steps"][0]["tool_calls"][0]["ok"] is False  # type: ignore[index]


def test_a_remote_model_answers_like_a_local_one(graph: Graph) -> None:
    answer, extension = ask(graph.client(), "What is 15% of 240?", "remote-math")
    assert "36" in answer
    assert extension["pair"] == "remote-math@none"


def test_a_cost_limit_leaves_out_the_dear_pairs(graph: Graph) -> None:
    _, extension = ask(graph.client(), "zzz scripted echo zzz", max_cost_usd=0.0001)
    assert not str(extension["pair"]).startswith("scripted-")


def test_a_cost_limit_caps_the_tokens_of_a_pinned_pair(graph: Graph) -> None:
    answer, _ = ask(graph.client(), "hi", "scripted-echo", max_cost_usd=0.1)
    # 0.1 USD at 1000 USD per million, less a token for each byte of the prompt
    assert httpx_json(answer)["max_tokens"] == 100 - len(
        '[[{"role": "user", "content": "hi"}], []]'
    )


@pytest.mark.parametrize("model", ["atlas", "nano-math@calculator"])
def test_a_cost_limit_that_covers_nothing_is_refused_and_says_what_would(
    graph: Graph, model: str
) -> None:
    priced = ["nano-math", "nano-facts", "nano-code"]  # the remote model is free
    with pytest.raises(openai.BadRequestError, match="max_cost_usd") as caught:
        ask(graph.client(), "What is 15% of 240?", model, max_cost_usd=1e-12, models=priced)
    assert caught.value.code == "max_cost_exceeded"


def test_the_first_request_for_logprobs_waits_for_no_compilation(graph: Graph) -> None:
    began_s = time.monotonic()
    completion = graph.client().chat.completions.create(
        model="nano-facts",
        messages=[{"role": "user", "content": "What is the capital of Italy?"}],
        logprobs=True,
        max_tokens=4,
    )
    assert completion.choices[0].logprobs is not None
    assert time.monotonic() - began_s < 8


def settled(graph: Graph) -> dict[str, dict[str, str]]:
    """The models when none is starting: a new controller tries the one that cannot start again."""
    give_up_s = time.monotonic() + 200
    while True:
        models: dict[str, dict[str, str]] = httpx.get(f"{graph.url}/readyz").json()["models"]
        if "starting" not in {model["state"] for model in models.values()}:
            return models
        assert time.monotonic() < give_up_s, models
        time.sleep(0.5)


def shipped(graph: Graph) -> set[str]:
    """The models that the graph began with and that can start."""
    return {member.model_id for member in graph.pool.models} - {"broken"}


def test_a_model_that_cannot_start_is_failed_with_its_reason_and_harms_no_other(
    graph: Graph,
) -> None:
    models = settled(graph)
    assert models["broken"]["state"] == "failed"
    assert "nonexistent" not in models["broken"]["reason"]  # the server's paths stay there
    others = {name: model["state"] for name, model in models.items() if name in shipped(graph)}
    assert set(others.values()) == {"ready"}
    with pytest.raises(openai.APIStatusError) as caught:
        ask(graph.client(), "hi", "broken")
    assert caught.value.status_code == 503


def test_readiness_tells_where_each_model_stands(graph: Graph) -> None:
    answer = httpx.get(f"{graph.url}/readyz")
    assert answer.status_code == 200
    models = settled(graph)
    assert (models["nano-math"]["state"], models["broken"]["state"]) == ("ready", "failed")


def test_a_decision_is_explained_without_running_it(graph: Graph) -> None:
    body = {
        "model": "atlas",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    }
    decision = httpx.post(f"{graph.url}/v1/route", json=body).json()
    assert decision["pair"] == "nano-facts@none"
    assert len(decision["candidates"]) > 10


def test_feedback_is_kept_once_and_only_for_ones_own_request(graph: Graph) -> None:
    _, extension = ask(graph.client(), "What is the capital of France?")
    feedback = {"request_id": extension["request_id"], "score": 1.0}
    statuses = [httpx.post(f"{graph.url}/v1/feedback", json=feedback).status_code for _ in range(2)]
    unknown = httpx.post(
        f"{graph.url}/v1/feedback", json={"request_id": "req_unknown", "score": 1.0}
    ).status_code
    assert (statuses[0] // 100, statuses[1], unknown) == (2, 409, 404)


async def test_every_step_is_stored_with_its_embedding(graph: Graph) -> None:
    from sqlalchemy import select

    from serve_app.config import load_config
    from serve_app.store import Store
    from serve_app.store.tables import OutcomeRow, RequestRow

    _, extension = ask(graph.client(), "What is the capital of Spain?", "nano-facts")
    store = await Store.open(load_config(graph.config).store_url())
    request_id = extension["request_id"]
    query = select(RequestRow).where(RequestRow.request_id == request_id)
    request = None
    async with asyncio.timeout(120):  # embedded in the background, because the pair was named
        while request is None or request.embedding is None:
            await asyncio.sleep(0.1)
            async with store.begin() as connection:
                request = (await connection.execute(query)).one_or_none()
    async with store.begin() as connection:
        steps = (
            await connection.execute(select(OutcomeRow).where(OutcomeRow.request_id == request_id))
        ).all()
    await store.close()
    assert len(request.embedding) == 384 * 4
    assert [(step.model_id, step.tool_id) for step in steps] == [("nano-facts", "none")]


def error_of(response: httpx.Response) -> dict[str, object]:
    assert response.headers["x-request-id"].startswith("req_")
    error: dict[str, object] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_headers_too_large_are_refused_in_openai_shape(graph: Graph) -> None:
    response = httpx.get(f"{graph.url}/v1/models", headers={"x-long": "a" * 20_000})
    assert response.status_code == 431
    assert "header" in str(error_of(response)["message"])


def test_a_body_without_an_end_is_cut_off(graph: Graph) -> None:
    def chunks() -> Iterator[bytes]:
        while True:
            yield b" " * 65536

    started_s = time.monotonic()
    address = graph.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(address[0], int(address[1]), timeout=60)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.request("POST", "/v1/chat/completions", chunks(), encode_chunked=True)
    assert time.monotonic() - started_s < 30
    connection.close()


def test_serves_own_control_headers_are_not_the_callers_to_set(graph: Graph) -> None:
    response = httpx.post(
        f"{graph.url}/v1/chat/completions",
        json={"model": "scripted-echo", "messages": [{"role": "user", "content": "hi"}]},
        headers={"x-request-timeout-seconds": "0.0001", "serve_multiplexed_model_id": "x"},
        timeout=60,
    )
    assert response.status_code == 200


def ongoing_requests(model_id: str) -> int:
    """Requests the replicas of a model are working on."""
    applications = model_applications().values()
    replicas = next(a.replicas for a in applications if a.model_id == model_id)
    return ongoing_at(replicas)


def test_the_engine_hears_that_a_streaming_client_left(graph: Graph) -> None:
    question = {
        "model": "scripted-drip",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
    }
    with httpx.stream("POST", f"{graph.url}/v1/chat/completions", json=question, timeout=30) as r:
        lines = r.iter_lines()  # held: the connection closes with its iterator
        assert next(lines).startswith("data: ")
        assert ongoing_requests("scripted-drip") == 1
        pool = httpx.get(f"{graph.url}/console/pool", timeout=30).text
        (row,) = [row for row in pool.split("<tr>") if ">scripted-drip <" in row]
        assert re.findall(r'<td class="number">([^<]*)</td>', row)[:2] == ["1", "1"]
    give_up_s = time.monotonic() + 20  # far from the request's own deadline of 60 s
    while ongoing_requests("scripted-drip"):
        assert time.monotonic() < give_up_s
        time.sleep(0.2)


# Schemas, by the real engine.


def structured(schema: dict[str, object]) -> dict[str, object]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def says(graph: Graph, model: str, **fields: object) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "What is 2 + 2?"}], **fields}
    return httpx.post(f"{graph.url}/v1/chat/completions", json=body, timeout=120)


NEVER: dict[str, object] = {"type": "object", "properties": {"a": False}, "required": ["a"]}
"""A valid schema that no value fits."""


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"$ref": "#"}, "refers to itself without end"),
        (NEVER, "grammar"),
        ({"type": "string", "pattern": r"(a)\1"}, "grammar"),
        ({"type": "integer", "multipleOf": 3}, "not supported"),
    ],
)
def test_a_schema_that_the_engine_cannot_compile_is_a_400_and_the_engine_lives(
    graph: Graph, schema: dict[str, object], words: str, stream: bool
) -> None:
    refused = says(graph, "nano-math", response_format=structured(schema), stream=stream)
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    assert "/project" not in error["message"]  # the compiler's own messages name its source files
    answered = says(graph, "nano-math", response_format=structured({"type": "integer"}))
    assert answered.status_code == 200, answered.text


def test_an_answer_fits_its_schema(graph: Graph) -> None:
    schema: dict[str, object] = {"enum": ["yes", "no"]}
    completion = says(graph, "nano-facts", response_format=structured(schema)).json()
    assert completion["choices"][0]["message"]["content"] in ('"yes"', '"no"')
