"""Pictures in a request: `data:` URLs of PNG, JPEG, WebP and GIF, bounded in bytes and pixels.

Only headers are read, by this module alone and never by a decoder: some decoders take memory for
all pixels when they open a picture. A picture is passed on as it came.
"""

from __future__ import annotations

import binascii
import re
import struct
from collections.abc import Callable, Iterator

from serve_app.errors import InvalidRequest

_HEAD = re.compile(r"data:image/(png|jpe?g|webp|gif);base64,", re.IGNORECASE)
_TAIL_BYTES = 1024
"""Where the mark of a picture's end is looked for: some programs write a little after it."""
_MAX_BLOCKS = 1024
"""Of a JPEG or GIF before its pixels, and of each of those of a GIF."""
_NO_SIZE = frozenset({0xC4, 0xC8, 0xCC})
"""JPEG markers among those of frames that are none."""


class _BrokenPictureError(Exception):
    """The bytes are no whole picture of their type."""


def check_picture(url: str, field: str, *, max_bytes: int, max_pixels: int) -> None:
    """Refuse what is no picture that an engine should be given.

    Args:
        url: A `data:` URL.
        field: Where it stands, for the message.
        max_bytes: Of the picture, decoded from base64.
        max_pixels: Of the picture; of a moving one, of its first frame.

    Raises:
        InvalidRequest: Naming the field; nothing of the URL is repeated.
    """
    head = _HEAD.match(url)
    if head is None:
        raise InvalidRequest(
            f"{field}: a picture is sent as data:image/png;base64,… (or jpeg, webp, gif); nothing "
            "is fetched, and no other type is served",
            field,
        )
    if (len(url) - head.end()) // 4 * 3 > max_bytes + 3:
        raise InvalidRequest(f"{field}: a picture has at most {max_bytes} bytes here", field)
    try:
        data = binascii.a2b_base64(url[head.end() :], strict_mode=True)
    except ValueError:  # what is not ASCII, too
        raise InvalidRequest(f"{field}: what follows the comma is not base64", field) from None
    if len(data) > max_bytes:
        raise InvalidRequest(
            f"{field}: a picture has at most {max_bytes} bytes here, got {len(data)}", field
        )
    kind = head[1].lower().replace("jpg", "jpeg")
    try:
        width, height = _SIZES[kind](data)
    except (_BrokenPictureError, struct.error, IndexError):
        raise InvalidRequest(f"{field}: this is no whole {kind} picture", field) from None
    if not 0 < width * height <= max_pixels:
        raise InvalidRequest(
            f"{field}: a picture has 1 to {max_pixels} pixels here, got {width} x {height}", field
        )


def _png(data: bytes) -> tuple[int, int]:
    if data[:16] != b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" or b"IEND\xaeB`\x82" not in _tail(data):
        raise _BrokenPictureError
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def _jpeg(data: bytes) -> tuple[int, int]:
    if data[:2] != b"\xff\xd8" or b"\xff\xd9" not in _tail(data):
        raise _BrokenPictureError
    for marker, at in _jpeg_segments(data):
        if 0xC0 <= marker <= 0xCF and marker not in _NO_SIZE:
            height, width = struct.unpack_from(">HH", data, at + 3)
            return width, height
    raise _BrokenPictureError


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Marker and place of each segment before the pixels."""
    at = 2
    for _ in range(_MAX_BLOCKS):
        if data[at] != 0xFF:
            return
        if data[at + 1] == 0xFF:  # a byte to fill up
            at += 1
            continue
        if data[at + 1] == 0xDA:  # the pixels
            return
        yield data[at + 1], at + 2
        (length,) = struct.unpack_from(">H", data, at + 2)
        at += 2 + length


def _webp(data: bytes) -> tuple[int, int]:
    (size,) = struct.unpack_from("<I", data, 4)
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < size + 8:
        raise _BrokenPictureError
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and data[20] == 0x2F:
        (packed,) = struct.unpack_from("<I", data, 21)
        return 1 + (packed & 0x3FFF), 1 + (packed >> 14 & 0x3FFF)
    raise _BrokenPictureError


def _gif(data: bytes) -> tuple[int, int]:
    if data[:6] not in (b"GIF87a", b"GIF89a") or not data.rstrip(b"\0").endswith(b";"):
        raise _BrokenPictureError
    width, height = struct.unpack_from("<HH", data, 6)
    at = 13 + _table_bytes(data[10])
    for _ in range(_MAX_BLOCKS):
        if data[at] == 0x2C:  # the first frame, which may reach beyond what the header says
            left, top, wide, high = struct.unpack_from("<HHHH", data, at + 1)
            return max(width, left + wide), max(height, top + high)
        if data[at] != 0x21:
            break
        at = _after_blocks(data, at + 2)
    raise _BrokenPictureError


def _after_blocks(data: bytes, at: int) -> int:
    """Where a GIF goes on after an extension's blocks, the last of which is empty."""
    for _ in range(_MAX_BLOCKS):
        if not data[at]:
            return at + 1
        at += 1 + data[at]
    raise _BrokenPictureError


def _table_bytes(flags: int) -> int:
    """Of a GIF's table of colours."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _tail(data: bytes) -> bytes:
    return data[-_TAIL_BYTES:]


_SIZES: dict[str, Callable[[bytes], tuple[int, int]]] = {
    "png": _png,
    "jpeg": _jpeg,
    "webp": _webp,
    "gif": _gif,
}
"""By type: checks that a picture is whole, as far as its marks say, and gives width and height."""
