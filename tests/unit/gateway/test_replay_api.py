"""The same result over HTTP: deterministic requests, and replays of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, update

from serve_app.store.tables import RequestRow, TraceRow
from tests.money_fakes import Bank, bank


def url(folder: Path) -> str:
    return f"sqlite+aiosqlite:///{folder / 'atlas.db'}"


async def answered(money: Bank, key: str, **body: Any) -> str:
    """Path of the replay of a request that was answered and written."""
    response = await money.ask(key, max_tokens=10, **body)
    assert response.status_code == 200
    assert await money.gateways[0].outcomes.flush(60)
    return f"/v1/trajectories/{response.json()['atlas']['request_id']}/replay"


async def test_a_request_is_replayed_by_its_owner_alone(tmp_path: Path) -> None:
    async with bank(tmp_path, url(tmp_path)) as money:
        (_, key), (_, other) = await money.key(), await money.key("another team")
        path = await answered(money, key)
        again = await money.ask(key, path=path, max_tokens=10)
        assert again.status_code == 200
        extension = again.json()["atlas"]
        assert (extension["pair"], extension["path"]) == ("model@none", "pinned")
        assert extension["request_id"] not in path
        assert (await money.ask(other, path=path)).status_code == 404
        unknown = f"/v1/trajectories/req_{'0' * 32}/replay"
        assert (await money.ask(key, path=unknown)).status_code == 404


async def test_a_replay_can_be_streamed(tmp_path: Path) -> None:
    async with bank(tmp_path, url(tmp_path)) as money:
        _, key = await money.key()
        path = await answered(money, key)
        streamed = await money.ask(key, path=path, max_tokens=10, stream=True)
        assert streamed.text.rstrip().endswith("data: [DONE]")


async def test_another_question_is_no_replay(tmp_path: Path) -> None:
    async with bank(tmp_path, url(tmp_path)) as money:
        _, key = await money.key()
        path = await answered(money, key)
        other = [{"role": "user", "content": "How few?"}]
        refused = await money.ask(key, path=path, messages=other)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")


async def test_a_candidate_that_is_gone_is_a_conflict_and_nothing_runs(tmp_path: Path) -> None:
    async with bank(tmp_path, url(tmp_path)) as money:
        _, key = await money.key()
        path = await answered(money, key)
        async with money.store.begin() as connection:
            await connection.execute(update(RequestRow).values(model_id="retired"))
            gone = func.replace(TraceRow.spans, "model@none", "retired@none")
            await connection.execute(update(TraceRow).values(spans=gone))
        asked = len(money.engines.bodies)
        refused = await money.ask(key, path=path)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (409, "candidate_gone")
        assert "'retired@none'" in error["message"]
        assert len(money.engines.bodies) == asked


async def test_the_same_body_has_the_same_seed_and_no_temperature(tmp_path: Path) -> None:
    async with bank(tmp_path, url(tmp_path)) as money:
        _, key = await money.key()
        fixed: dict[str, Any] = {"atlas": {"deterministic": True}, "max_tokens": 10}
        other = [{"role": "user", "content": "How few?"}]
        for body in (fixed, fixed, fixed | {"messages": other}, fixed | {"seed": 7}):
            assert (await money.ask(key, **body)).status_code == 200
        one, same, changed, own = (body for _, body in money.engines.bodies)
        assert one["seed"] == same["seed"] != changed["seed"]
        assert own["seed"] == 7
        assert {body["temperature"] for body in (one, same, changed, own)} == {0.0}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"atlas": {"deterministic": True}, "temperature": 0.7}, "temperature"),
        ({"atlas": {"policy_version": 1}}, "atlas.policy_version"),
        ({"atlas": {"deterministic": True, "policy_version": -1}}, "atlas.policy_version"),
        ({"atlas": {"deterministic": True, "policy_version": 2**40}}, "atlas.policy_version"),
        ({"atlas": {"deterministic": "yes"}}, "atlas.deterministic"),
    ],
)
async def test_what_contradicts_itself_is_refused(
    tmp_path: Path, body: dict[str, Any], param: str
) -> None:
    async with bank(tmp_path, url(tmp_path)) as money:
        _, key = await money.key()
        refused = await money.ask(key, **body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
