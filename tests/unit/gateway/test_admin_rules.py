"""Rules over HTTP: taken as a whole, listed in their order, refused with a reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from serve_app.config.rules import RulesSubmission
from serve_app.pool.desired import DesiredPool
from serve_app.store import Store, newest_pool
from tests.gateway_fakes import Loopback, gateway_config, running_gateway

KEYWORD = {"type": "keyword", "name": "bug", "any": ["error", {"re": "e+"}], "use": ["large"]}
DEFAULT = {"type": "default", "use": ["pattern:hello"], "learned": False}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    with running_gateway(tmp_path_factory.mktemp("open")) as loopback:
        yield loopback


def put(gateway: Loopback, rules: Any) -> httpx2.Response:
    return httpx2.put(f"{gateway.url}/v1/admin/rules", json={"rules": rules}, timeout=20)


def test_rules_that_are_put_are_those_of_the_next_revision(gateway: Loopback) -> None:
    response = put(gateway, [KEYWORD, DEFAULT])
    assert response.status_code == 202, response.text
    assert response.json()["count"] == 2
    newest = gateway.run(lambda: newest_pool(gateway.store))

    assert newest is not None
    assert newest.revision == response.json()["revision"]
    assert list(newest.rules) == [KEYWORD, DEFAULT]
    config = gateway.run(lambda: DesiredPool(gateway.config, gateway.store).current())
    assert [rule.type for rule in config.rules] == ["keyword", "default"]


def test_another_change_of_the_pool_keeps_the_rules(gateway: Loopback) -> None:
    put(gateway, [KEYWORD, DEFAULT])
    gateway.run(lambda: DesiredPool(gateway.config, gateway.store).remove_model("large"))
    config = gateway.run(lambda: DesiredPool(gateway.config, gateway.store).current())

    assert len(config.rules) == 2  # the one that names it lets requests pass
    assert gateway.run(lambda: DesiredPool(gateway.config, gateway.store).put_rules(())) > 0


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        ([KEYWORD], "the last rule has to be the default"),
        ([{**KEYWORD, "use": ["gone"]}, DEFAULT], "'gone' is no candidate of the pool"),
        ([{**KEYWORD, "any": [{"re": "("}]}, DEFAULT], "RE2"),
        ([{**KEYWORD, "loops": 3}, DEFAULT], "loops"),
        ([{**KEYWORD, "type": "magic"}, DEFAULT], "magic"),
        (
            [
                {
                    "type": "semantic",
                    "name": "s",
                    "routes": [{"name": "a", "utterances": ["x"], "use": ["small"]}],
                },
                DEFAULT,
            ],
            "it is not fitted",
        ),
    ],
)
def test_rules_that_cannot_work_are_a_400_with_the_reason(
    gateway: Loopback, rules: Any, why: str
) -> None:
    response = put(gateway, rules)

    assert response.status_code == 400
    assert why in response.json()["error"]["message"]


def test_no_rules_are_listed_where_there_are_none(gateway: Loopback) -> None:
    listed = httpx2.get(f"{gateway.url}/v1/admin/rules", timeout=20).json()

    assert listed["data"] == []


async def test_the_files_rules_win_once_they_change(tmp_path: Path) -> None:
    config = gateway_config()
    store = await Store.open(f"sqlite+aiosqlite:///{tmp_path / 'atlas.db'}")
    try:
        put_rules = RulesSubmission.model_validate({"rules": [KEYWORD, DEFAULT]}).rules
        await DesiredPool(config, store).put_rules(put_rules)
        assert len((await DesiredPool(config, store).current()).rules) == 2
        only = RulesSubmission.model_validate({"rules": [DEFAULT]}).rules
        changed = config.model_copy(update={"rules": only})
        newest = await DesiredPool(changed, store).apply_file()

        assert list(newest.rules) == [DEFAULT]
        assert len((await DesiredPool(changed, store).current()).rules) == 1
    finally:
        await store.close()
