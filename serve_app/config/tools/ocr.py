"""Settings of the tool that reads the text in pictures."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from serve_app.config.tools.base import MAX_DESCRIPTION_CHARS, ToolSettings


class OcrConfig(ToolSettings):
    """Reads the text in a request's pictures, so that a model of text can answer about them."""

    type: Literal["ocr"] = "ocr"
    kind: Literal["context"] = "context"
    description: str = Field(
        default="Read the text in a picture.", max_length=MAX_DESCRIPTION_CHARS
    )

    max_side: int = Field(default=1280, ge=64, le=4096)
    """Pixels of a picture's longer side when text is looked for; a larger picture is scaled down.
    More finds smaller letters and takes longer, by the square."""

    min_score: float = Field(default=0.5, ge=0, le=1)
    """Lines that are less sure than this are left out."""

    timeout_s: float = Field(default=30.0, gt=0, le=3600)
    """Longest run of one call, in seconds; a caller's shorter deadline wins."""

    max_concurrency: int = Field(default=2, ge=1, le=256)
    """Calls running at once for one gateway replica."""
