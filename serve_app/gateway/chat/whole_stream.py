"""A stream as one piece: what is kept of it for a request that comes again."""

from __future__ import annotations

from typing import Any

from serve_app.gateway.chat.chunk_shaper import DONE, ChunkShaper, event_bytes
from serve_app.gateway.chat.writing import ChunkWriter
from serve_app.models.reply import ChunkMerger
from serve_app.orchestrator.run import Piece

Json = dict[str, Any]


class WholeStream:
    """Puts pieces together, and makes of them as few chunks as a client can read.

    Events of spans are left out: they were of the first time.
    """

    def __init__(self, first: Piece) -> None:
        """Begin with nothing; the first piece names the pair until another one does."""
        self._merger = ChunkMerger()
        self._pair = first.pair

    def add(self, piece: Piece) -> None:
        """Take a piece as the orchestrator gave it."""
        if piece.event is None:
            self._pair = piece.pair
            self._merger.add(piece.choices)

    def body(self, writer: ChunkWriter, shaper: ChunkShaper, extension: Json) -> bytes:
        """The stream of one chunk for each choice.

        Args:
            writer: Writes the chunks.
            shaper: Puts usage and the `atlas` object where the client expects them.
            extension: The `atlas` object.
        """
        chunks = [writer.whole(self._pair, choice) for choice in self._merger.choices()]
        shaped = [shaped for chunk in chunks for shaped in shaper.feed(chunk)]
        return b"".join(map(event_bytes, [*shaped, shaper.finish(extension)])) + DONE
