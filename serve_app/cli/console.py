"""What the `atlas` commands share: the terminal, their options, and how they fail."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from serve_app.config import AtlasConfig, load_config
from serve_app.errors import ConfigError

console = Console()

DEFAULT_URL = "http://127.0.0.1:8000"

DEFAULT_CONFIG = Path("atlas.yaml")
"""What `atlas init` writes, and what other commands read unless they are told otherwise."""

ConfigOption = Annotated[
    Path,
    typer.Option(
        "--config",
        help="Configuration file of the deployment.",
        default_factory=lambda: DEFAULT_CONFIG,
        show_default=str(DEFAULT_CONFIG),
    ),
]
NanoConfigOption = Annotated[
    Path, typer.Option("--config", help="Configuration file of the deployment.")
]
"""Of commands that are tried on the nano pool as a rule; they name their own default."""
UrlOption = Annotated[
    str, typer.Option("--url", envvar="ATLAS_URL", help="Where the gateway listens.")
]
KeyOption = Annotated[
    str, typer.Option("--api-key", envvar="ATLAS_API_KEY", help="API key, where one is required.")
]


def fail(message: str) -> typer.Exit:
    """Print why, and give what to raise."""
    console.print(f"[red]error:[/red] {message}", highlight=False)
    return typer.Exit(1)


def next_try(retry_unix_s: float | None) -> str:
    """When what failed is tried again, in words."""
    left_s = 0.0 if retry_unix_s is None else retry_unix_s - time.time()
    return "being tried again" if left_s < 1 else f"tried again in {left_s:.0f} s"


def load(path: Path) -> AtlasConfig:
    """The configuration in a file.

    Raises:
        typer.Exit: If it cannot work; the reason is printed.
    """
    if path == DEFAULT_CONFIG and not path.exists():
        raise fail(f"there is no {path} here; `atlas init` writes one, --config names another file")
    try:
        return load_config(path)
    except ConfigError as error:
        raise fail(error.message) from None


@contextmanager
def api_errors(url: str) -> Iterator[None]:
    """Turns what the client raises into a line and an exit."""
    import openai

    try:
        yield
    except openai.APIStatusError as error:
        body = error.body if isinstance(error.body, dict) else {}
        raise fail(f"{body.get('message', error.message)} ({error.status_code})") from None
    except openai.APIConnectionError:
        raise fail(f"nothing answers at {url}; is `atlas serve` running?") from None
    except openai.APIError as error:
        raise fail(error.message) from None


class AdminClient:
    """The admin API of a gateway."""

    def __init__(self, url: str, api_key: str) -> None:
        import openai

        self._url = url
        self._client = openai.OpenAI(base_url=f"{url}/v1/admin", api_key=api_key)

    def call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """One call.

        Raises:
            typer.Exit: If it is refused, or nobody answers; the reason is printed.
        """
        client = self._client
        with api_errors(self._url):
            if method == "GET":
                answer: Any = client.get(path, cast_to=object)
            elif method == "DELETE":
                answer = client.delete(path, cast_to=object)
            elif method == "POST":
                answer = client.post(path, cast_to=object, body=body)
            elif method == "PUT":
                answer = client.put(path, cast_to=object, body=body)
            else:
                answer = client.patch(path, cast_to=object, body=body)
        return dict(answer)
