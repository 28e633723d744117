"""What a request and its key may use: allow-lists and deny-lists become the call's own limits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from serve_app.schemas import AccessLists, Limits
from serve_app.store import create_key, list_keys
from tests.gateway_fakes import Loopback, running_gateway


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    with running_gateway(tmp_path_factory.mktemp("locked"), auth={"mode": "required"}) as loopback:
        yield loopback


def ask(gateway: Loopback, lists: AccessLists, model: str = "atlas", **atlas: Any) -> Any:
    """The status and error of a chat with a key of these lists."""
    _, key = gateway.run(lambda: create_key(gateway.store, "test", ["chat"], lists))
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "atlas": atlas}
    headers = {"authorization": f"Bearer {key}"}
    return httpx2.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers, timeout=20)


def limits_of(gateway: Loopback, lists: AccessLists, **atlas: Any) -> Limits:
    """What the orchestrator was told of a chat that was answered."""
    response = ask(gateway, lists, **atlas)
    assert response.status_code == 200, response.text
    return gateway.orchestrator.calls[-1].limits


def test_without_lists_nothing_is_limited(locked: Loopback) -> None:
    limits = limits_of(locked, AccessLists())

    assert (limits.models, limits.tools) == (None, None)


def test_a_denied_name_is_left_out_of_what_is_allowed(locked: Loopback) -> None:
    limits = limits_of(locked, AccessLists(), not_models=["large"], not_tools=["calculator"])

    assert limits.models == frozenset({"small", "broken", "pattern:hello"})
    assert limits.tools == frozenset({"none"})


def test_the_keys_and_the_requests_lists_hold_together(locked: Loopback) -> None:
    lists = AccessLists(models=frozenset({"small", "large"}), not_tools=frozenset({"calculator"}))
    limits = limits_of(locked, lists, models=["large", "broken"], tools=["none", "calculator"])

    assert limits.models == frozenset({"large"})
    assert limits.tools == frozenset({"none"})


@pytest.mark.parametrize(
    "model", ["large", "large@calculator", "pattern:hello", "small@calculator"]
)
def test_what_a_key_may_not_use_is_a_403_also_when_it_is_named(
    locked: Loopback, model: str
) -> None:
    lists = AccessLists(models=frozenset({"small"}), tools=frozenset({"none"}))
    response = ask(locked, lists, model)

    assert response.status_code == 403
    assert "may not use" in response.json()["error"]["message"]


def test_a_named_model_that_the_request_itself_denies_is_a_400(locked: Loopback) -> None:
    response = ask(locked, AccessLists(), "small", not_models=["small"])

    assert (response.status_code, response.json()["error"]["param"]) == (400, "atlas.models")


def test_a_denied_name_that_is_not_there_is_a_400(locked: Loopback) -> None:
    response = ask(locked, AccessLists(), not_models=["gone"])

    assert (response.status_code, response.json()["error"]["param"]) == (400, "atlas.not_models")


def test_a_keys_list_may_name_what_left_the_pool(locked: Loopback) -> None:
    limits = limits_of(locked, AccessLists(models=frozenset({"gone", "small"})))

    assert limits.models == frozenset({"small"})


def test_a_key_is_listed_with_what_it_may_use(locked: Loopback) -> None:
    lists = AccessLists(models=frozenset({"small"}), not_tools=frozenset({"calculator"}))
    key_id, _ = locked.run(lambda: create_key(locked.store, "listed", ["chat"], lists))
    keys = {key.key_id: key for key in locked.run(lambda: list_keys(locked.store))}

    assert keys[key_id].lists == lists
