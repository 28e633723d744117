"""What `code_catalog.json` holds: the code that nano-code learns to write, and how it is asked for.

References, which compute the same results another way, live beside the generators; a test runs
every body of the catalogue against its reference.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

CATALOG_PATH = Path(__file__).with_name("code_catalog.json")

NUM_HELD_OUT = 2
"""Wordings of each function and value kind, counted from the end, that training never sees."""


@cache
def _catalog() -> dict[str, dict[str, Any]]:
    document: dict[str, dict[str, Any]] = json.loads(CATALOG_PATH.read_text(encoding="utf-8"))
    return document


def code(part: str, kind: str) -> str:
    """The code of a function (`body`), value kind or reduce (`code`), as one text."""
    entry = _catalog()[part][kind]
    return "\n".join(entry["body"] if "body" in entry else entry["code"])


def text(part: str, kind: str, key: str) -> str:
    """A single text of an entry, for example the `parameters` of a function."""
    return str(_catalog()[part][kind][key])


def wordings(part: str, kind: str, key: str) -> tuple[str, ...]:
    """The wordings of an entry under `key`; the held-out ones come last."""
    return tuple(_catalog()[part][kind][key])
