"""A browser's session: the cookie that stands for a key, and where its requests may come from.

The cookie is random and stands for the key in the store; the key itself is not in it. A browser
sends the cookie with every request to this host, whichever page asks, so a request that may change
something has to come from a page of this host.
"""

from __future__ import annotations

import re

from starlette.types import Scope

from serve_app.errors import Forbidden

SESSION_S = 12 * 3600.0
"""How long a session lasts."""

_NAME = "atlas_session"
_COOKIE = re.compile(rb"(?:^|;) *atlas_session=([A-Za-z0-9_-]{43}) *(?:;|$)")
_READING = ("GET", "HEAD")


def session_of(cookies: bytes | None) -> str | None:
    """The session's token in a `Cookie` header; `None`: there is none."""
    found = None if cookies is None else _COOKIE.search(cookies)
    return None if found is None else found[1].decode("ascii")


def session_cookie(token: str, *, is_https: bool) -> str:
    """A `Set-Cookie` header that begins a session, or ends it where the token is empty."""
    lasts_s = int(SESSION_S) if token else 0
    secure = "; Secure" if is_https else ""
    return f"{_NAME}={token}; Path=/; Max-Age={lasts_s}; HttpOnly; SameSite=Strict{secure}"


def require_own_page(scope: Scope) -> None:
    """Refuse a request that may change something, and that no page of this host sends.

    Raises:
        Forbidden: If its `Origin` is not its `Host`.
    """
    if scope["method"] in _READING:
        return
    given = {name: value for name, value in scope["headers"] if name in (b"origin", b"host")}
    origin = given.get(b"origin", b"").partition(b"://")[2]
    if not origin or origin.lower() != given.get(b"host", b"").lower():
        raise Forbidden("a session's requests have to come from a page of this host")
