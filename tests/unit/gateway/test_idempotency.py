"""`Idempotency-Key` through the real gateway: a POST that comes again is done once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import pytest

from serve_app.errors import StoreAway
from serve_app.gateway.edge import idempotency
from serve_app.store import create_key
from tests.gateway_fakes import PAIR, Loopback, eventually, running_gateway

CHAT = "/v1/chat/completions"
MAX_ANSWER_BYTES = 4096

_numbers = count()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    settings = {"max_answer_bytes": MAX_ANSWER_BYTES}
    folder = tmp_path_factory.mktemp("open")
    with running_gateway(folder, idempotency=settings) as loopback:
        yield loopback


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    folder = tmp_path_factory.mktemp("locked")
    settings = {"max_keys": 2}
    with running_gateway(folder, auth={"mode": "required"}, idempotency=settings) as loopback:
        yield loopback


@pytest.fixture
def key() -> str:
    return f"key-{next(_numbers)}"


def chat(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "atlas", "messages": [{"role": "user", "content": text}], **fields}


def post(
    gateway: Loopback, key: str | None, body: Any, path: str = CHAT, **headers: str
) -> httpx2.Response:
    if key is not None:
        headers["idempotency-key"] = key
    return httpx2.post(gateway.url + path, json=body, headers=headers, timeout=60)


def calls(gateway: Loopback, text: str) -> int:
    """How often a question came to the orchestrator."""
    return sum(call.query == text for call in gateway.orchestrator.calls)


def code_of(response: httpx2.Response) -> str:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["code"])


def is_replay(response: httpx2.Response) -> bool:
    return response.headers.get("idempotent-replayed") == "true"


# The same again.


def test_the_same_again_gets_the_first_answer(gateway: Loopback, key: str) -> None:
    first = post(gateway, key, chat(key))
    again = post(gateway, key, chat(key))
    assert (first.status_code, is_replay(first)) == (200, False)
    assert (again.status_code, is_replay(again)) == (200, True)
    assert again.content == first.content
    for name in ("content-type", "x-atlas-pair", "x-atlas-path", "content-length"):
        assert again.headers[name] == first.headers[name]
    assert again.headers["x-request-id"] != first.headers["x-request-id"]
    assert calls(gateway, key) == 1


def test_without_a_key_the_same_again_is_done_again(gateway: Loopback, key: str) -> None:
    assert not any(is_replay(post(gateway, None, chat(key))) for _ in range(2))
    assert calls(gateway, key) == 2


def test_spaces_and_the_order_of_names_make_no_other_body(gateway: Loopback, key: str) -> None:
    body = chat(key, temperature=0.5)
    post(gateway, key, body)
    spaced = json.dumps(dict(reversed(body.items())), indent=2).encode()
    headers = {"idempotency-key": key, "content-type": "application/json"}
    again = httpx2.post(gateway.url + CHAT, content=spaced, headers=headers, timeout=60)
    assert is_replay(again)


def test_another_body_or_path_with_the_same_key_is_a_422(gateway: Loopback, key: str) -> None:
    post(gateway, key, chat(key))
    for response in (
        post(gateway, key, chat(key, temperature=0.5)),
        post(gateway, key, chat(key), "/v1/route"),
    ):
        assert response.status_code == 422
        assert code_of(response) == "idempotency_key_reused"
    assert calls(gateway, key) == 1


def test_a_stream_comes_again_as_one_piece(gateway: Loopback, key: str) -> None:
    body = chat("one two three", stream=True)
    first, again = events(post(gateway, key, body)), post(gateway, key, body)
    assert is_replay(again)
    assert again.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert again.headers["x-atlas-pair"] == str(PAIR)
    (chunk,) = events(again)
    (choice,) = chunk["choices"]
    assert choice["delta"] == {"role": "assistant", "content": "one two three "}
    assert choice["finish_reason"] == "stop"
    assert (chunk["id"], chunk["atlas"]) == (first[-1]["id"], first[-1]["atlas"])


def test_a_stream_of_several_choices_with_usage_comes_again_whole(
    gateway: Loopback, key: str
) -> None:
    def ask() -> list[Any]:
        answer = gateway.client().chat.completions.create(
            model="atlas",
            messages=[{"role": "user", "content": key}],
            n=2,
            stream=True,
            stream_options={"include_usage": True},
            extra_headers={"idempotency-key": key},
        )
        return list(answer)

    first, again = ask(), ask()
    assert [chunk.choices[0].index for chunk in again[:-1]] == [0, 1]
    assert [chunk.choices[0].delta.content for chunk in again[:-1]] == [f"{key} "] * 2
    assert again[-1].choices == []
    assert again[-1].usage == first[-1].usage
    assert again[-1].model_extra == first[-1].model_extra


def events(response: httpx2.Response) -> list[Any]:
    """The chunks of a stream that ended well."""
    said = [event.removeprefix("data: ") for event in response.text.split("\n\n") if event]
    assert said[-1] == "[DONE]"
    return [json.loads(event) for event in said[:-1]]


def test_every_kind_of_post_can_come_again(gateway: Loopback, key: str) -> None:
    asked = post(gateway, None, chat(key)).json()["atlas"]["request_id"]
    pattern = {"name": f"p-{key}", "do": [{"ask": {"pair": "small"}}]}
    for path, body, status in (
        ("/v1/route", chat(key), 200),
        ("/v1/feedback", {"request_id": asked, "score": 1.0}, 200),
        ("/v1/admin/patterns", pattern, 202),
        ("/v1/admin/jobs", {"kind": "fit"}, 201),
    ):
        first = post(gateway, f"{key}{path}", body, path)
        again = post(gateway, f"{key}{path}", body, path)
        assert (first.status_code, is_replay(first)) == (status, False), first.text
        assert (again.status_code, is_replay(again)) == (status, True)
        assert again.content == first.content


def test_an_answer_that_is_too_large_is_remembered_and_not_kept(
    gateway: Loopback, key: str
) -> None:
    text = key + "x" * MAX_ANSWER_BYTES
    assert post(gateway, key, chat(text)).status_code == 200
    again = post(gateway, key, chat(text))
    assert (again.status_code, code_of(again)) == (409, "answer_not_kept")
    assert calls(gateway, text) == 1


def test_other_methods_do_not_look_at_the_key(gateway: Loopback, key: str) -> None:
    for _ in range(2):
        response = httpx2.get(gateway.url + "/v1/models", headers={"idempotency-key": key})
        assert (response.status_code, is_replay(response)) == (200, False)


# Who has a key, and how many.


def test_a_key_belongs_to_its_api_key_and_so_many_are_kept(locked: Loopback) -> None:
    ann, bob = (
        locked.run(lambda name=name: create_key(locked.store, name, ["chat"]))[1]  # type: ignore[misc]
        for name in ("ann", "bob")
    )

    def ask(who: str, key: str, text: str) -> httpx2.Response:
        return post(locked, key, chat(text), authorization=f"Bearer {who}")

    assert ask(ann, "1", "hers").json()["choices"][0]["message"]["content"] == "hers"
    assert ask(bob, "1", "his").json()["choices"][0]["message"]["content"] == "his"
    assert is_replay(ask(ann, "1", "hers"))
    assert ask(ann, "2", "more").status_code == 200
    full = ask(ann, "3", "too many")
    assert (full.status_code, code_of(full)) == (429, "rate_limit_exceeded")
    assert int(full.headers["retry-after"]) > 80_000
    assert is_replay(ask(ann, "2", "more"))
    assert ask(bob, "2", "his").status_code == 200
    assert calls(locked, "too many") == 0


@pytest.mark.parametrize("value", [b"", b"a b", b"x" * 256, b"\xc3\xa4", b"a\tb"])
def test_a_key_that_is_none_is_a_400(gateway: Loopback, value: bytes) -> None:
    response = raw(gateway, [value])
    assert response.startswith(b"HTTP/1.1 400 ")
    assert b'"param":"Idempotency-Key"' in response


def test_two_keys_are_a_400_and_255_characters_are_none_too_many(gateway: Loopback) -> None:
    assert raw(gateway, [b"a", b"b"]).startswith(b"HTTP/1.1 400 ")
    assert raw(gateway, [b"~" * 255]).startswith(b"HTTP/1.1 200 ")


def raw(gateway: Loopback, keys: list[bytes]) -> bytes:
    body = json.dumps(chat("hi")).encode()
    sent = b"".join(b"idempotency-key: %s\r\n" % value for value in keys)
    return gateway.raw(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        b"content-type: application/json\r\n%scontent-length: %d\r\n\r\n%s"
        % (sent, len(body), body)
    )


# Under way.


def test_of_twenty_at_once_one_is_done(gateway: Loopback, key: str) -> None:
    body = chat(f"!act {key}")

    async def ask_all() -> list[httpx2.Response]:
        async with httpx2.AsyncClient(timeout=60) as client:
            headers = {"idempotency-key": key}
            tries = [client.post(gateway.url + CHAT, json=body, headers=headers) for _ in range(20)]
            return await asyncio.gather(*tries)

    answers = asyncio.run(ask_all())
    assert calls(gateway, f"!act {key}") == 1
    assert {answer.status_code for answer in answers} <= {200, 409}
    done = [answer for answer in answers if answer.status_code == 200]
    assert sum(not is_replay(answer) for answer in done) == 1
    assert len({answer.content for answer in done}) == 1
    for answer in answers:
        if answer.status_code == 409:
            assert code_of(answer) == "idempotency_key_in_flight"
            assert 1 <= int(answer.headers["retry-after"]) <= 10


def test_while_it_is_under_way_the_same_again_is_a_409_for_longer_than_a_lease(
    tmp_path: Path, key: str
) -> None:
    with running_gateway(tmp_path, idempotency={"lease_s": 1}) as gateway:
        body = chat("!hang", atlas={"deadline_s": 4})
        asking = threading.Thread(target=post, args=(gateway, key, body))
        asking.start()
        assert eventually(lambda: calls(gateway, "!hang") == 1, 30)
        began_s = time.monotonic()
        while asking.is_alive() and time.monotonic() < began_s + 2.5:
            again = post(gateway, key, body)
            assert again.status_code == 409 or not asking.is_alive()
            time.sleep(0.1)
        asking.join()
        assert calls(gateway, "!hang") == 1


# What ends without an answer.


def test_a_failure_frees_the_key_if_nothing_was_begun(gateway: Loopback, key: str) -> None:
    for text, status in (("!fail", 502), ("!bug", 500), ("!busy", 503), ("!refuse", 400)):
        for tries in (1, 2):
            response = post(gateway, f"{key}{text}", chat(f"{text} {key}"))
            assert response.status_code == status
            assert calls(gateway, f"{text} {key}") == tries
    assert post(gateway, f"{key}!fail", chat("hello")).status_code == 200


def test_a_failure_after_an_effect_leaves_an_unknown_outcome(gateway: Loopback, key: str) -> None:
    text = f"!fail !act {key}"
    assert post(gateway, key, chat(text)).status_code == 502
    for _ in range(2):
        again = post(gateway, key, chat(text))
        assert (again.status_code, code_of(again)) == (409, "outcome_unknown")
    assert calls(gateway, text) == 1


def test_a_refusal_after_an_effect_is_the_answer(gateway: Loopback, key: str) -> None:
    text = f"!refuse !act {key}"
    first, again = post(gateway, key, chat(text)), post(gateway, key, chat(text))
    assert (first.status_code, again.status_code) == (400, 400)
    assert is_replay(again)
    assert again.content == first.content
    assert calls(gateway, text) == 1


@pytest.mark.parametrize(("acts", "status"), [("", 200), (" !act", 409)])
def test_a_stream_that_breaks_is_no_answer(
    gateway: Loopback, key: str, acts: str, status: int
) -> None:
    body = chat(f"!break{acts} {key}", stream=True)
    assert "[DONE]" not in post(gateway, key, body).text
    again = post(gateway, key, body)
    assert (again.status_code, is_replay(again)) == (status, False)


def test_a_client_that_leaves_is_no_answer(gateway: Loopback, key: str) -> None:
    idle, acting = chat(f"!hang {key}"), chat(f"!hang !act {key}")
    for name, body in (("idle", idle), ("acting", acting)):
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(
                gateway.url + CHAT,
                json=body,
                headers={"idempotency-key": f"{key} {name}".replace(" ", "-")},
                timeout=httpx2.Timeout(60, read=2),
            )
    # Another request may have a key that is free, and 422 says that it is not yet.
    assert eventually(lambda: post(gateway, f"{key}-idle", chat("hi")).status_code == 200, 30)
    assert eventually(
        lambda: code_of(post(gateway, f"{key}-acting", acting)) == "outcome_unknown", 30
    )


def test_a_refused_admin_request_frees_the_key_and_a_failed_one_does_not(
    gateway: Loopback, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        response = post(gateway, key, {"kind": "dance"}, "/v1/admin/jobs")
        assert (response.status_code, is_replay(response)) == (400, False)

    async def submit(*arguments: Any) -> Any:
        raise RuntimeError("after the job began, or before")

    monkeypatch.setattr(gateway.jobs, "submit", submit)
    assert post(gateway, key, {"kind": "fit"}, "/v1/admin/jobs").status_code == 500
    again = post(gateway, key, {"kind": "fit"}, "/v1/admin/jobs")
    assert (again.status_code, code_of(again)) == (409, "outcome_unknown")


def test_without_the_store_a_request_with_a_key_is_not_begun(
    gateway: Loopback, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*arguments: Any) -> Any:
        raise StoreAway("gone")

    monkeypatch.setattr(idempotency, "claim_key", away)
    response = post(gateway, key, chat(key))
    assert response.status_code == 503
    assert "retry-after" in response.headers
    assert calls(gateway, key) == 0
    assert post(gateway, None, chat(key)).status_code == 200


def test_a_store_that_hangs_is_waited_for_no_longer_than_the_deadline(
    gateway: Loopback, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(*arguments: Any) -> Any:
        await asyncio.sleep(60)

    monkeypatch.setattr(idempotency, "claim_key", hang)
    response = post(gateway, key, chat(key, atlas={"deadline_s": 1}))
    assert (response.status_code, code_of(response)) == (504, "deadline_exceeded")
    assert calls(gateway, key) == 0


CHILD = """
import sys, time
from pathlib import Path
from tests.gateway_fakes import running_gateway

with running_gateway(Path(sys.argv[1]), idempotency={"lease_s": 1}) as gateway:
    print(gateway.port, flush=True)
    while len(gateway.orchestrator.calls) < 2 or len(gateway.orchestrator.acted) < 1:
        time.sleep(0.01)
    print("working", flush=True)
    time.sleep(600)
"""


def test_the_death_of_a_gateway_frees_the_key_unless_something_was_begun(
    gateway: Loopback, tmp_path: Path
) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    bodies = {"idle": chat("!hang"), "acting": chat("!hang !act")}

    def ask_the_dying(key: str) -> None:
        headers = {"idempotency-key": key}
        with pytest.raises(httpx2.HTTPError):
            httpx2.post(url + CHAT, json=bodies[key], headers=headers, timeout=60)

    try:
        assert child.stdout is not None
        url = f"http://127.0.0.1:{int(child.stdout.readline())}"
        threads = [threading.Thread(target=ask_the_dying, args=(key,)) for key in bodies]
        for thread in threads:
            thread.start()
        assert child.stdout.readline() == b"working\n"
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
    for thread in threads:
        thread.join()
    with running_gateway(tmp_path) as second:
        short = {"atlas": {"deadline_s": 0.5}}
        assert eventually(
            lambda: code_of(post(second, "acting", bodies["acting"])) == "outcome_unknown", 30
        )
        assert calls(second, "!hang !act") == 0
        # Free: another request may have it.
        assert eventually(lambda: post(second, "idle", chat("hi", **short)).status_code == 200, 30)
