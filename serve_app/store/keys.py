"""API keys: made here, shown once, stored as SHA-256, looked up by that hash."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import delete, insert, or_, select, update

from serve_app.errors import ConfigError, NotFound
from serve_app.schemas import ALL_ACCESS, AccessLists
from serve_app.store.console_tables import ConsoleSessionRow
from serve_app.store.database import Store
from serve_app.store.tables import ApiKeyRow

KEY_PREFIX = "atlas_"


class Scope(StrEnum):
    """What a key may do; no scope implies another."""

    CHAT = "chat"
    """Completions, decisions, the list of models."""
    FEEDBACK = "feedback"
    """Scores for its own requests."""
    ADMIN = "admin"
    """The pool, in detail."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is known of a key."""

    key_id: str
    name: str
    scopes: frozenset[Scope]
    created_unix_s: float
    revoked_unix_s: float | None = None
    lists: AccessLists = ALL_ACCESS
    """Models and tools that its requests may use."""
    limited_unix_s: float | None = None
    """When its limits were changed last; `None`: it has none."""


def hash_key(key: str) -> str:
    """SHA-256 of a key in hex. A key has 256 random bits, so a plain hash cannot be searched."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


async def create_key(
    store: Store, name: str, scopes: Iterable[str], lists: AccessLists = ALL_ACCESS
) -> tuple[str, str]:
    """Make a key.

    Args:
        store: Where it is kept.
        name: Whose or what for, in words; up to 200 characters.
        scopes: What it may do; at least one of `chat`, `feedback`, `admin`.
        lists: Models and tools that its requests may use.

    Returns:
        Key id, and the key itself, which cannot be had again.

    Raises:
        ConfigError: If a scope is unknown, none is given, or the name is empty or too long.
        StoreError: If the store is away.
    """
    wanted = sorted(set(scopes))
    unknown = [scope for scope in wanted if scope not in set(Scope)]
    if unknown or not wanted:
        raise ConfigError(
            f"scopes must be among {[str(s) for s in Scope]}, got {unknown or wanted!r}"
        )
    if not name.strip() or len(name) > 200:
        raise ConfigError(f"a key's name has 1 to 200 characters, got {len(name)}")
    key_id = "key_" + secrets.token_hex(8)
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    async with store.begin() as connection:
        await connection.execute(
            insert(ApiKeyRow).values(
                key_id=key_id,
                key_hash=hash_key(key),
                name=name,
                scopes=" ".join(wanted),
                lists={of: sorted(names) for of, names in lists._asdict().items() if names} or None,
                created_unix_s=time.time(),
            )
        )
    return key_id, key


async def list_keys(store: Store) -> list[ApiKey]:
    """All keys, revoked ones too, oldest first.

    Raises:
        StoreError: If the store is away.
    """
    async with store.begin() as connection:
        rows = await connection.execute(
            _KEY_COLUMNS.order_by(ApiKeyRow.created_unix_s, ApiKeyRow.key_id)
        )
        return [_api_key(*row) for row in rows]


async def revoke_key(store: Store, key_id: str) -> None:
    """End a key; gateways notice within their cache's few seconds. Revoking again changes nothing.

    Raises:
        NotFound: If there is no such key.
        StoreError: If the store is away.
    """
    async with store.begin() as connection:
        known = await connection.scalar(select(ApiKeyRow.key_id).where(ApiKeyRow.key_id == key_id))
        if known is None:
            raise NotFound(f"no API key {key_id!r}")
        await connection.execute(
            update(ApiKeyRow)
            .where(ApiKeyRow.key_id == key_id, ApiKeyRow.revoked_unix_s.is_(None))
            .values(revoked_unix_s=time.time())
        )


async def find_key(store: Store, key_hash: str) -> ApiKey | None:
    """The key with this hash, unless it is unknown or revoked.

    Args:
        store: Where keys are kept.
        key_hash: Of the key, or of the cookie of a session that stands for it.

    Raises:
        StoreError: If the store is away.
    """
    session = select(ConsoleSessionRow.key_id).where(
        ConsoleSessionRow.session_hash == key_hash, ConsoleSessionRow.expires_unix_s > time.time()
    )
    is_meant = or_(ApiKeyRow.key_hash == key_hash, ApiKeyRow.key_id.in_(session))
    async with store.begin() as connection:
        row = (await connection.execute(_KEY_COLUMNS.where(is_meant))).first()
    key = _api_key(*row) if row is not None else None
    return key if key is not None and key.revoked_unix_s is None else None


async def begin_session(store: Store, key_id: str, lasts_s: float) -> str:
    """Let a browser stand for a key for a while, without keeping the key.

    Returns:
        What the browser shows from then on; only its hash is stored.

    Raises:
        StoreError: If the store is away.
    """
    token, now_s = secrets.token_urlsafe(32), time.time()
    row = {
        "session_hash": hash_key(token),
        "key_id": key_id,
        "expires_unix_s": now_s + lasts_s,
    }
    async with store.begin() as connection:
        is_over = ConsoleSessionRow.expires_unix_s <= now_s
        await connection.execute(delete(ConsoleSessionRow).where(is_over))
        await connection.execute(insert(ConsoleSessionRow).values(row))
    return token


async def end_session(store: Store, token: str) -> None:
    """End a session; gateways notice within their cache's few seconds.

    Raises:
        StoreError: If the store is away.
    """
    this = ConsoleSessionRow.session_hash == hash_key(token)
    async with store.begin() as connection:
        await connection.execute(delete(ConsoleSessionRow).where(this))


_KEY_COLUMNS = select(
    ApiKeyRow.key_id,
    ApiKeyRow.name,
    ApiKeyRow.scopes,
    ApiKeyRow.created_unix_s,
    ApiKeyRow.revoked_unix_s,
    ApiKeyRow.lists,
    ApiKeyRow.limited_unix_s,
)


def _api_key(
    key_id: str,
    name: str,
    scopes: str,
    created: float,
    revoked: float | None,
    lists: dict[str, list[str]] | None,
    limited: float | None,
) -> ApiKey:
    access = AccessLists(**{of: frozenset(names) for of, names in (lists or {}).items()})
    of = frozenset(map(Scope, scopes.split()))
    return ApiKey(key_id, name, of, created, revoked, access, limited)
