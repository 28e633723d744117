"""What a message of a conversation holds: text, or parts that are texts and pictures.

Content is a string, or OpenAI's list of parts with `type: text` or `type: image_url`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]
"""As OpenAI writes one."""
Content = str | list[dict[str, Any]] | None

PICTURE_TOKENS = 49_152
"""The most that a picture counts as a prompt's tokens: 32 million pixels in squares of 28 by 28,
or the dearest count of a remote endpoint that we know."""


def text_of_content(content: Content) -> str:
    """The text of some content, its parts one below the other."""
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content if part["type"] == "text")
    return content or ""


def pictures_of(content: Content) -> list[dict[str, Any]]:
    """The parts of some content that are pictures."""
    if isinstance(content, list):
        return [part for part in content if part["type"] == "image_url"]
    return []


def with_pictures(text: str, pictures: list[dict[str, Any]]) -> Content:
    """Content with a text, and pictures after it."""
    return [{"type": "text", "text": text}, *pictures] if pictures else text


BLANK_PICTURE: dict[str, Any] = {
    "type": "image_url",
    "image_url": {
        "url": "data:image/png;base64,"
        "iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAAAAACPAi4CAAAAKUlEQVR42u3MQREAAAwCIPuX1hD77SAA"
        "6VEEAoFAIBAIBAKBQCAQfA8Gpwvw4qrwDDIAAAAASUVORK5CYII="
    },
}
"""A white square, for whoever has to be asked with a picture."""


def last_question(messages: Sequence[Message]) -> Content:
    """The content of the last user message; `None`: there is none."""
    for message in reversed(messages):
        if message["role"] == "user":
            content: Content = message.get("content")
            return content
    return None


def has_pictures(messages: Sequence[Message]) -> bool:
    """Whether there is a picture in a conversation."""
    return any(pictures_of(message.get("content")) for message in messages)


def without_pictures(messages: Sequence[Message]) -> tuple[list[Message], int]:
    """A conversation's text alone, and how many pictures it has."""
    count, told = 0, list(messages)
    for number, message in enumerate(told):
        content = message.get("content")
        if isinstance(content, list):
            count += len(pictures_of(content))
            told[number] = {**message, "content": text_of_content(content)}
    return told, count
