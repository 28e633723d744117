"""From where, and under which name, the gateway may be called.

Without keys (`auth.mode: open`) whoever reaches the gateway may do everything, so it has to be
reached from its own machine only. Three things must hold together: Serve listens on a loopback
address (`require_loopback`, when a gateway starts), the caller's address is a loopback address, and
so is the name in `Host`: a web page whose name its owner lets point at 127.0.0.1 sends its own.
The caller's address alone would not do. HAProxy tells a gateway nothing about its callers, and
passes on whatever they write into `X-Forwarded-For`, which uvicorn believes of a loopback peer:
such a header can close this door, and never open it while Serve listens on loopback.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import IPv6Address, ip_address
from typing import Literal

from starlette.types import Scope

from serve_app.errors import ConfigError, Forbidden, Misdirected

AuthMode = Literal["open", "required"]

_HOST = re.compile(r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::[0-9]{0,5})?")


def host_name(header: bytes) -> str | None:
    """The name in a `Host` header, in lower case and without its port; `None`: not a name."""
    match = _HOST.fullmatch(header.decode("latin-1").strip())
    if match is None:
        return None
    return (match["ipv6"] or match["name"]).lower().removesuffix(".")


def is_loopback(host: str) -> bool:
    """Whether a name or an address can only be this machine."""
    if host == "localhost":
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback


def require_loopback(mode: AuthMode, host: str | None) -> None:
    """Refuse to serve without keys beyond this machine.

    Args:
        mode: `gateway.auth.mode`.
        host: Address that Serve's HTTP servers listen on.

    Raises:
        ConfigError: If no key is asked for and other machines can connect.
    """
    if mode == "open" and not (host is not None and is_loopback(host)):
        raise ConfigError(
            f"gateway.auth.mode is 'open', which is served on loopback only, and Serve listens on "
            f"{host!r}; set Serve's http_options.host to '127.0.0.1', or auth.mode to 'required'"
        )


class HostCheck:
    """Refuses callers and names that a gateway does not answer."""

    def __init__(self, mode: AuthMode, allowed_hosts: Sequence[str] = ()) -> None:
        """Set what is answered.

        Args:
            mode: `open` answers loopback callers under loopback names, whatever is allowed.
            allowed_hosts: Names in lower case; `*.` before one stands for every subdomain. Empty:
                any name.
        """
        self._is_open = mode == "open"
        self._names = frozenset(name for name in allowed_hosts if not name.startswith("*."))
        self._endings = tuple(name[1:] for name in allowed_hosts if name.startswith("*."))

    def check(self, scope: Scope, *, is_probe: bool) -> None:
        """Look at one request.

        Args:
            scope: Its ASGI scope.
            is_probe: Whether it asks for a probe, which is answered under any name where keys are
                required: Kubernetes asks by address.

        Raises:
            Forbidden: If its caller is on another machine and no keys are asked for.
            Misdirected: If it is for a name that is not served here.
        """
        if self._is_open:
            client = scope.get("client")
            if client is None or not is_loopback(client[0]):
                raise Forbidden(
                    "this server asks for no API key, and answers callers on its own machine only"
                )
        elif is_probe or not (self._names or self._endings):
            return
        given = [value for name, value in scope["headers"] if name == b"host"]
        host = host_name(given[0]) if len(given) == 1 else None
        if host is None or not self._is_served(host):
            shown = b", ".join(given)[:80].decode("latin-1")
            raise Misdirected(f"requests for the host {shown!r} are not answered here")

    def check_origin(self, scope: Scope) -> None:
        """Refuse a request that a page of another site sends.

        A program sends no `Origin`. A browser does, and a page's host has to be served here.

        Raises:
            Forbidden: If the page is another site's.
        """
        if not (self._is_open or self._names or self._endings):
            return
        for given in (value for name, value in scope["headers"] if name == b"origin"):
            host = host_name(given.partition(b"://")[2])
            if host is None or not self._is_served(host):
                shown = given[:80].decode("latin-1")
                raise Forbidden(f"requests from pages of {shown!r} are not answered here")

    def _is_served(self, host: str) -> bool:
        if self._is_open:
            return is_loopback(host)
        return host in self._names or host.endswith(self._endings)
