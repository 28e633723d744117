"""atlas-serve: a self-hosted endpoint that routes every request to a (model, tool) pair.

`build_app` is what `serve run serve_app:build_app` imports; it is looked up on demand, so that
reading a configuration does not import Ray.
"""

from typing import Any

from serve_app import environment

__version__ = "0.1.0"

environment.apply()


def __getattr__(name: str) -> Any:
    """Import the graph only when it is asked for."""
    if name == "build_app":
        from serve_app.graph import build_app

        return build_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
