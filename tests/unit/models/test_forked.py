"""A fork of a process that has connections: it keeps none of them open."""

from __future__ import annotations

import multiprocessing
import os
import socket

from serve_app.models.forked import Apart


def test_a_connection_ends_with_its_owner_although_a_fork_lives_on() -> None:
    ours, theirs = socket.socketpair()
    told, tell = multiprocessing.Pipe(duplex=False)
    is_apart, says_apart = multiprocessing.Pipe(duplex=False)
    number = ours.fileno()

    def wait() -> None:
        says_apart.send(os.readlink(f"/proc/self/fd/{number}"))
        told.recv()

    fork = Apart(target=wait)
    fork.start()
    try:
        assert is_apart.recv() == os.devnull  # the number stays taken
        ours.close()
        theirs.settimeout(10)
        assert theirs.recv(1) == b""
        assert fork.is_alive()
    finally:
        tell.send(None)
        fork.join()
    assert fork.exitcode == 0
