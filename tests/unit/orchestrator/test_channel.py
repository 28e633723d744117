"""From a run to its reader: in order, bounded, and ended by a reader that leaves."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from serve_app.errors import EngineError
from serve_app.orchestrator.channel import MAX_WAITING, Channel


async def test_pieces_come_in_order_and_before_the_error() -> None:
    channel: Channel[int] = Channel()

    async def work() -> None:
        for number in range(200):
            await channel.send(number)
        raise EngineError("broken")

    read: list[int] = []

    async def read_all() -> None:
        async for piece in channel.read(work()):
            read.append(piece)

    with pytest.raises(EngineError, match="broken"):
        await read_all()
    assert read == list(range(200))


async def test_a_run_waits_for_a_reader_that_is_slow() -> None:
    channel: Channel[int] = Channel()
    sent = 0

    async def work() -> None:
        nonlocal sent
        for number in range(1000):
            await channel.send(number)
            sent += 1

    async with aclosing(channel.read(work())) as pieces:
        assert await anext(pieces) == 0
        for _ in range(10):
            await asyncio.sleep(0)
        assert sent == MAX_WAITING + 1  # the one that was read, and those under way
        assert [piece async for piece in pieces] == list(range(1, 1000))


async def test_a_reader_that_leaves_ends_the_run_and_waits_for_its_end() -> None:
    channel: Channel[int] = Channel()
    ended = []

    async def work() -> None:
        try:
            await channel.send(1)
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            ended.append("cancelled")
            raise

    async with aclosing(channel.read(work())) as pieces:
        assert await anext(pieces) == 1
    assert ended == ["cancelled"]


async def test_a_reader_that_is_cancelled_ends_the_run() -> None:
    channel: Channel[int] = Channel()
    began, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def read() -> None:
        async with aclosing(channel.read(work())) as pieces:
            await anext(pieces)

    reader = asyncio.create_task(read())
    await began.wait()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert ended.is_set()


async def test_a_run_that_ignores_its_end_holds_its_reader_only_so_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serve_app.orchestrator.channel._ENDING_S", 0.01)
    channel: Channel[int] = Channel()
    may_end = asyncio.Event()
    deaf: list[asyncio.Task[None]] = []

    async def work() -> None:
        task = asyncio.current_task()
        assert task is not None
        deaf.append(task)
        await channel.send(1)
        while not may_end.is_set():
            try:
                await may_end.wait()
            except asyncio.CancelledError:
                continue

    async with aclosing(channel.read(work())) as pieces:
        await anext(pieces)
    may_end.set()
    await asyncio.wait(deaf)


async def test_what_is_offered_waits_for_nobody_and_keeps_its_place() -> None:
    channel: Channel[int] = Channel()

    async def work() -> None:
        for number in range(MAX_WAITING):
            await channel.send(number)
        for number in range(MAX_WAITING, 2 * MAX_WAITING):
            channel.offer(number)
        await channel.send(2 * MAX_WAITING)

    read = []
    async with asyncio.timeout(10), aclosing(channel.read(work())) as pieces:
        first = await anext(pieces)
        await asyncio.sleep(0.01)
        read = [first, *[piece async for piece in pieces]]
    assert read == list(range(2 * MAX_WAITING + 1))


async def test_reading_what_was_offered_makes_no_room_for_more_pieces() -> None:
    channel: Channel[int] = Channel()
    sent = 0

    async def work() -> None:
        nonlocal sent
        for _ in range(MAX_WAITING):
            channel.offer(-1)
        while True:
            await channel.send(sent)
            sent += 1

    async with aclosing(channel.read(work())) as pieces:
        offered = [await anext(pieces) for _ in range(MAX_WAITING)]
        await asyncio.sleep(0.01)
        assert offered == [-1] * MAX_WAITING
        assert sent == MAX_WAITING
