"""The files that pages need: our own, and those of others as they were published.

`static/vendored.json` has the package, version and SHA-256 of each file of others; a test holds the
files against it. Each file is a route of its own, so nothing else of the folder can be asked for.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).parent / "static"
SERVED = {
    "console.css": "text/css",
    "console.js": "text/javascript",
    "htmx.min.js": "text/javascript",
    "icon.svg": "image/svg+xml",
    "uPlot.iife.min.js": "text/javascript",
    "uPlot.min.css": "text/css",
}
_HEADERS = {
    "cache-control": "public, max-age=31536000, immutable",
    "x-content-type-options": "nosniff",
}
"""The address of a file changes with the file."""


@dataclass(frozen=True, slots=True)
class Asset:
    """One file, held in memory."""

    name: str
    media_type: str
    content: bytes

    @property
    def path(self) -> str:
        """Where it is served."""
        return f"/console/static/{self.name}"

    @property
    def url(self) -> str:
        """Where a page finds it: other content has another address."""
        return f"{self.path}?{hashlib.sha256(self.content).hexdigest()[:12]}"

    async def handle(self, request: Request) -> Response:
        """`GET` of it."""
        return Response(self.content, media_type=self.media_type, headers=_HEADERS)


def read_assets() -> dict[str, Asset]:
    """Every file that is served, by name."""
    return {
        name: Asset(name, media_type, (FOLDER / name).read_bytes())
        for name, media_type in SERVED.items()
    }
