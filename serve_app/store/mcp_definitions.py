"""Which definitions of MCP servers' functions were seen, and which may be offered."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import insert, select, update

from serve_app.errors import Conflict, NotFound
from serve_app.store.database import Store
from serve_app.store.tables import McpDefinitionRow


@dataclass(frozen=True, slots=True)
class McpDefinition:
    """One function of a server."""

    tool_id: str
    function: str
    """The server's own name."""
    seen: str
    """Hash of the definition that the server listed last."""
    accepted: str | None
    """Hash of the one that may be offered; `None`: none yet."""
    description: str
    seen_unix_s: float

    @property
    def state(self) -> str:
        """`accepted`; `changed` since it was; or `new`."""
        if self.accepted is None:
            return "new"
        return "accepted" if self.accepted == self.seen else "changed"


async def mcp_definitions(store: Store) -> list[McpDefinition]:
    """Every function that any server was seen with.

    Raises:
        StoreError: If the store is away.
    """
    query = select(McpDefinitionRow.__table__).order_by(
        McpDefinitionRow.tool_id, McpDefinitionRow.function
    )
    async with store.begin() as connection:
        rows = (await connection.execute(query)).mappings().all()
    return [McpDefinition(**row) for row in rows]


async def note_definitions(
    store: Store, tool_id: str, listed: Mapping[str, tuple[str, str]], *, accept: bool
) -> list[str]:
    """Note what a server lists, where it differs from what was seen before.

    Args:
        store: The store.
        tool_id: The server.
        listed: Of each function its name to the hash of its definition, and its description.
        accept: Whether all of it may be offered, if the server was never seen before.

    Returns:
        Functions that may not be offered because of what changed.

    Raises:
        StoreError: If the store is away.
    """
    table, now = McpDefinitionRow, time.time()
    refused = []
    async with store.begin() as connection:
        query = select(table.function, table.seen, table.accepted).where(table.tool_id == tool_id)
        known = {row.function: row for row in (await connection.execute(query)).all()}
        accept = accept and not known
        for function, (seen, description) in listed.items():
            before = known.get(function)
            if before is not None and before.seen == seen:
                continue
            said = {"seen": seen, "description": description, "seen_unix_s": now}
            if before is None:
                row = {"tool_id": tool_id, "function": function, **said}
                row["accepted"] = seen if accept else None
                await connection.execute(insert(table).values(row))
            else:
                here = (table.tool_id == tool_id) & (table.function == function)
                await connection.execute(update(table).where(here).values(said))
            if not accept and (before is None or before.accepted != seen):
                refused.append(function)
    return refused


async def accept_definition(store: Store, tool_id: str, function: str, sha256: str) -> None:
    """Let a function be offered as the server lists it now.

    Args:
        store: The store.
        tool_id: The server.
        function: The server's own name of it.
        sha256: Hash of the definition that was looked at.

    Raises:
        NotFound: If the server was never seen with such a function.
        Conflict: If the server lists another definition by now.
        StoreError: If the store is away.
    """
    table = McpDefinitionRow
    here = (table.tool_id == tool_id) & (table.function == function)
    async with store.begin() as connection:
        seen = (await connection.execute(select(table.seen).where(here))).scalar()
        if seen is None:
            raise NotFound(f"the server {tool_id!r} has no function {function!r}")
        if seen != sha256:
            raise Conflict(f"{function!r} has changed since: its definition is {seen} now")
        await connection.execute(update(table).where(here).values(accepted=seen))
