"""What every HTTP request passes before a handler sees it: bytes, keys, load, routes."""
