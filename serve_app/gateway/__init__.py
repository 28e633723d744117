"""HTTP in and out: routes, authentication, limits, streaming, and errors as status codes."""
