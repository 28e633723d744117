"""The folder of one training run: its lock, checkpoints, TensorBoard events and result.

A checkpoint appears under its name only when it is complete, so a killed process leaves the last
complete one. The lock is the kernel's and goes with the process.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from serve_app.errors import ConfigError
from serve_app.private_files import make_private_folder

CONFIG_FILE, RESULT_FILE, CURVE_FILE = "config.json", "result.json", "curve.png"
_LOCK_FILE = "lock"
_STATE_FILE, _BEST_FILE, _ALGORITHM = "state.json", "best.safetensors", "algorithm"
_KEPT = 2
"""Checkpoints that are left; older ones go."""


@dataclass(frozen=True)
class Checkpoint:
    """A run's state beside RLlib's part."""

    iteration: int
    document: Mapping[str, Any]
    """Plain JSON."""
    tensors: Mapping[str, NDArray[np.float32]]
    """The best weights so far; may be empty."""


class RunFolder:
    """A run's folder, held by one process; a context manager."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Name the folder; entering makes it.

        Args:
            path: The folder.
            identity: What the run is of; only a run of the same goes on in it.
        """
        self.path = path.absolute()
        self._identity = json.loads(json.dumps(identity))
        self._lock: int | None = None

    def __enter__(self) -> Self:
        """Take the folder.

        Raises:
            ConfigError: If another process has it, or it holds another run.
        """
        make_private_folder(self.path)
        self._lock = os.open(self.path / _LOCK_FILE, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._release()
            raise ConfigError(f"this is being trained already, in {self.path.name!r}") from None
        try:
            self._claim()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let the folder go."""
        self._release()

    def save(self, checkpoint: Checkpoint, save_algorithm: Callable[[str], object]) -> None:
        """Write a checkpoint, and drop those that are too old.

        Args:
            checkpoint: It.
            save_algorithm: Writes RLlib's part into a folder.
        """
        folder = self._checkpoints / f"{checkpoint.iteration:06d}"
        if folder.exists():
            return
        unfinished = self._checkpoints / f".{folder.name}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        save_algorithm(str(unfinished / _ALGORITHM))
        if checkpoint.tensors:
            save_file(dict(checkpoint.tensors), unfinished / _BEST_FILE)
        (unfinished / _STATE_FILE).write_text(json.dumps(checkpoint.document))
        _force_to_disk(unfinished)
        unfinished.rename(folder)
        for old in self._complete()[:-_KEPT]:
            shutil.rmtree(old)

    def last_checkpoint(self) -> tuple[Checkpoint, str] | None:
        """The newest complete checkpoint and the folder of RLlib's part; `None` without one."""
        complete = self._complete()
        if not complete:
            return None
        folder = complete[-1]
        document = json.loads((folder / _STATE_FILE).read_text())
        best = folder / _BEST_FILE
        tensors = load_file(best) if best.exists() else {}
        return Checkpoint(int(folder.name), document, tensors), str(folder / _ALGORITHM)

    @contextmanager
    def event_writer(self, after: int) -> Iterator[EventWriter]:
        """Writes TensorBoard events of the iterations after one; earlier ones are there."""
        from tensorboardX import SummaryWriter

        writer = SummaryWriter(
            str(self.path / "tensorboard"), purge_step=after + 1 if after else None
        )
        try:
            yield EventWriter(writer)
        finally:
            writer.close()

    def finish(self, result: Mapping[str, Any]) -> None:
        """Put the result on record: the run is over."""
        unfinished = self.path / f".{RESULT_FILE}"
        unfinished.write_text(json.dumps(result, indent=1))
        unfinished.rename(self.path / RESULT_FILE)

    @property
    def _checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def _complete(self) -> list[Path]:
        return sorted(path for path in self._checkpoints.glob("[0-9]*") if path.is_dir())

    def _claim(self) -> None:
        """Write down whose folder it is, or see that it is this run's."""
        file = self.path / CONFIG_FILE
        if file.exists():
            if json.loads(file.read_text()) != self._identity:
                raise ConfigError(
                    f"{self.path.name!r} holds a run of other settings or questions: name another "
                    "folder"
                )
            return
        unfinished = self.path / f".{CONFIG_FILE}"
        unfinished.write_text(json.dumps(self._identity, indent=1))
        unfinished.rename(file)

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class EventWriter:
    """Writes rows of the training curve for TensorBoard."""

    def __init__(self, writer: Any) -> None:
        """Wrap a `tensorboardX.SummaryWriter`."""
        self._writer = writer

    def write(self, row: Mapping[str, Any]) -> None:
        """Write one row: every number under `train/`, those of the validation under `held_out/`."""
        step = row["iteration"]
        for name, value in row.items():
            if name == "utilities":
                for place, utility in value.items():
                    self._writer.add_scalar(f"held_out/{place}", utility, step)
            elif name == "utility":
                self._writer.add_scalar("held_out/mean", value, step)
            elif name != "iteration":
                self._writer.add_scalar(f"train/{name}", value, step)


def _force_to_disk(folder: Path) -> None:
    """So that a complete name never stands for lost bytes."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
