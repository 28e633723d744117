"""Models and tools that come and go while the graph serves: over HTTP and by its file."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import yaml
from ray import serve

from serve_app.pool.applications import model_applications, serve_details
from tests.conftest import Graph

pytestmark = pytest.mark.serve

UP_S = 90.0
Json = dict[str, Any]


def scripted(model_id: str, **settings: Any) -> Json:
    return {
        "type": "custom",
        "model_id": model_id,
        "import_path": "tests.fakes:ScriptedModel",
        "settings": {"behaviour": "echo"},
        "num_cpus": 0,
        **settings,
    }


def paced(model_id: str, seconds: float) -> Json:
    return scripted(
        model_id, import_path="benchmarks.engines:PacedModel", settings={"seconds": seconds}
    )


def needing(model_id: str, path: Path) -> Json:
    settings = {"path": str(path)}
    return scripted(model_id, import_path="tests.fakes:NeedsFile", settings=settings)


class Admin:
    """The pool over HTTP."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._http = httpx.Client(base_url=f"{graph.url}/v1", timeout=60)

    def call(self, method: str, path: str, body: Json | None = None) -> Json:
        answer = self._http.request(method, f"/admin{path}", json=body)
        assert answer.is_success, answer.text
        said: Json = answer.json()
        return said

    def listing(self) -> Json:
        return self.call("GET", "/models")

    def model(self, model_id: str) -> Json | None:
        return next((r for r in self.listing()["data"] if r["model_id"] == model_id), None)

    def until(self, claim: Callable[[], Any], what: str) -> Any:
        ends_s = time.monotonic() + UP_S
        while not (found := claim()):
            assert time.monotonic() < ends_s, f"not in time: {what}; {self.listing()['data']}"
            time.sleep(0.1)
        return found

    def until_ready(self, model_id: str) -> Json:
        def ready() -> Json | None:
            row = self.model(model_id)
            ok = row and row["state"] == "ready" and not row["updating"] and not row["cold_pairs"]
            return row if ok else None

        found: Json = self.until(ready, f"{model_id} is ready")
        return found

    def until_taken(self, taken: Json) -> None:
        """Wait until the gateway has a change."""
        revision = taken["revision"]
        self.until(lambda: (self.listing()["revision"] or 0) >= revision, f"revision {revision}")

    def until_gone(self, model_id: str) -> None:
        """Wait until a model's application is no more."""
        self.until(lambda: self.model(model_id) is None, f"{model_id} is out of the list")
        self.until(lambda: not applications(model_id), f"the application of {model_id} is gone")

    def remove(self, model_id: str) -> None:
        """Take a model out, if it is still there."""
        if self.model(model_id) is not None:
            self._http.delete(f"/admin/models/{model_id}")

    def ask(self, model: str, text: str = "hi") -> Json:
        body = {"model": model, "messages": [{"role": "user", "content": text}]}
        answer = self._http.post("/chat/completions", json=body)
        return {"status": answer.status_code, **answer.json()}


@pytest.fixture
def admin(graph: Graph) -> Admin:
    return Admin(graph)


def applications(model_id: str) -> list[str]:
    return [name for name, a in model_applications().items() if a.model_id == model_id]


def replicas() -> set[str]:
    """Names of all replicas of the graph and its models that answer."""
    return {
        row["actor_name"]
        for name, application in serve_details()["applications"].items()
        if name != "model-broken"
        for deployment in application["deployments"].values()
        for row in deployment["replicas"]
        if row["state"] == "RUNNING"
    }


@contextmanager
def asking(admin: Admin, model: str) -> Iterator[list[Json]]:
    """Ask one model ten times a second while the block runs; yields the answers."""
    answers: list[Json] = []
    over = threading.Event()
    asker = Admin(admin.graph)

    def run() -> None:
        while not over.wait(0.1):
            answers.append(asker.ask(model))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield answers
    finally:
        over.set()
        thread.join()


def contents(answer: Json) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


@pytest.fixture(scope="module")
def leaving(graph: Graph) -> Iterator[list[str]]:
    """Models that were taken out; when all tests are over, they are gone."""
    models: list[str] = []
    yield models
    for model_id in models:
        Admin(graph).until_gone(model_id)


@pytest.fixture(scope="module")
def late(
    graph: Graph, leaving: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A model that cannot start before the file at this path is there, in the pool from early on:
    the pause before it is tried again passes while other tests run."""
    needed = tmp_path_factory.mktemp("late") / "needed"
    admin = Admin(graph)
    admin.call("POST", "/models", needing("late", needed))
    yield needed
    admin.remove("late")
    leaving.append("late")


@pytest.fixture(scope="module")
def sleeper(graph: Graph, leaving: list[str]) -> Iterator[str]:
    """A model that may scale to zero, in the pool from early on: it falls asleep meanwhile."""
    admin = Admin(graph)
    scaling = {"min_replicas": 0, "max_replicas": 1, "downscale_delay_s": 1.0}
    card = {"examples": ["zzz sleeper zzz"]}
    admin.call("POST", "/models", scripted("sleeper", autoscaling=scaling, card=card))
    yield "sleeper"
    admin.remove("sleeper")
    leaving.append("sleeper")


@pytest.fixture(scope="module")
def newcomer(graph: Graph, leaving: list[str]) -> Iterator[int]:
    """A model that takes its time, added and up; the pool's version before it."""
    admin = Admin(graph)
    before: int = admin.listing()["pool_version"]
    card = {"examples": ["qqq newcomer qqq"]}
    admin.call("POST", "/models", {**paced("newcomer", 3.0), "card": card})
    admin.until_ready("newcomer")
    yield before
    admin.remove("newcomer")
    leaving.append("newcomer")


@pytest.fixture(scope="module")
def guest(graph: Graph, leaving: list[str]) -> Iterator[str]:
    """A model that can be changed."""
    admin = Admin(graph)
    admin.call("POST", "/models", scripted("guest"))
    admin.until_ready("guest")
    yield "guest"
    admin.remove("guest")
    leaving.append("guest")


def test_a_model_that_cannot_start_is_failed_with_the_reason(late: Path, admin: Admin) -> None:
    failed = admin.until(
        lambda: (row := admin.model("late")) and row["state"] == "failed" and row, "it fails"
    )
    late.touch()
    assert "needs what is not there" in failed["reason"]
    assert "/" not in failed["reason"]
    assert admin.ask("scripted-echo")["status"] == 200


@pytest.mark.usefixtures("sleeper")
def test_an_added_model_is_warmed_routed_to_and_answers(newcomer: int, admin: Admin) -> None:
    assert admin.listing()["pool_version"] > newcomer
    answer = admin.ask("atlas", "qqq newcomer qqq")
    assert (answer["status"], answer["model"]) == (200, "newcomer@none")


@pytest.mark.usefixtures("newcomer")
def test_a_removed_model_ends_its_streams_first(admin: Admin) -> None:
    stream = admin.graph.client().chat.completions.create(
        model="newcomer", messages=[{"role": "user", "content": "hi"}], stream=True
    )
    chunks = [next(stream)]
    admin.until_taken(admin.call("DELETE", "/models/newcomer"))
    assert admin.ask("newcomer")["status"] in (404, 503)  # draining until its stream is over
    chunks += list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text.strip() == "the answer is here and it is short"
    admin.until_gone("newcomer")
    assert admin.ask("newcomer")["status"] == 404
    assert admin.ask("atlas", "qqq newcomer qqq")["status"] == 200


def test_a_changed_price_shows_in_the_costs(guest: str, admin: Admin) -> None:
    assert admin.ask(guest)["atlas"]["cost_usd"] == 0
    before = applications(guest)
    price = {"usd_per_1m_prompt_tokens": 100.0, "usd_per_1m_completion_tokens": 1000.0}
    admin.until_taken(admin.call("PATCH", f"/models/{guest}", price))
    assert admin.ask(guest)["atlas"]["cost_usd"] == pytest.approx(0.006)  # 10 and 5 tokens
    assert applications(guest) == before


def test_a_tool_comes_and_goes(guest: str, admin: Admin) -> None:
    tool = {"type": "best_of", "tool_id": "few", "num_samples": 2}
    admin.call("POST", "/tools", {"tool": tool, "models": [guest]})
    admin.until(lambda: f"{guest}@few" in (admin.model(guest) or {})["pairs"], "the pair")
    admin.until_ready(guest)
    assert '"n": 2' in contents(admin.ask(f"{guest}@few"))
    admin.until_taken(admin.call("DELETE", "/tools/few"))
    assert admin.ask(f"{guest}@few")["status"] == 404
    assert admin.ask(f"{guest}@none")["status"] == 200


def test_an_update_that_cannot_start_leaves_the_old_one_answering(
    guest: str, admin: Admin, tmp_path: Path
) -> None:
    with asking(admin, guest) as answers:
        admin.call("PUT", f"/models/{guest}", needing(guest, tmp_path / "absent"))
        row = admin.until(
            lambda: (r := admin.model(guest)) and "failed" in (r["reason"] or "") and r,
            "the update fails",
        )
    assert row["state"] == "ready"
    assert {answer["status"] for answer in answers} == {200}


def test_an_update_takes_over_without_a_gap(guest: str, admin: Admin) -> None:
    (old,) = admin.until(lambda: len(found := applications(guest)) == 1 and found, "one is left")
    with asking(admin, guest) as answers:
        admin.until(lambda: answers, "it answers")
        admin.call("PUT", f"/models/{guest}", paced(guest, 0.01))
        admin.until(lambda: contents(answers[-1]).startswith("the answer"), "the new one")
        admin.until(lambda: old not in applications(guest), "the old one is gone")
    assert {answer["status"] for answer in answers} == {200}
    assert len(applications(guest)) == 1


def test_a_killed_controller_comes_back_to_the_same_pool(admin: Admin) -> None:
    before, running = admin.listing(), replicas()
    (row,) = serve_details()["applications"]["atlas"]["deployments"]["PoolController"]["replicas"]
    with asking(admin, "scripted-echo") as answers:
        os.kill(row["pid"], signal.SIGKILL)
        after = admin.until(
            lambda: (told := admin.listing())["pool_version"] > before["pool_version"] and told,
            "a new controller tells of the pool",
        )
    ready = {r["model_id"] for r in before["data"] if r["state"] == "ready"}
    assert ready <= {r["model_id"] for r in after["data"] if r["state"] == "ready"}
    assert after["revision"] == before["revision"]
    assert {answer["status"] for answer in answers} == {200}
    assert replicas() >= running - {row["actor_name"]}


def test_engines_outlive_serves_own_controller(admin: Admin) -> None:
    def engines() -> set[str]:
        return {name for name in replicas() if "#nano-" in name}

    def controller_pid() -> int:
        controller = serve.context._get_global_client()._controller
        pid: int = ray.get(controller.get_pid.remote(), timeout=UP_S)
        return pid

    before, killed = engines(), controller_pid()
    assert before
    with asking(admin, "nano-math@none") as answers:
        ray.kill(serve.context._get_global_client()._controller, no_restart=False)
        # Until then the old one's list may still be told.
        admin.until(lambda: controller_pid() != killed, "Serve has a controller again")
        admin.until(lambda: engines() == before, "every engine is found again")
    assert {answer["status"] for answer in answers} == {200}


def test_an_edited_file_changes_only_what_was_edited(admin: Admin) -> None:
    path = admin.graph.config
    original = path.read_text()
    config = yaml.safe_load(original)
    model = next(m for m in config["models"] if m["model_id"] == "scripted-echo")
    model["price"]["usd_per_1m_prompt_tokens"] = 77.0
    before, running = admin.listing(), replicas()
    try:
        path.write_text(yaml.safe_dump(config))
        admin.until_taken({"revision": before["revision"] + 1})
        changed = {
            row["model_id"]
            for row, old in zip(admin.listing()["data"], before["data"], strict=True)
            if (row["price"], row["type"], row["pairs"])
            != (old["price"], old["type"], old["pairs"])
        }
        assert changed == {"scripted-echo"}
        assert replicas() == running
    finally:
        path.write_text(original)
        admin.until_taken({"revision": before["revision"] + 2})


def test_the_same_file_again_changes_nothing(admin: Admin) -> None:
    before, running = admin.listing(), replicas()
    path = admin.graph.config
    path.write_text(path.read_text())
    # The controller reads the file before it looks at other changes.
    price = {"usd_per_1m_prompt_tokens": 1000.0, "usd_per_1m_completion_tokens": 1000.0}
    taken = admin.call("PATCH", "/models/scripted-fail", price)
    admin.until_taken(taken)
    assert taken["revision"] == before["revision"] + 1
    assert replicas() == running


def test_a_model_that_failed_is_tried_again(late: Path, admin: Admin) -> None:
    late.touch()
    admin.until_ready("late")
    assert admin.ask("late")["status"] == 200
    assert serve.status().applications[applications("late")[0]].status == "RUNNING"


def test_a_model_that_sleeps_is_covered_for_and_woken(sleeper: str, admin: Admin) -> None:
    def replicas_of_it() -> int:
        row = admin.model(sleeper)
        assert row is not None
        assert row["state"] == "ready"
        return int(row["replicas"])

    admin.until_ready(sleeper)
    admin.until(lambda: replicas_of_it() == 0, "it falls asleep")
    covered = admin.ask("atlas", "zzz sleeper zzz")
    assert covered["status"] == 200
    assert covered["model"] != "sleeper@none"  # the next-best pair does not keep a caller waiting
    admin.until(lambda: replicas_of_it() == 1, "it is woken all the same")
    assert admin.ask("atlas", "zzz sleeper zzz")["model"] == "sleeper@none"
