"""A query as it is compared with functions: of a path or an address only the kind counts.

The encoder takes a text for what its rare words are about: `beach.jpg` is about the sea. Which
function is asked for depends on it being a picture.
"""

from __future__ import annotations

import re

_MEDIA = {
    "image": ("gif", "jpeg", "jpg", "png", "svg", "webp"),
    "audio": ("flac", "mp3", "ogg", "wav"),
    "video": ("avi", "mkv", "mov", "mp4"),
}
_KINDS = {ending: f"the {kind} file" for kind, endings in _MEDIA.items() for ending in endings}
_ADDRESS = re.compile(r"(?:https?://|www\.)\S+|[\w.-]+\.(?:com|net|org)(?:/\S*)?")
_FILE = re.compile(r"[\w~./*-]*[\w*]\.([A-Za-z][A-Za-z0-9]{1,4})")
_FOLDER = re.compile(r"(?:~|\.{0,2})/\S*|\S+/")
_AROUND = "\"'()[]<>,:;!?"
_MAX_CHARS = 200
"""A longer word is no path."""


def as_read(text: str) -> str:
    """A text with `the URL`, `the folder`, or `the image file` in the place of a name of one.

    Args:
        text: What a user wrote.
    """
    return " ".join(map(_read, text.split()))


def _read(word: str) -> str:
    name = word.rstrip(f"{_AROUND}.").lstrip(_AROUND)
    if not name or len(name) > _MAX_CHARS:
        return word
    if _ADDRESS.fullmatch(name):
        kind = "the URL"
    elif file := _FILE.fullmatch(name):
        kind = _KINDS.get(file[1].lower(), "the text file")
    elif _FOLDER.fullmatch(name):
        kind = "the folder"
    else:
        return word
    return word.replace(name, kind)
