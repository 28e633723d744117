"""What callers see while the pool changes, processes die and nodes come and go."""

import serve_app  # noqa: F401  # sets what Ray reads from the environment, before Ray is imported
