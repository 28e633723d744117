"""Keyword rules: words and RE2 expressions in the text, before anything is embedded.

Linear in the text, of which at most `MAX_CHARS` are looked at.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from serve_app.config.rules import KeywordRuleConfig, Scope
from serve_app.content import last_question, text_of_content

MAX_CHARS = 32_000
"""Of a text that are looked at: the first and the last half of them."""

_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})[^\n]*\n?", re.MULTILINE)

Messages = Sequence[dict[str, Any]]


class KeywordRule:
    """One keyword rule, compiled."""

    def __init__(self, config: KeywordRuleConfig) -> None:
        """Compile the keywords."""
        self.config = config
        self._any = config.expression(config.any) if config.any else None
        self._all = tuple(config.expression((word,)) for word in config.all)
        self._none = config.expression(config.none) if config.none else None

    def matches(self, texts: Texts) -> bool:
        """Whether the rule decides for a request."""
        text = texts.of(self.config.scope)
        return (
            (self._any is None or self._any.search(text) is not None)
            and all(word.search(text) is not None for word in self._all)
            and (self._none is None or self._none.search(text) is None)
        )


class Texts:
    """What keyword rules look at in one request; each part is made once."""

    def __init__(self, messages: Messages) -> None:
        """Of OpenAI messages."""
        self._messages = messages
        self._known: dict[tuple[Scope, ...], str] = {}

    def of(self, scope: tuple[Scope, ...]) -> str:
        """The bounded text of some parts."""
        if scope not in self._known:
            self._known[scope] = "\n".join(map(self._part, scope))
        return self._known[scope]

    def _part(self, scope: Scope) -> str:
        if scope == "system":
            said = (of.get("content") for of in self._messages if of.get("role") == "system")
            return _bounded("\n".join(map(text_of_content, said)))
        text = _bounded(text_of_content(last_question(self._messages)))
        return text if scope == "last" else "\n".join(code_blocks(text))


def code_blocks(text: str) -> list[str]:
    """The fenced blocks of code in a text; one that is not closed goes to the end."""
    blocks: list[str] = []
    opened: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if opened is None:
            opened = fence
        elif fence[1].startswith(opened[1]):
            blocks.append(text[opened.end() : fence.start()])
            opened = None
    if opened is not None:
        blocks.append(text[opened.end() :])
    return blocks


def _bounded(text: str) -> str:
    if len(text) > MAX_CHARS:
        half = MAX_CHARS // 2
        text = f"{text[:half]}\n{text[-half:]}"
    # RE2 reads UTF-8, which has no lone surrogates.
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
