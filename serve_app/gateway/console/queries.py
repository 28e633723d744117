"""What the address of a page asks for: a time to look at, and which requests."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlencode

from serve_app.errors import InvalidRequest
from serve_app.schemas import DecidedBy, Pair
from serve_app.store.request_lists import RequestFilter
from serve_app.store.sums import DAY_S, TRAFFIC_S

_HOUR_S = 3600


@dataclass(frozen=True, slots=True)
class Window:
    """A time up to now, and the width of the intervals it is shown in."""

    name: str
    label: str
    length_s: int
    width_s: int

    def began_s(self, now_s: float) -> int:
        """Where its first interval begins."""
        return int((now_s - self.length_s) // self.width_s) * self.width_s


OVERVIEW_WINDOWS = (
    Window("1h", "last hour", _HOUR_S, TRAFFIC_S),
    Window("1d", "last day", DAY_S, 3 * TRAFFIC_S),
    Window("7d", "last 7 days", 7 * DAY_S, 2 * _HOUR_S),
)
DAY_WINDOWS = (
    Window("7d", "last 7 days", 7 * DAY_S, DAY_S),
    Window("30d", "last 30 days", 30 * DAY_S, DAY_S),
    Window("365d", "last year", 365 * DAY_S, DAY_S),
)
SINCE = (
    Window("any", "any time", 0, 1),
    Window("1h", "last hour", _HOUR_S, 1),
    Window("1d", "last day", DAY_S, 1),
    Window("7d", "last 7 days", 7 * DAY_S, 1),
)


def window_of(query: Mapping[str, str], windows: tuple[Window, ...], default: int) -> Window:
    """The window that an address asks for.

    Raises:
        InvalidRequest: If there is none of that name.
    """
    name = query.get("window") or windows[default].name
    for window in windows:
        if window.name == name:
            return window
    raise InvalidRequest(f"window: one of {', '.join(window.name for window in windows)}", "window")


@dataclass(frozen=True, slots=True)
class RequestQuery:
    """The filters of the list of requests, as an address has them."""

    candidate: str = ""
    path: str = ""
    owner: str = ""
    status: str = ""
    window: str = ""
    min_usd: str = ""
    before: str = ""

    @classmethod
    def of(cls, query: Mapping[str, str]) -> RequestQuery:
        """Read an address."""
        return cls(**{name: query.get(name, "").strip()[:200] for name in cls.__slots__})

    def filter(self) -> RequestFilter:
        """What it asks of the store.

        Raises:
            InvalidRequest: If a filter cannot be read.
        """
        window = window_of({"window": self.window}, SINCE, 0)
        if self.path and self.path not in set(DecidedBy):
            raise InvalidRequest(f"path: one of {', '.join(DecidedBy)}", "path")
        if self.status not in ("", "failed", "answered"):
            raise InvalidRequest("status: failed or answered", "status")
        return RequestFilter(
            since_unix_s=time.time() - window.length_s if window.length_s else 0.0,
            pair=Pair.parse(self.candidate) if self.candidate else None,
            path=self.path or None,
            owner=self.owner or None,
            has_failed=None if not self.status else self.status == "failed",
            min_cost_usd=_number(self.min_usd, "min_usd") if self.min_usd else None,
            before=self._before(),
        )

    def _before(self) -> tuple[float, str] | None:
        at, _, request_id = self.before.partition("_")
        return (_number(at, "before"), request_id) if self.before else None

    def address(self, before: tuple[float, str]) -> str:
        """Of the page with what comes after."""
        values = {name: getattr(self, name) for name in self.__slots__}
        values["before"] = f"{before[0]!r}_{before[1]}"
        return "/console/requests?" + urlencode({n: v for n, v in values.items() if v})


def whole_number(query: Mapping[str, str], name: str) -> int | None:
    """A number that an address names; `None`: it names none.

    Raises:
        InvalidRequest: If it is no whole number.
    """
    text = query.get(name, "")
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise InvalidRequest(f"{name}: a whole number, got {text[:40]!r}", name)
    return int(text)


def _number(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InvalidRequest(f"{name}: a number, got {text[:40]!r}", name)
    return value
