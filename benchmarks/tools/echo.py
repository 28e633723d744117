"""An MCP server with one function, which answers at once.

How to run: `python -m benchmarks.tools.echo stdio`, or `http PORT` for one on loopback.
"""

from __future__ import annotations

import sys

from mcp.server.mcpserver import MCPServer


def main() -> None:
    """Serve until it is ended."""
    server = MCPServer("echo")

    @server.tool()
    async def echo(text: str) -> str:
        """Say it again."""
        return text

    if sys.argv[1] == "stdio":
        server.run("stdio")
    else:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[2]))


if __name__ == "__main__":
    main()
