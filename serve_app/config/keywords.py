"""From keywords to one RE2 expression, whose time is linear in the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import re2

_MAX_MEM = 64 << 20
"""Bytes of one expression at most; 10,000 keywords take a few MiB."""
_NO_WORD_BEFORE = r"(?:^|[^\pL\pN_])"
_NO_WORD_AFTER = r"(?:$|[^\pL\pN_])"


def keyword_expression(
    literals: Sequence[str], expressions: Sequence[str], *, case_sensitive: bool
) -> Any:
    """An expression that is found where one of the keywords is.

    Args:
        literals: Words and phrases; found as whole words, and with any blanks between their words.
        expressions: RE2 expressions.
        case_sensitive: Whether case counts.

    Raises:
        ValueError: If together they are too large.
    """
    parts = [f"(?:{expression})" for expression in expressions]
    by_edges: dict[tuple[str, str], list[str]] = {}
    for literal in literals:
        words = literal.split()
        edges = (
            _NO_WORD_BEFORE if _is_word(words[0][0]) else "",
            _NO_WORD_AFTER if _is_word(words[-1][-1]) else "",
        )
        by_edges.setdefault(edges, []).append(r"\s+".join(map(re2.escape, words)))
    parts += [
        f"{before}(?:{'|'.join(found)}){after}" for (before, after), found in by_edges.items()
    ]
    options = re2.Options()
    options.log_errors = False
    options.case_sensitive = case_sensitive
    options.max_mem = _MAX_MEM
    try:
        return re2.compile("|".join(parts), options)
    except re2.error as error:
        said = error.args[0] if error.args else ""
        why = said.decode("utf-8", "replace") if isinstance(said, bytes) else said
        raise ValueError(f"these keywords are too much for one rule: {why}") from None


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"
