"""The router snapshots of a deployment: each under an id that is a hash of its content.

They lie in a folder, or in an object store under a URL that `fsspec` knows; what is read from there
is kept in a folder.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec

from serve_app.config import SnapshotsPlace
from serve_app.errors import SnapshotError
from serve_app.private_files import make_private_folder, tighten
from serve_app.router.snapshots.snapshot import (
    DOCUMENT_FILE,
    TENSORS_FILE,
    RouterSnapshot,
    load_snapshot,
    save_snapshot,
)

logger = logging.getLogger(__name__)

_ID_LENGTH = 12


class SnapshotLibrary:
    """Snapshots by id; equal content has one id.

    Invariants:
        - A snapshot is there whole or not at all: a folder gets its name when it is complete, and
          an object store gets the document, without which there is no snapshot, last.
        - What is read is checked against its hashes; a damaged copy is fetched again.
    """

    def __init__(self, place: SnapshotsPlace) -> None:
        """Use a place; its folder is made with the first snapshot, and is for this user only."""
        self._folder = place.folder
        self._url = place.url
        tighten(self._folder)

    def folder(self, snapshot_id: str) -> Path:
        """Where a snapshot lies on this machine; fetched, if it is elsewhere.

        Raises:
            SnapshotError: If that cannot be an id, or it cannot be fetched.
        """
        if not snapshot_id.isalnum():
            raise SnapshotError(f"{snapshot_id!r} is no snapshot id")
        folder = self._folder / snapshot_id
        if self._url is not None and not folder.is_dir():
            self._fetch(snapshot_id, folder)
        return folder

    def add(self, snapshot: RouterSnapshot) -> str:
        """Keep a snapshot.

        Returns:
            Its id.

        Raises:
            SnapshotError: If it cannot be written.
        """
        with self._draft() as draft:
            save_snapshot(snapshot, draft)
            document = (draft / DOCUMENT_FILE).read_bytes()
            snapshot_id = str(json.loads(document)["sha256"])[:_ID_LENGTH]
            if self._url is not None:
                self._upload(snapshot_id, document, (draft / TENSORS_FILE).read_bytes())
            self._take(draft, self._folder / snapshot_id)
        return snapshot_id

    def load(self, snapshot_id: str, policy_version: int) -> RouterSnapshot:
        """A snapshot under the version it is published as.

        Raises:
            SnapshotError: If it is missing or damaged.
        """
        folder = self.folder(snapshot_id)
        try:
            snapshot = load_snapshot(folder)
        except SnapshotError:
            if self._url is None:
                raise
            shutil.rmtree(folder, ignore_errors=True)
            snapshot = load_snapshot(self.folder(snapshot_id))
        return replace(snapshot, version=policy_version)

    @contextmanager
    def _draft(self) -> Iterator[Path]:
        """The name of a folder beside the snapshots; gone with the block if it is there still."""
        try:
            make_private_folder(self._folder)
            parent = Path(tempfile.mkdtemp(prefix=".draft-", dir=self._folder))
        except OSError as error:
            raise SnapshotError(f"cannot keep the snapshot: {error.strerror}") from error
        try:
            yield parent / "snapshot"
        finally:
            shutil.rmtree(parent, ignore_errors=True)

    @staticmethod
    def _take(draft: Path, folder: Path) -> None:
        """Give a complete folder its name; one that is there is as good."""
        try:
            draft.rename(folder)
        except OSError as error:
            if not folder.is_dir():
                raise SnapshotError(f"cannot keep the snapshot: {error.strerror}") from error

    def _upload(self, snapshot_id: str, document: bytes, tensors: bytes) -> None:
        with self._object_store(snapshot_id) as (files, path):
            with suppress(FileNotFoundError):
                if files.cat_file(f"{path}/{DOCUMENT_FILE}") == document:
                    return
            files.pipe_file(f"{path}/{TENSORS_FILE}", tensors)
            files.pipe_file(f"{path}/{DOCUMENT_FILE}", document)

    def _fetch(self, snapshot_id: str, folder: Path) -> None:
        with self._draft() as draft, self._object_store(snapshot_id) as (files, path):
            draft.mkdir(mode=0o700)
            for name in (DOCUMENT_FILE, TENSORS_FILE):
                (draft / name).write_bytes(files.cat_file(f"{path}/{name}"))
            self._take(draft, folder)

    @contextmanager
    def _object_store(self, snapshot_id: str) -> Iterator[tuple[Any, str]]:
        """The file system behind the URL, and the path of a snapshot in it.

        Raises:
            SnapshotError: For whatever it raises.
        """
        try:
            files, root = fsspec.url_to_fs(self._url)
            yield files, f"{root}/{snapshot_id}"
        except SnapshotError:
            raise
        except FileNotFoundError as error:
            raise SnapshotError(f"snapshot {snapshot_id!r} is not in the object store") from error
        except (ImportError, ValueError) as error:
            scheme = str(self._url).partition(":")[0]
            raise SnapshotError(
                f"store.snapshots_dir: {scheme!r} cannot be used here ({type(error).__name__}); s3 "
                "and gs need the extras of these names"
            ) from error
        except Exception as error:  # every driver has its own
            logger.warning("the object store failed", exc_info=True)
            raise SnapshotError(
                f"the object store of the snapshots failed: {type(error).__name__}"
            ) from error
