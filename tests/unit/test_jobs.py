"""Jobs over HTTP: the real gateway and store; where they would run is the one fake part."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import update

from serve_app import jobs
from serve_app.store import add_snapshot, create_key, publish, update_job
from serve_app.store.tables import JobRow
from tests.gateway_fakes import Loopback, running_gateway

QUESTION = {"id": "1", "query": "What is 1 + 1?", "gold": 2, "metric": "numeric"}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, module_store_url: str) -> Iterator[Loopback]:
    limits = {"max_jobs": 100}
    with running_gateway(
        tmp_path_factory.mktemp("jobs"), module_store_url, limits=limits
    ) as loopback:
        yield loopback


def submit(gateway: Loopback, **request: Any) -> httpx2.Response:
    return httpx2.post(gateway.url + "/v1/admin/jobs", json=request, timeout=60)


def look_up(gateway: Loopback, job_id: str) -> Any:
    return httpx2.get(f"{gateway.url}/v1/admin/jobs/{job_id}", timeout=60).json()


def cancel(gateway: Loopback, job_id: str) -> httpx2.Response:
    return httpx2.delete(f"{gateway.url}/v1/admin/jobs/{job_id}", timeout=60)


def test_a_job_is_taken_started_and_listed(gateway: Loopback) -> None:
    response = submit(gateway, kind="fit", seed=3)
    job = response.json()
    assert (response.status_code, job["state"]) == (201, "queued")
    assert gateway.launcher.is_running(job["job_id"])
    listed = httpx2.get(gateway.url + "/v1/admin/jobs").json()["data"]
    assert listed[0]["job_id"] == job["job_id"]
    assert look_up(gateway, job["job_id"])["settings"] == {
        "kind": "fit",
        "seed": 3,
        "with_traffic": True,
        "voi": False,
    }
    named = submit(gateway, kind="rollback", expect_version=7).json()
    assert named["settings"]["expect_version"] == 7


def test_questions_are_checked_outside_of_the_event_loop(
    gateway: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []
    check = jobs._read_questions

    def watched(questions: list[dict[str, Any]]) -> Any:
        threads.append(threading.current_thread().name)
        return check(questions)

    monkeypatch.setattr(jobs, "_read_questions", watched)
    for kind in ("profile", "train"):
        assert submit(gateway, kind=kind, questions=[QUESTION]).status_code == 201
    assert len(threads) == 2
    assert "loopback-gateway" not in threads


def test_a_profile_job_keeps_its_questions_to_itself(gateway: Loopback) -> None:
    job = submit(gateway, kind="profile", questions=[QUESTION], max_cost_usd=0.5).json()
    assert job["settings"]["max_cost_usd"] == 0.5
    assert "questions" not in job["settings"]


@pytest.mark.parametrize(
    ("request_body", "field"),
    [
        ({"kind": "profile", "questions": []}, "questions"),
        ({"kind": "profile", "questions": [QUESTION, {"id": "2"}]}, "questions[1].query"),
        ({"kind": "profile", "questions": [QUESTION | {"metric": "luck"}]}, "questions[0].metric"),
        ({"kind": "profile", "questions": [QUESTION], "sample": 0}, "sample"),
        ({"kind": "profile", "questions": [QUESTION], "samples": 0}, "samples"),
        ({"kind": "profile", "questions": [QUESTION], "temperature": 3}, "temperature"),
        ({"kind": "profile", "questions": [QUESTION], "planner": "a@pair"}, "planner"),
        ({"kind": "fit", "seed": -1}, "seed"),
        ({"kind": "train", "settings": {"lr": -1}}, "lr"),
        ({"kind": "train", "settings": {"deployment": "x.yaml"}}, "deployment"),
        ({"kind": "train", "settings": {"env": {"max_steps": 99}}}, "max_steps"),
        ({"kind": "promote", "candidate": "../../etc"}, "candidate"),
        ({"kind": "rollback", "expect_version": 0}, "expect_version"),
        ({"kind": "promote", "expect_version": "3"}, "expect_version"),
        ({"kind": "dance"}, ""),
    ],
)
def test_a_job_that_cannot_work_is_a_400_that_names_the_field(
    gateway: Loopback, request_body: dict[str, Any], field: str
) -> None:
    before = set(gateway.launcher.running)
    response = submit(gateway, **request_body)
    assert response.status_code == 400
    assert field in response.json()["error"]["message"]
    assert gateway.launcher.running == before


def test_a_cancelled_job_is_stopped_and_stays_cancelled(gateway: Loopback) -> None:
    job_id = submit(gateway, kind="fit").json()["job_id"]
    assert cancel(gateway, job_id).json()["state"] == "cancelled"
    assert not gateway.launcher.is_running(job_id)
    changed = gateway.run(lambda: update_job(gateway.store, job_id, state="succeeded"))
    assert not changed
    assert cancel(gateway, job_id).status_code == 409


def test_a_running_job_whose_process_is_gone_has_failed(gateway: Loopback) -> None:
    job_id = submit(gateway, kind="fit").json()["job_id"]
    gateway.run(lambda: update_job(gateway.store, job_id, state="running"))
    assert look_up(gateway, job_id)["state"] == "running"
    gateway.launcher.stop(job_id)
    gone = look_up(gateway, job_id)
    assert (gone["state"], gone["error"]) == ("failed", "its process ended")


def test_the_list_shows_what_died_as_failed(gateway: Loopback) -> None:
    alive, died, never = (submit(gateway, kind="fit").json()["job_id"] for _ in range(3))
    gateway.run(lambda: update_job(gateway.store, alive, state="running"))
    gateway.run(lambda: update_job(gateway.store, died, state="running"))
    for job_id in (died, never):
        gateway.launcher.stop(job_id)

    def listed() -> dict[str, tuple[str, str | None]]:
        rows = httpx2.get(gateway.url + "/v1/admin/jobs").json()["data"]
        return {row["job_id"]: (row["state"], row["error"]) for row in rows}

    assert listed()[alive] == ("running", None)
    assert listed()[died] == ("failed", "its process ended")
    assert listed()[never] == ("queued", None)  # its process may be on its way

    async def make_old() -> None:
        async with gateway.store.begin() as connection:
            old = update(JobRow).where(JobRow.job_id == never)
            await connection.execute(old.values(created_unix_s=time.time() - 3600))

    gateway.run(make_old)
    assert look_up(gateway, never)["error"] == "it was never started"


def test_more_jobs_than_there_may_be_get_a_429_until_one_is_over(
    tmp_path: Path, store_url: str
) -> None:
    with running_gateway(tmp_path, store_url, limits={"max_jobs": 2}) as small:
        first, second = (submit(small, kind="fit").json()["job_id"] for _ in range(2))
        refused = submit(small, kind="fit")
        assert refused.status_code == 429
        assert "2 jobs are under way" in refused.json()["error"]["message"]
        assert "retry-after" in refused.headers
        assert small.launcher.running == {first, second}
        small.run(lambda: update_job(small.store, first, state="succeeded"))
        third = submit(small, kind="fit")
        assert third.status_code == 201
        # One that died makes room too, though nobody looked at it.
        small.run(lambda: update_job(small.store, second, state="running"))
        small.launcher.stop(second)
        assert submit(small, kind="fit").status_code == 201
        assert submit(small, kind="fit").status_code == 429


def test_of_many_jobs_at_once_no_more_are_taken_than_there_may_be(
    tmp_path: Path, store_url: str
) -> None:
    with running_gateway(tmp_path, store_url, limits={"max_jobs": 3}) as small:
        with ThreadPoolExecutor(12) as callers:
            answers = list(callers.map(lambda _: submit(small, kind="fit").status_code, range(12)))
        assert sorted(answers) == [201] * 3 + [429] * 9
        assert len(small.launcher.running) == 3


def test_a_training_job_is_taken_with_the_settings_it_names(gateway: Loopback) -> None:
    settings = {"iterations": 3, "seed": 7, "env": {"max_steps": 2}}
    job = submit(gateway, kind="train", settings=settings).json()
    assert (job["kind"], job["state"]) == ("train", "queued")
    assert job["settings"]["settings"] == settings
    assert submit(gateway, kind="train").status_code == 201


def events_of(lines: Iterator[str]) -> Iterator[Any]:
    """What a stream of events says, up to its end."""
    for line in lines:
        if line.startswith("data: "):
            said = line.removeprefix("data: ")
            if said == "[DONE]":
                return
            yield json.loads(said)


def test_a_jobs_changes_are_streamed_until_it_is_over(gateway: Loopback) -> None:
    job_id = submit(gateway, kind="train").json()["job_id"]
    gateway.run(lambda: update_job(gateway.store, job_id, state="running"))
    accept = {"accept": "text/event-stream"}
    url = f"{gateway.url}/v1/admin/jobs/{job_id}"
    with httpx2.stream("GET", url, headers=accept, timeout=20) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = events_of(response.iter_lines())
        assert next(events)["state"] == "running"
        gateway.run(lambda: update_job(gateway.store, job_id, progress={"done": 5}))
        assert next(events)["progress"] == {"done": 5}
        gateway.run(lambda: update_job(gateway.store, job_id, state="succeeded", result={"x": 1}))
        assert next(events)["result"] == {"x": 1}
        assert list(events) == []


def test_the_stream_of_a_job_that_is_over_is_its_last_state(gateway: Loopback) -> None:
    job_id = submit(gateway, kind="fit").json()["job_id"]
    cancel(gateway, job_id)
    url = f"{gateway.url}/v1/admin/jobs/{job_id}"
    response = httpx2.get(url, headers={"accept": "text/event-stream"})
    (last,) = events_of(response.iter_lines())
    assert last["state"] == "cancelled"
    assert response.text.endswith("data: [DONE]\n\n")
    accept = {"accept": "text/event-stream"}
    assert httpx2.get(gateway.url + "/v1/admin/jobs/job_0", headers=accept).status_code == 404


def test_an_unknown_job_is_a_404(gateway: Loopback) -> None:
    assert httpx2.get(gateway.url + "/v1/admin/jobs/job_0").status_code == 404
    assert cancel(gateway, "job_0").status_code == 404


def test_snapshots_are_listed_with_what_served_when(gateway: Loopback) -> None:
    gateway.run(lambda: add_snapshot(gateway.store, "abc", {"num_queries": 7}))
    version = gateway.run(lambda: publish(gateway.store, "abc", "a test"))
    listed = httpx2.get(gateway.url + "/v1/admin/snapshots").json()
    assert listed["data"][0]["about"] == {"num_queries": 7}
    assert listed["policies"][0]["policy_version"] == version
    assert listed["policies"][0]["snapshot_id"] == "abc"


def test_jobs_need_an_admin_key(tmp_path: Path) -> None:
    with running_gateway(tmp_path, auth={"mode": "required"}) as locked:

        def status_with(scope: str) -> int:
            _, key = locked.run(lambda: create_key(locked.store, scope, [scope]))
            headers = {"authorization": f"Bearer {key}"}
            url = locked.url + "/v1/admin/jobs"
            return httpx2.post(url, json={"kind": "fit"}, headers=headers).status_code

        assert (status_with("chat"), status_with("admin")) == (403, 201)
