"""The table of routes: who may call each of them, the handler it leads to, what that answers.

There is one table and one pattern per route: the route whose rule the edge checks is the route
whose handler it calls. A path or a method that the table does not have is refused before any
handler sees it.
"""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Scope

from serve_app.errors import DeadlineExceeded, MethodNotAllowed, NotFound
from serve_app.gateway.edge.errors import error_response
from serve_app.gateway.edge.operation import Operation
from serve_app.store.keys import Scope as KeyScope

Handler = Callable[[Request], Awaitable[Response]]

Public = Literal["public"]
PUBLIC: Final[Public] = "public"
"""Access to a route that asks for no key."""

ADMIN_TIMEOUT_S = 30.0
"""How long an admin's request may take: it reads or writes a few rows of the store."""

_WITH_BODY = ("POST", "PUT", "PATCH")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class RouteRule:
    """What the edge must know of a route."""

    name: str
    """The path as declared; the tag of its metrics."""
    access: KeyScope | Public
    """Scope that a key needs, or `public`."""
    reads_body: bool = False
    is_probe: bool = False
    """Answers however busy the gateway is, and is not worth a line in the log."""
    refusal: Callable[[BaseException], Response] = error_response
    """What an error looks like there."""

    @property
    def is_urgent(self) -> bool:
        """Whether it is let in however busy the gateway is: who mends things must get in."""
        return self.is_probe or self.access is KeyScope.ADMIN

    @property
    def is_work(self) -> bool:
        """Whether models or the router work for it: what load is measured by."""
        return self.access is KeyScope.CHAT and self.reads_body


UNKNOWN_ROUTE = RouteRule("other", PUBLIC)
"""Of a request that no route was found for; nothing runs under it."""


class Endpoint(Route):
    """One row of the table: a method and a path, who may call them, the handler, what it does."""

    def __init__(
        self,
        method: str,
        path: str,
        handler: Handler,
        access: KeyScope | Public,
        operation: Operation | None,
        *,
        is_probe: bool = False,
        refusal: Callable[[BaseException], Response] = error_response,
    ) -> None:
        """Declare a route.

        Args:
            method: HTTP method; `GET` includes `HEAD`.
            path: Starlette's pattern of the path.
            handler: Answers the request.
            access: Scope that a key needs, or `PUBLIC`.
            operation: What it takes and answers, for the OpenAPI document; `None` leaves the route
                out of the document.
            is_probe: Whether it is asked every few seconds by whoever watches.
            refusal: What an error looks like there.
        """
        if access is KeyScope.ADMIN:
            handler = _in_time(handler)
        super().__init__(path, handler, methods=[method])
        self.method = method
        # Starlette's pattern ends in `$`, which also matches before a line feed at the end.
        self.path_regex = re.compile(self.path_regex.pattern.removesuffix("$") + r"\Z")
        self.operation = operation
        self.rule = RouteRule(path, access, method in _WITH_BODY, is_probe, refusal)


def _in_time(handler: Handler) -> Handler:
    """The same handler, with `ADMIN_TIMEOUT_S` for its response; sending that may take longer."""

    @functools.wraps(handler)
    async def limited(request: Request) -> Response:
        try:
            async with asyncio.timeout(ADMIN_TIMEOUT_S) as timeout:
                return await handler(request)
        except TimeoutError:
            if not timeout.expired():
                raise
            raise DeadlineExceeded(
                f"this did not end within {ADMIN_TIMEOUT_S:g} s; a GET says whether it was done"
            ) from None

    return limited


class RouteTable:
    """Finds the one route of a request."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        """Search these, in order."""
        self.endpoints = tuple(endpoints)

    def find(self, scope: Scope) -> tuple[Endpoint, Scope]:
        """The route of a request.

        Returns:
            The route, and what Starlette's `Request` reads in the scope: the path's parameters.

        Raises:
            NotFound: If no route has the path, or the path has control characters.
            MethodNotAllowed: If routes have the path, and none of them the method.
        """
        allowed: set[str] = set()
        if not _CONTROL.search(scope["path"]):
            for endpoint in self.endpoints:
                match, found = endpoint.matches(scope)
                if match is Match.FULL:
                    return endpoint, found
                if match is Match.PARTIAL:
                    allowed |= endpoint.methods or set()
        if allowed:
            raise MethodNotAllowed(
                f"this path does not take {scope['method'][:16]!r}",
                None,
                ", ".join(sorted(allowed)),
            )
        raise NotFound("there is nothing at this path; see /openapi.json")
