"""The folder of router snapshots: each under an id that is a hash of its content."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from serve_app.errors import SnapshotError
from serve_app.router.snapshot import DOCUMENT_FILE, RouterSnapshot, load_snapshot, save_snapshot

_ID_LENGTH = 12


class SnapshotLibrary:
    """Snapshots by id; equal content has one id, and nothing is ever overwritten."""

    def __init__(self, root: Path) -> None:
        """Use a folder; it is made with the first snapshot."""
        self._root = root

    def folder(self, snapshot_id: str) -> Path:
        """Where a snapshot lies.

        Raises:
            SnapshotError: If that cannot be an id.
        """
        if not snapshot_id.isalnum():
            raise SnapshotError(f"{snapshot_id!r} is no snapshot id")
        return self._root / snapshot_id

    def add(self, snapshot: RouterSnapshot) -> str:
        """Keep a snapshot.

        Returns:
            Its id.
        """
        self._root.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=self._root))
        try:
            save_snapshot(snapshot, draft / "snapshot")
            return self._take(draft / "snapshot")
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def load(self, snapshot_id: str, policy_version: int) -> RouterSnapshot:
        """A snapshot under the version it is published as.

        Raises:
            SnapshotError: If it is missing or damaged.
        """
        return replace(load_snapshot(self.folder(snapshot_id)), version=policy_version)

    def _take(self, folder: Path) -> str:
        document = json.loads((folder / DOCUMENT_FILE).read_bytes())
        snapshot_id = str(document["sha256"])[:_ID_LENGTH]
        target = self.folder(snapshot_id)
        try:
            folder.rename(target)
        except OSError as error:
            if not target.is_dir():
                raise SnapshotError(f"cannot keep the snapshot: {error.strerror}") from error
        return snapshot_id
