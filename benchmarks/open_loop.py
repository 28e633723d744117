"""The one open loop of the benchmarks: requests fall due at a fixed rate, answered or not.

A closed loop slows down with the server and hides its delays (coordinated omission); an open one
does not. Each request knows when it was due, so that its latency counts from there.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Coroutine


async def send_when_due(
    send: Callable[[int, float], Coroutine[None, None, None]],
    left_out: Callable[[int, float], None],
    *,
    rate: float,
    max_in_flight: int,
    requests: int | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Send requests at a constant rate, and return when the last of them has ended.

    Args:
        send: Sends one request; gets its number from 0, and when it is due in seconds of
            `time.perf_counter`. Handles its own errors.
        left_out: Told of a request that is not sent, because `max_in_flight` are under way.
        rate: Requests per second.
        max_in_flight: Requests under way at most, so that a server that hangs cannot exhaust this
            process.
        requests: How many to send; `None`: until `stop` is set.
        stop: Ends the sending early. `None`: nothing does.
    """
    stop = stop or asyncio.Event()
    running: set[asyncio.Task[None]] = set()
    began_s = time.perf_counter()
    for number in itertools.count() if requests is None else range(requests):
        due_s = began_s + number / rate
        try:
            async with asyncio.timeout(max(0.0, due_s - time.perf_counter())):
                await stop.wait()
            break
        except TimeoutError:
            pass
        if len(running) >= max_in_flight:
            left_out(number, due_s)
            continue
        task = asyncio.create_task(send(number, due_s))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
