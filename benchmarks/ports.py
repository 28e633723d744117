"""Ports for servers that are started later, by other processes."""

from __future__ import annotations

import random
import socket

_PORTS = range(20_000, 32_000)
"""Below those that the kernel gives to connections and to servers that ask for any port, and above
those of Ray's workers: what is free now is still free when the server starts."""


def free_port() -> int:
    """A port of loopback that nobody uses now."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
