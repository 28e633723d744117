"""Reads the text in pictures by RapidOCR, whose models (PP-OCR) lie in its wheel."""

from __future__ import annotations

import base64
import functools
import time
from typing import TYPE_CHECKING, Any, ClassVar

from serve_app.config.tools import OcrConfig
from serve_app.errors import ConfigError, ToolFailed, ToolTimeout
from serve_app.tools.base import Tool, ToolResult

if TYPE_CHECKING:
    from rapidocr import RapidOCR

NO_TEXT = "(no text)"


class Ocr(Tool):
    """The text of each picture, line by line, from top to bottom."""

    config: OcrConfig
    parameters: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {"pictures": {"type": "array", "items": {"type": "string"}, "minItems": 1}},
        "required": ["pictures"],
        "additionalProperties": False,
    }

    def run(self, arguments: dict[str, Any], deadline_s: float) -> ToolResult:
        """Read pictures.

        Args:
            arguments: `pictures`, as `data:` URLs that the gateway has checked.
            deadline_s: Seconds from now until the result is worthless; looked at before each
                picture.

        Returns:
            The text of all; `data` has `texts`, one for each picture, and `scores`, the confidence
            of each line in [0, 1].

        Raises:
            ToolFailed: If a picture cannot be decoded.
            ToolTimeout: If time ran out.
        """
        ends_s = time.monotonic() + deadline_s
        texts, scores = [], []
        for url in arguments["pictures"]:
            if time.monotonic() >= ends_s:
                raise ToolTimeout("reading the pictures took too long")
            lines, sure = self._read(base64.b64decode(url.partition(",")[2]))
            texts.append(lines)
            scores.append(sure)
        share = self.config.max_result_chars // len(texts)
        texts = [text if len(text) <= share else f"{text[:share]} [cut]" for text in texts]
        return ToolResult(self.clip("\n\n".join(texts)), {"texts": texts, "scores": scores})

    def recorded(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """How many pictures were read; they are not repeated."""
        return {"pictures": len(arguments["pictures"])}

    def _read(self, picture: bytes) -> tuple[str, list[float]]:
        try:
            found = _engine(self.config.max_side, self.config.min_score)(picture)
        except Exception as error:  # OpenCV and Pillow have errors of their own, many of them
            raise ToolFailed("a picture cannot be decoded") from error
        if not found.txts:
            return NO_TEXT, []
        return "\n".join(found.txts), [round(float(score), 3) for score in found.scores]


@functools.lru_cache(maxsize=2)
def _engine(max_side: int, min_score: float) -> RapidOCR:
    """The models, once in each worker; on one thread."""
    try:
        from rapidocr import RapidOCR
    except ImportError:
        raise ConfigError("tools of type ocr need the package rapidocr") from None
    return RapidOCR(
        params={
            "Global.log_level": "error",
            "Global.text_score": min_score,
            "Global.use_cls": False,  # text that stands on its head
            "Det.limit_type": "max",
            "Det.limit_side_len": max_side,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )
