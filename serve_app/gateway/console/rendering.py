"""From values to a page.

The templates escape all that they are given, and the headers keep a browser from running anything
but our own files.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import Response

from serve_app.errors import Unauthorized
from serve_app.gateway.console.assets import Asset
from serve_app.gateway.edge.errors import error_body, error_response

PAGE_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
}

NOTHING = "-"
"""Stands for a value that is not there."""

NAVIGATION = (
    ("overview", "/console", "Overview"),
    ("requests", "/console/requests", "Requests"),
    ("routing", "/console/routing", "Routing"),
    ("policies", "/console/policies", "Policies"),
    ("pool", "/console/pool", "Pool"),
    ("spend", "/console/spend", "Spend"),
    ("ask", "/console/ask", "Ask"),
)


class Renderer:
    """Makes pages of templates."""

    def __init__(self, assets: dict[str, Asset], *, asks_for_keys: bool) -> None:
        """Read the templates when they are first needed.

        Args:
            assets: The files that pages name, by name.
            asks_for_keys: Whether there are sessions that can be ended.
        """
        self._templates = Environment(
            loader=FileSystemLoader(Path(__file__).parent / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters |= {
            "count": shown_count,
            "json": lambda value: orjson.dumps(value, default=str).decode(),
            "pretty": lambda value: orjson.dumps(
                value, default=str, option=orjson.OPT_INDENT_2
            ).decode(),
            "seconds": shown_seconds,
            "share": shown_share,
            "time": shown_time,
            "usd": shown_usd,
        }
        self._templates.globals |= {
            "asset": {name: asset.url for name, asset in assets.items()},
            "navigation": NAVIGATION,
            "asks_for_keys": asks_for_keys,
        }

    def page(self, name: str, *, status: int = 200, **values: Any) -> Response:
        """A page of the template of that name."""
        text = self._templates.get_template(f"{name}.html").render(name=name, **values)
        body = text.encode("utf-8", "replace")  # a lone surrogate is no reason to fail
        return Response(body, status, PAGE_HEADERS, "text/html")

    def refusal(self, error: BaseException) -> Response:
        """The page for an error; who has no session is asked for a key in its place."""
        plain = error_response(error)
        if isinstance(error, Unauthorized):
            return self.page("login", status=401)
        message = error_body(error)["error"]["message"]
        response = self.page("error", status=plain.status_code, message=message)
        if "retry-after" in plain.headers:
            response.headers["retry-after"] = plain.headers["retry-after"]
        return response


def shown_usd(value: float | None) -> str:
    """Dollars, with three digits that count."""
    if value is None:
        return NOTHING
    if value == 0:
        return "$0"
    places = max(2, 2 - math.floor(math.log10(abs(value)))) if abs(value) < 1 else 2
    return f"${value:,.{min(places, 9)}f}"


def shown_seconds(value: float | None) -> str:
    """A time that something took."""
    if value is None:
        return NOTHING
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def shown_share(value: float | None) -> str:
    """A share of 1 in percent."""
    return NOTHING if value is None else f"{value * 100:.1f}%"


def shown_count(value: float | None) -> str:
    """A whole number."""
    return NOTHING if value is None else f"{value:,.0f}"


def shown_time(unix_s: float | None) -> str:
    """A moment, in UTC."""
    return NOTHING if unix_s is None else f"{datetime.fromtimestamp(unix_s, UTC):%Y-%m-%d %H:%M:%S}"
