"""The pool as an MCP server: `/mcp`, behind the same edge as every other route."""
