"""Definitions of MCP servers' functions: what is accepted when, in both databases."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from serve_app.errors import Conflict, NotFound
from serve_app.store import Store, accept_definition, mcp_definitions, note_definitions

A, B, C = "a" * 64, "b" * 64, "c" * 64


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[Store]:
    opened = await Store.open(store_url)
    yield opened
    await opened.close()


async def note(store: Store, *, accept: bool = True, **hashes: str) -> list[str]:
    listed = {name: (sha256, f"says {sha256[0]}") for name, sha256 in hashes.items()}
    return await note_definitions(store, "srv", listed, accept=accept)


async def states(store: Store) -> dict[str, str]:
    return {row.function: row.state for row in await mcp_definitions(store)}


async def test_what_the_file_names_is_accepted_when_it_is_first_seen_and_never_again(
    store: Store,
) -> None:
    assert await note(store, one=A, two=A) == []
    assert await states(store) == {"one": "accepted", "two": "accepted"}
    assert await note(store, one=B, two=A, three=A) == ["one", "three"]
    assert await states(store) == {"one": "changed", "two": "accepted", "three": "new"}
    assert await note(store, one=B, two=A, three=A) == []  # told once


async def test_what_an_admin_added_is_accepted_by_an_admin_alone(store: Store) -> None:
    assert await note(store, accept=False, one=A) == ["one"]
    assert await note(store, accept=True, two=A) == ["two"]
    assert await states(store) == {"one": "new", "two": "new"}


async def test_an_admin_accepts_what_was_looked_at(store: Store) -> None:
    await note(store, one=A)
    await note(store, one=B)
    (row,) = await mcp_definitions(store)
    assert (row.seen, row.accepted, row.description) == (B, A, "says b")
    with pytest.raises(Conflict, match="changed since"):
        await accept_definition(store, "srv", "one", C)
    with pytest.raises(NotFound):
        await accept_definition(store, "srv", "other", B)
    await accept_definition(store, "srv", "one", B)
    assert await states(store) == {"one": "accepted"}


async def test_a_definition_that_comes_back_is_accepted_still(store: Store) -> None:
    await note(store, one=A)
    await note(store, one=B)
    assert await note(store, one=A) == []
    assert await states(store) == {"one": "accepted"}
