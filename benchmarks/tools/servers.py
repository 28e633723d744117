"""The six MCP servers of the protocol's own project, at the versions that the locks name.

Three are Python packages of the `dev` extra, three npm packages of `tests/npm/package-lock.json`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from serve_app.config.tools import McpConfig

_NPM = Path(__file__).parents[2] / "tests/npm/node_modules/@modelcontextprotocol"
PYTHON = {"time": ("--local-timezone", "UTC"), "git": (), "fetch": ()}
"""Arguments of each Python server."""
NODE = ("everything", "filesystem", "memory")


def what_is_missing() -> str | None:
    """Why the servers cannot be started here; `None`: they can."""
    return missing_of_node() or next(
        (
            f"mcp_server_{name} is not installed: pip install mcp-server-{name}"
            for name in PYTHON
            if importlib.util.find_spec(f"mcp_server_{name}") is None
        ),
        None,
    )


def missing_of_node() -> str | None:
    """Why the npm servers cannot be started here; `None`: they can."""
    if shutil.which("node") is None:
        return "Node is not installed"
    if not all((_NPM / f"server-{name}").is_dir() for name in NODE):
        return "run npm ci --prefix tests/npm"
    return None


def node_server(name: str, folder: Path) -> McpConfig:
    """One of the npm servers.

    Args:
        name: One of `NODE`.
        folder: The files that it may use.
    """
    args = [str(_NPM / f"server-{name}/dist/index.js")]
    if name == "filesystem":
        args.append(str(folder))
    env = {"MEMORY_FILE_PATH": str(folder / "memory.jsonl")} if name == "memory" else {}
    return McpConfig(
        tool_id=name, command=shutil.which("node"), args=tuple(args), env=env, effects="none"
    )


def python_server(name: str) -> McpConfig:
    """One of the Python servers.

    Args:
        name: One of `PYTHON`.
    """
    return McpConfig(
        tool_id=name,
        command=sys.executable,
        args=("-m", f"mcp_server_{name}", *PYTHON[name]),
        env={"PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        effects="none",
    )


def all_servers(folder: Path) -> list[McpConfig]:
    """Each of the six.

    Args:
        folder: The files that they may use.
    """
    return [*map(python_server, PYTHON), *(node_server(name, folder) for name in NODE)]
