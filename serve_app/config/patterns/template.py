"""Templates: text with references such as `{{found}}`, which are filled once.

A template has no expressions. What is filled in is text: references in it are not filled again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

_REFERENCE = re.compile(r"\{\{([^{}]*)\}\}")
_CONTROL = dict.fromkeys([*range(9), 11, 12, *range(14, 32)], " ")
"""Control characters other than blanks; each takes 6 bytes in JSON."""
_PATH = re.compile(r"[a-z][a-z0-9_]*(\.[A-Za-z0-9_]+)*")


class Reference(NamedTuple):
    """A name, and a path into what the name stands for."""

    name: str
    """Id of a node, or a word such as `question`."""
    path: tuple[str, ...] = ()
    """`count`, `status`, or `data` and keys of it; empty: the text."""

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read `name` or `name.path`.

        Raises:
            ValueError: If it is neither.
        """
        if not _PATH.fullmatch(text):
            raise ValueError(f"{text!r} is no reference; write a node's id, or id.count")
        name, *path = text.split(".")
        return cls(name, tuple(path))

    def __str__(self) -> str:
        """As it is written."""
        return ".".join((self.name, *self.path))


@dataclass(frozen=True)
class Template:
    """A text with its references found."""

    parts: tuple[str | Reference, ...]

    @classmethod
    def parse(cls, text: str) -> Template:
        """Find the references of a text.

        Raises:
            ValueError: If there is a `{{` without a reference.
        """
        parts: list[str | Reference] = []
        end = 0
        for match in _REFERENCE.finditer(text):
            parts += [text[end : match.start()], Reference.parse(match[1].strip())]
            end = match.end()
        parts.append(text[end:])
        for part in parts:
            if isinstance(part, str) and "{{" in part:
                raise ValueError(f"'{{{{' without a reference in {part[:40]!r}")
        return cls(tuple(part for part in parts if part != ""))

    @property
    def references(self) -> Iterator[Reference]:
        """Every reference, in its order."""
        return (part for part in self.parts if isinstance(part, Reference))

    @property
    def literal_bytes(self) -> int:
        """Bytes of what is no reference."""
        return sum(len(part.encode()) for part in self.parts if isinstance(part, str))

    def fill(self, value_of: Callable[[Reference], str]) -> str:
        """The text with each reference's value in its place."""
        return "".join(part if isinstance(part, str) else value_of(part) for part in self.parts)


def references_in(value: Any) -> Iterator[Reference]:
    """References in all strings of a JSON value."""
    if isinstance(value, str):
        yield from Template.parse(value).references
    elif isinstance(value, dict):
        for inner in value.values():
            yield from references_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from references_in(inner)


def filled(value: Any, value_of: Callable[[Reference], str]) -> Any:
    """A JSON value with the references of its strings filled."""
    if isinstance(value, str):
        return Template.parse(value).fill(value_of)
    if isinstance(value, dict):
        return {key: filled(inner, value_of) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [filled(inner, value_of) for inner in value]
    return value


def cut(text: str, max_bytes: int) -> str:
    """A text with no more than so many bytes of UTF-8, and without control characters."""
    encoded = text.translate(_CONTROL).encode("utf-8", "replace")
    return encoded[:max_bytes].decode("utf-8", "ignore")
