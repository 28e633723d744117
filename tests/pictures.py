"""Small pictures of every type that is served, as bytes and as `data:` URLs."""

from __future__ import annotations

import base64
import io
import struct
from typing import Any

from PIL import Image, ImageDraw, ImageFont


def picture(kind: str = "png", size: tuple[int, int] = (3, 2), **how: Any) -> bytes:
    """A picture as a program writes it."""
    written = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(written, kind, **how)
    return written.getvalue()


def written(text: str, kind: str = "png", size: int = 28) -> bytes:
    """A picture of some lines of text, black on white."""
    font = ImageFont.load_default(size)
    box = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((20, 20), text, font=font)
    page = Image.new("RGB", (int(box[2]) + 20, int(box[3]) + 20), "white")
    ImageDraw.Draw(page).multiline_text((20, 20), text, fill="black", font=font)
    data = io.BytesIO()
    page.save(data, kind)
    return data.getvalue()


def url(data: bytes, kind: str = "png") -> str:
    """Bytes as a URL that says they are a picture."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def part(data: bytes | None = None, kind: str = "png", **how: Any) -> dict[str, Any]:
    """A content part with a picture."""
    return {"type": "image_url", "image_url": {"url": url(data or picture(kind), kind), **how}}


def asking(*parts: dict[str, Any], text: str = "What is this?") -> dict[str, Any]:
    """A user's message with a text and pictures."""
    return {"role": "user", "content": [{"type": "text", "text": text}, *(parts or (part(),))]}


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it has this many pixels, and has none."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + chunk + b"\0\0\0\0" + b"\0\0\0\0IEND\xaeB`\x82"


def gif_with_large_frame(width: int, height: int) -> bytes:
    """A GIF of one pixel, whose first frame has this many."""
    screen = struct.pack("<HHBBB", 1, 1, 0, 0, 0)
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x01\0\0"
    return b"GIF89a" + screen + frame + b";"
