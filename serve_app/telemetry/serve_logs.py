"""What Ray Serve logs for our deployments."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler

SERVE_LOGGING = {"enable_access_log": False}
"""For every deployment: the gateway logs a line per request, and one more per hop would cost more
than it says."""


@contextmanager
def log_files_kept() -> Iterator[None]:
    """Give Serve's log buffers their files back, whatever closes them meanwhile.

    vLLM sets up its logging with `logging.config.dictConfig`, which closes every handler of the
    process, and Serve's buffer of a replica's log file loses the file. The log ends there, and
    worse: Serve's controller, started again, asks each replica for the file's name, takes the
    error for a failed replica and ends the engine (Ray 2.60).
    """
    buffers = [
        (handler, handler.target)
        for handler in logging.getLogger("ray.serve").handlers
        if isinstance(handler, MemoryHandler)
    ]
    try:
        yield
    finally:
        for buffer, file in buffers:
            buffer.setTarget(file)
