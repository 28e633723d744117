"""Handles to models' applications: found once, and not waited for without an end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from serve_app.budget import Deadline
from serve_app.errors import DeadlineExceeded, EngineBusy, EngineError
from serve_app.models.clients import ModelClients
from tests.path2_fakes import Method


class Controller:
    """Serve's controller, which answers when it is told to.

    Attributes:
        asked: Names of the applications that were asked for.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answers = threading.Event()
        self.failure: Exception | None = None
        self.complete = Method(self._complete)

    def handle(self, name: str) -> Any:
        self.asked.append(name)
        assert self.answers.wait(30)
        return self

    async def _complete(self, body: Any) -> Any:
        if self.failure is not None:
            raise self.failure
        return {"choices": []}


@pytest.fixture
async def controller(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Controller]:
    scripted = Controller()
    monkeypatch.setattr("ray.serve.get_app_handle", scripted.handle)
    yield scripted
    scripted.answers.set()  # no thread is left for the loop's end to wait for


def clients(**options: Any) -> ModelClients:
    made = ModelClients(**options)
    made.use({"m": "model-m"})
    return made


async def test_a_controller_that_does_not_answer_holds_nobody_and_one_thread(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.models.clients._FIND_TIMEOUT_S", 0.05)
    models = clients()
    calls = [models.complete("m", {}, Deadline.after(30)) for _ in range(20)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(result) for result in results} == {EngineError}
    assert controller.asked == ["model-m"]
    controller.answers.set()
    while models._searches:
        await asyncio.sleep(0.01)
    await models.complete("m", {}, Deadline.after(30))
    assert controller.asked == ["model-m"]  # found once and kept


async def test_a_request_waits_for_a_handle_no_longer_than_it_has(controller: Controller) -> None:
    with pytest.raises((EngineError, DeadlineExceeded)):
        await clients().complete("m", {}, Deadline.after(0.05))


async def test_a_model_that_asks_for_a_pause_is_not_suspected(controller: Controller) -> None:
    controller.answers.set()
    told: list[str] = []
    models = clients(on_failure=told.append)
    controller.failure = EngineBusy("in a minute")
    with pytest.raises(EngineBusy):
        await models.complete("m", {}, Deadline.after(30))
    assert told == []
    controller.failure = EngineError("broken")
    with pytest.raises(EngineError):
        await models.complete("m", {}, Deadline.after(30))
    assert told == ["m"]
