"""Processors, memory and GPUs, as far as this process may use them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

GIB = 2**30
_GPU_QUERY = ("--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
_GPU_TIMEOUT_S = 10.0
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    name: str
    memory_gib: float


@dataclass(frozen=True)
class Hardware:
    """What this process may use."""

    cpus: int
    memory_gib: float
    """Memory in all, or the limit of this process's control group where that is lower."""
    free_gib: float
    """What of it is available now."""
    gpus: tuple[Gpu, ...] = ()


def look_at_hardware() -> Hardware:
    """Look at the machine; asks `nvidia-smi` where there is one."""
    total, free = _memory_bytes(_CGROUP)
    cpus = len(os.sched_getaffinity(0))
    return Hardware(cpus, total / GIB, free / GIB, tuple(_gpus()))


def _memory_bytes(cgroup: Path) -> tuple[int, int]:
    """Memory in all and available; a container's limit counts where it is lower."""
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):  # no limit (`max`), or no control groups here
        return total, free
    # Cached files count as used, and are given back on demand.
    cached = _stat(cgroup / "memory.stat", "inactive_file")
    return min(total, limit), max(0, min(free, limit - used + cached))


def _stat(file: Path, name: str) -> int:
    try:
        fields = dict(line.split() for line in file.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(fields.get(name, 0))


def _gpus() -> Iterator[Gpu]:
    """NVIDIA's, which the pinned vLLM runs on."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return
    try:
        said = subprocess.run(
            [program, *_GPU_QUERY],
            capture_output=True,
            text=True,
            timeout=_GPU_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):  # no driver
        return
    for line in said.stdout.splitlines():
        name, _, mib = line.rpartition(",")
        if name and mib.strip().isdigit():  # "[N/A]" of a machine whose memory is shared
            yield Gpu(name.strip(), int(mib) / 1024)
