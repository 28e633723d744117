"""The store: API keys, outcomes, feedback; SQLite by default, PostgreSQL on a cluster."""

from serve_app.store.database import Store
from serve_app.store.feedback import add_feedback
from serve_app.store.keys import (
    ApiKey,
    Scope,
    create_key,
    find_key,
    hash_key,
    list_keys,
    revoke_key,
)
from serve_app.store.outcomes import OutcomeLog

__all__ = [
    "ApiKey",
    "OutcomeLog",
    "Scope",
    "Store",
    "add_feedback",
    "create_key",
    "find_key",
    "hash_key",
    "list_keys",
    "revoke_key",
]
