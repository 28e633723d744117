"""An MCP server that counts: `charge` writes its order into a file, in one piece, then answers.

How to run: `python -m benchmarks.tools.counter PORT FILE`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from mcp.server.mcpserver import MCPServer

AFTER_S = 0.05
"""Between the effect and the answer: what dies then has acted, and does not know."""

SLOW = "slow"
"""Orders that begin so are charged and not answered."""
FOREVER_S = 3600.0


def main() -> None:
    """Serve until it is ended."""
    port, path = int(sys.argv[1]), Path(sys.argv[2])
    book = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    server = MCPServer("till")

    @server.tool()
    async def charge(order: str) -> str:
        """Charge the customer for an order."""
        os.write(book, f"{order}\n".encode())
        await asyncio.sleep(FOREVER_S if order.startswith(SLOW) else AFTER_S)
        return f"order {order} is paid"

    server.run("streamable-http", host="127.0.0.1", port=port)


if __name__ == "__main__":
    main()
