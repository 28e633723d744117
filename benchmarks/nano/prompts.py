"""The prompts that patterns send to nano models; training reads the same files, so both agree."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

PROMPTS_DIR = Path(__file__).parents[2] / "configs" / "patterns" / "prompts"
_SLOT = re.compile(r"\{\{([\w.]+)\}\}")


@cache
def template(name: str) -> str:
    """The text of `configs/patterns/prompts/<name>.md`, with its slots."""
    return (PROMPTS_DIR / f"{name}.md").read_text(encoding="utf-8")


def prompt(name: str, **slots: str) -> str:
    """A prompt with every slot `{{name}}` filled; what fills one is not read for slots again."""
    return _SLOT.sub(lambda slot: slots[slot[1]], template(name))
