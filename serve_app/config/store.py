"""Where outcomes, feedback, keys and snapshots live."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from serve_app.config.base import BaseConfig


class SnapshotsPlace(NamedTuple):
    """Where router snapshots are."""

    folder: Path
    """The snapshots themselves or, beside a URL, copies of those that were read; absolute."""
    url: str | None = None
    """Of an object store."""


class StoreConfig(BaseConfig):
    """Where outcomes, feedback and keys live."""

    url: str = "sqlite+aiosqlite:///atlas.db"
    """SQLAlchemy URL; `${NAME}` is filled from the environment. A relative SQLite path lies in
    `data_dir`."""
    flush_interval_s: float = Field(default=0.2, gt=0)
    """Outcomes are written in batches this often."""
    max_pending: int = Field(default=50_000, ge=1)
    """Outcomes each gateway replica holds in memory while the store is slow or away."""
    journal_dir: str = "journal"
    """Folder where outcomes lie until the store has them, so that they outlive the process that
    recorded them; best on a disk of the node. A relative one lies in `data_dir`."""
    max_journal_bytes: int = Field(default=256 << 20, ge=0)
    """Bytes each gateway replica keeps there; more outcomes than this and `max_pending` are counted
    and dropped. 0 keeps nothing: what a killed process had not written is lost then."""
    retention_days: float | None = Field(default=90.0, gt=0)
    """Days that requests with their outcomes and verdicts, and jobs that are over, are kept;
    `None`: for ever. Labelled questions and their outcomes, snapshots and policies always stay."""
    keep_content: bool = False
    """Whether a request's trace keeps what tools were given and gave, what models said, and the
    words of tools' errors: the first 64 KiB of each request. The question itself is always kept."""
    snapshots_dir: str = "snapshots"
    """Router snapshots, for all nodes of a cluster: a shared folder, where a relative one lies in
    `data_dir`, or a URL that `fsspec` knows (`s3://bucket/prefix`, `gs://bucket/prefix`; `${NAME}`
    is filled from the environment)."""
