"""Tools of MCP servers: the session, its transports, and what a server may say."""
