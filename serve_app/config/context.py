"""Conversations that are longer than a model's context."""

from __future__ import annotations

from pydantic import Field

from serve_app.config.base import BaseConfig


class ContextConfig(BaseConfig):
    """How a conversation is made to fit the context of the model that answers."""

    fit: bool = True
    """Whether it is shortened: long tool results, then the oldest turns. Otherwise one that is too
    long goes to a model with a longer context, or is refused."""
    fill: float = Field(default=0.8, gt=0, le=1)
    """Share of the prompt's room that a conversation takes after turns were left out; small models
    find less in a long prompt."""
    summarizer: str | None = None
    """Model that sums up the turns that are left out, for every model. `None`: the sentences that
    share words with the question are kept instead, at no cost."""
