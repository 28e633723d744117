"""vLLM's engine as a fork of the replica in front of it, instead of a process that starts anew.

Both import PyTorch and vLLM, about ten seconds of a core and half a gigabyte. A fork has them
already, and shares what neither writes to. vLLM forks by itself, but never inside an actor of Ray:
there its engine may have to join the cluster. An engine with the executor `uni` does not.

The first time that vLLM meets a model's class, it looks at the class in one more process, which
must not touch the GPU of this one; ten seconds of a core again. Without a GPU the replica looks.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.context import ForkContext, ForkProcess
from pathlib import Path
from typing import TypeVar

from ray._raylet import setproctitle  # type: ignore[attr-defined]  # Cython

_Seen = TypeVar("_Seen")
_FILES = Path("/proc/self/fd")


class Apart(ForkProcess):
    """A fork that holds none of its parent's connections open."""

    def run(self) -> None:
        """Let go of the connections, then run under vLLM's name for it.

        The name is set here, because vLLM's way finds no room where Ray has put its own.
        """
        _let_go_of_sockets()
        setproctitle(f"VLLM::{self.name}")
        super().run()


class _Context(ForkContext):
    Process = Apart


def _let_go_of_sockets() -> None:
    """Replace every socket by the null device: Ray notices a dead worker by its closed sockets.

    The file numbers stay taken: an inherited object that closes its number closes no other file.
    """
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for entry in list(_FILES.iterdir()):
        with suppress(OSError):
            if os.readlink(entry).startswith("socket:"):
                os.dup2(nothing, int(entry.name), inheritable=False)
    os.close(nothing)


def _context() -> ForkContext:
    gc.collect()
    gc.freeze()  # what the engine's collector never visits stays shared
    return _Context()


def _run_here(look: Callable[[], _Seen]) -> _Seen:
    return look()


def fork_engines() -> None:
    """Have the engines that vLLM starts from here on be forks of this process; CPUs only."""
    from vllm.model_executor.models import registry
    from vllm.v1.engine import utils

    registry._run_in_subprocess = _run_here
    utils.get_mp_context = _context
