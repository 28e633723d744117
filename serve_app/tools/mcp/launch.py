"""Becomes a command that the kernel ends with the process that started it, confined where asked.

Runs as a script: it imports nothing but the standard library, and `sandlock` and the sandbox's own
filter where it confines. What cannot be confined does not run.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import signal
import struct
import sys
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_CAPABILITY_VERSION_3 = 0x20080522
_SYSTEM = (
    "/usr", "/lib", "/lib64", "/bin", "/sbin", "/dev/urandom", "/etc/alternatives",
    "/etc/ld.so.cache", "/etc/localtime", "/etc/ssl", "/etc/timezone",
)  # fmt: skip
"""What a confined command may read beside what is declared, where it exists."""


def main() -> None:
    """`launch.py PLAN COMMAND ARGUMENTS…`; the plan is JSON, as `child.py` writes it."""
    plan, command = json.loads(sys.argv[1]), sys.argv[2:]
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != plan["parent"]:  # the parent ended before the line above
        sys.exit(1)
    if plan["sandbox"] is not None:
        _confine(plan["sandbox"], libc)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


def _confine(sandbox: dict[str, Any], libc: ctypes.CDLL) -> None:
    """No file but the named, no network, no signal to others, no capability."""
    sys.path += sandbox["packages"]
    import sandlock

    spec = importlib.util.spec_from_file_location("sandbox_policy", sandbox["policy"])
    assert spec is not None
    assert spec.loader is not None
    policy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(policy)
    readable = [path for path in (*_SYSTEM, *sandbox["read"]) if Path(path).exists()]
    protection = sandlock.Protection
    sandlock.confine(
        sandlock.Sandbox(
            fs_readable=readable,
            fs_writable=[*sandbox["write"], "/dev/null"],
            # What an older kernel lacks of these, the system call filter refuses anyway.
            allow_degraded=[
                protection.NET_TCP,
                protection.FS_IOCTL_DEV,
                protection.SIGNAL_SCOPE,
                protection.ABSTRACT_UNIX_SOCKET_SCOPE,
            ],
        )
    )
    if libc.capset(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), bytes(24)) != 0:
        sys.exit("capabilities cannot be dropped")
    policy.install_seccomp(programs=True)


if __name__ == "__main__":
    main()
