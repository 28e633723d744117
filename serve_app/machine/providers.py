"""Models behind APIs with keys.

Only whether an environment variable is set is looked at: a key's value is neither kept nor sent
anywhere, and no provider is asked.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Offer:
    """A model of a provider, and its price as it was known early in 2026."""

    name: str
    usd_per_1m_prompt_tokens: float
    usd_per_1m_completion_tokens: float
    strong: bool = False
    """Whether it is the provider's for hard questions."""


@dataclass(frozen=True)
class Provider:
    """Who takes a key."""

    name: str
    key_variable: str
    base_url: str
    offers: tuple[Offer, ...]
    lists_models: bool = True
    """Whether `GET /models` takes the key as OpenAI's does."""


PROVIDERS = (
    Provider(
        "OpenAI",
        "OPENAI_API_KEY",
        "https://api.openai.com/v1",
        (Offer("gpt-4.1-mini", 0.40, 1.60), Offer("gpt-4.1", 2.00, 8.00, strong=True)),
    ),
    Provider(
        "Anthropic",
        "ANTHROPIC_API_KEY",
        "https://api.anthropic.com/v1",
        (Offer("claude-haiku-4-5", 1.00, 5.00), Offer("claude-sonnet-4-5", 3.00, 15.00, True)),
        lists_models=False,
    ),
    Provider(
        "Google Gemini",
        "GEMINI_API_KEY",
        "https://generativelanguage.googleapis.com/v1beta/openai",
        (Offer("gemini-2.5-flash", 0.30, 2.50), Offer("gemini-2.5-pro", 1.25, 10.00, True)),
    ),
    Provider(
        "Mistral",
        "MISTRAL_API_KEY",
        "https://api.mistral.ai/v1",
        (Offer("mistral-small-latest", 0.10, 0.30),),
    ),
    Provider(
        "Groq",
        "GROQ_API_KEY",
        "https://api.groq.com/openai/v1",
        (
            Offer("llama-3.1-8b-instant", 0.05, 0.08),
            Offer("llama-3.3-70b-versatile", 0.59, 0.79, strong=True),
        ),
    ),
)


def look_at_keys(environment: Mapping[str, str] = os.environ) -> tuple[Provider, ...]:
    """The providers whose key's variable is set."""
    return tuple(provider for provider in PROVIDERS if environment.get(provider.key_variable))
