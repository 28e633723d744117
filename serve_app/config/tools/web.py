"""Settings of the tools that read the web: pages by their address, and a search engine."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from serve_app.config.tools.base import MAX_DESCRIPTION_CHARS, ToolSettings

PLAIN_URL_PATTERN = r"^https?://[A-Za-z0-9._\[\]:-]+(/[A-Za-z0-9._~/-]*)?$"
"""An address without a user, a query, or anything that two readers could read in two ways."""

AllowedHost = Annotated[
    str,
    Field(
        pattern=r"^([A-Za-z0-9_]([A-Za-z0-9._-]{0,251}[A-Za-z0-9_])?|\[[0-9A-Fa-f:.]{2,45}\])"
        r"(:[1-9][0-9]{0,4})?$"
    ),
]
Port = Annotated[int, Field(ge=1, le=65535)]


class WebSettings(ToolSettings):
    """What tools have that connect to addresses."""

    allow: tuple[AllowedHost, ...] = Field(default=(), max_length=256)
    """Hosts that may have private and loopback addresses: `search.internal`, `10.0.0.5:8080`,
    `[fd00::5]:8080`. With a port: at that port too. Link-local and metadata addresses stay
    refused."""

    ports: tuple[Port, ...] = (80, 443)
    """Ports that may be connected to, beside those that `allow` names."""

    max_bytes: int = Field(default=2 << 20, ge=1024, le=64 << 20)
    """Largest body that is read, both as sent and decompressed."""


class FetchConfig(WebSettings):
    """Reads a page of the web as text."""

    type: Literal["fetch"] = "fetch"
    kind: Literal["function"] = "function"
    description: str = Field(
        default="Read the web page at an address as text.", max_length=MAX_DESCRIPTION_CHARS
    )
    timeout_s: float = Field(default=20.0, gt=0, le=3600)
    """Longest run of one call, in seconds; a caller's shorter deadline wins. A page of a megabyte
    takes some seconds to read."""


class WebSearchConfig(WebSettings):
    """Asks a SearXNG server, whose settings allow the format `json`."""

    type: Literal["web_search"] = "web_search"
    kind: Literal["function", "context"] = "function"
    """`function` offers the search to the model; `context` searches before it generates."""

    description: str = Field(
        default="Search the web and return titles, addresses and excerpts of pages.",
        max_length=MAX_DESCRIPTION_CHARS,
    )
    base_url: str = Field(pattern=PLAIN_URL_PATTERN, max_length=2000)
    """Address of the server, `http://search.internal:8080`; allowed by being named here."""

    categories: tuple[Annotated[str, Field(pattern=r"^[\w &+-]{1,64}$")], ...] = ("general",)
    """Categories that are searched."""

    language: str = Field(default="all", pattern=r"^(all|auto|[A-Za-z]{2,3}(-[A-Za-z]{2,4})?)$")
    """Language of the results: `all`, `auto`, or a code such as `en` or `de-CH`."""

    num_results: int = Field(default=5, ge=1, le=50)
    """Results returned."""
