"""Vectors of texts that every start asks for again: cards of pairs, utterances of rules."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve_app.private_files import make_private_folder

logger = logging.getLogger(__name__)

MAX_KEPT = 20_000
"""Texts whose vectors are kept; 30 MB at 384 dimensions."""


class LastingVectors:
    """A file of vectors by hash of their text, and no text.

    Invariants:
        - A file that is damaged, or of other dimensions, counts as none.
        - A file appears under its name only when it is complete. Of two processes that write at
          once the later one's file stays; what only the other one had is encoded again.
    """

    def __init__(self, file: Path, dim: int) -> None:
        """Read the file, if it is there.

        Args:
            file: Named after the encoder: the vectors of another one must not be taken for its own.
            dim: Length of a vector.
        """
        self._file = file
        self._dim = dim
        self._vectors = self._read()

    def missing(self, texts: Sequence[str]) -> list[str]:
        """Those without a vector, each once, in their order."""
        return [text for text in dict.fromkeys(texts) if _digest(text) not in self._vectors]

    def of(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(num_texts, dim) vectors of texts.

        Raises:
            KeyError: If one of them has none.
        """
        if not texts:
            return np.empty((0, self._dim), np.float32)
        return np.stack([self._vectors[_digest(text)] for text in texts])

    def add(self, texts: Sequence[str], vectors: NDArray[np.float32]) -> None:
        """Take over (num_texts, dim) vectors and write the file, if it can be written.

        Above `MAX_KEPT` those go that were there first.
        """
        new = {_digest(text): vector for text, vector in zip(texts, vectors, strict=True)}
        known = self._read() | self._vectors | new
        self._vectors = dict(list(known.items())[-max(MAX_KEPT, len(new)) :])
        try:
            self._write()
        except OSError as error:
            logger.warning("the vectors of cards and utterances are not kept: %s", error)

    def _read(self) -> dict[bytes, NDArray[np.float32]]:
        try:
            with np.load(self._file, allow_pickle=False) as kept:
                digests, vectors = kept["digests"], kept["vectors"]
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            logger.warning("the kept vectors are damaged; they are made anew")
            return {}
        fits = digests.shape == (len(vectors), 16) and vectors.shape == (len(digests), self._dim)
        if not fits or not np.isfinite(vectors).all():
            logger.warning("the kept vectors do not fit this encoder; they are made anew")
            return {}
        return dict(zip(map(bytes, digests), vectors.astype(np.float32), strict=True))

    def _write(self) -> None:
        make_private_folder(self._file.parent)
        digests = np.frombuffer(b"".join(self._vectors), np.uint8).reshape(-1, 16)
        number, name = tempfile.mkstemp(prefix="vectors-", dir=self._file.parent)
        try:
            with os.fdopen(number, "wb") as fresh:
                np.savez(fresh, digests=digests, vectors=np.stack(list(self._vectors.values())))
            os.replace(name, self._file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
