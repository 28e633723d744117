"""What a profile waits for, when it stops waiting, and what it says is left out."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

from rl.profile.ready_pool import ReadyPool, ready_pool
from serve_app.schemas import MemberState, ModelMember, Pair, PoolState

PAIRS = tuple(Pair(model_id, tool) for model_id in ("a", "b") for tool in ("none", "python"))
READY = {name: ModelMember(name, MemberState.READY) for name in ("a", "b")}
STARTING = ModelMember("b", MemberState.STARTING)
FAILED = ModelMember("b", MemberState.FAILED, "RuntimeError: no", retry_unix_s=2e9)


class Pool:
    """A controller whose pool goes through some states; the last one stays."""

    def __init__(self, members_of_b: Iterable[ModelMember]) -> None:
        self.states = [
            PoolState(version, (READY["a"], b), ("none", "python"), PAIRS)
            for version, b in enumerate(members_of_b)
        ]
        self.said: list[tuple[str, ...]] = []

    async def read(self, known_version: int, timeout_s: float) -> PoolState:
        if known_version + 1 == len(self.states):
            raise TimeoutError
        return self.states[known_version + 1]

    async def wait(self, *, wait_s: float = 60, models: frozenset[str] | None = None) -> ReadyPool:
        return await ready_pool(self.read, models=models, wait_s=wait_s, on_wait=self.said.append)


async def test_it_waits_for_a_model_that_is_starting() -> None:
    pool = Pool([STARTING, READY["b"]])
    found = await pool.wait()
    assert (found.pairs, found.left_out, found.reasons) == (PAIRS, (), ())
    assert pool.said == [("b is starting",)]


async def test_it_waits_for_a_failed_model_that_is_tried_again_in_time() -> None:
    soon = replace(FAILED, retry_unix_s=time.time() + 30)
    tried_now = replace(FAILED, retry_unix_s=None)
    found = await Pool([soon, tried_now, READY["b"]]).wait()
    assert found.left_out == ()


async def test_it_waits_for_a_tool_that_does_not_answer_yet() -> None:
    cold = replace(READY["b"], reason="with python: no", cold_tools=frozenset({"python"}))
    pool = Pool([cold, READY["b"]])
    assert (await pool.wait()).pairs == PAIRS
    assert pool.said == [("b is ready: with python: no",)]


async def test_what_is_not_tried_again_in_time_is_left_out_by_name_at_once() -> None:
    late = replace(FAILED, retry_unix_s=time.time() + 600)
    pool = Pool([late])
    found = await pool.wait(wait_s=60)
    assert found.pairs == (Pair("a", "none"), Pair("a", "python"))
    assert found.left_out == (Pair("b", "none"), Pair("b", "python"))
    assert found.reasons == ("b is failed: RuntimeError: no",)
    assert pool.said == []


async def test_the_wait_has_an_end() -> None:
    found = await Pool([STARTING]).wait(wait_s=0.01)
    assert found.left_out == (Pair("b", "none"), Pair("b", "python"))


async def test_models_that_are_not_wanted_are_not_waited_for() -> None:
    found = await Pool([STARTING]).wait(models=frozenset({"a"}))
    assert (found.left_out, found.reasons) == ((), ())
