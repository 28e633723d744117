"""Which addresses of the web a tool may connect to: a URL goes in, checked IP addresses come out.

One spelling of each host is read, every other is refused. A name is resolved once, all its
addresses are checked, and the caller connects to these, so that no later answer of a name server
counts.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

import idna

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Sequence[str]]
"""From host and port to IP addresses; raises `OSError` where there is none."""

MAX_URL_CHARS = 2048
DEFAULT_PORTS = {"http": 80, "https": 443}

_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9a-f:.]+\]|[^\s/?#\[\]:@\\%\u3002\uff0e\uff61]+)(:(?P<port>[1-9][0-9]{0,4}))?"
    r"(?P<target>[/?][^#]*)?(#.*)?",
    re.IGNORECASE,
)
_NAME = re.compile(r"(?=.{1,253}\Z)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
                   r"(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*")  # fmt: skip
_NUMBER = re.compile(r"([0-9]+|0x[0-9a-f]*)")
"""A last label that makes readers take the whole host for an IPv4 address."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_AS_THEY_ARE = "/?:@!$&'()*+,;=%~-._[]"


def _networks(*names: str) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    return tuple(ipaddress.ip_network(name) for name in names)


_NOT_PUBLIC = _networks(
    # IPv4: this network, private, shared, loopback, link-local, protocols, documentation, relays of
    # 6to4, benchmarks, Azure's host, multicast, reserved.
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
    "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15",
    "198.51.100.0/24", "203.0.113.0/24", "168.63.129.16/32", "224.0.0.0/3",
    # Of IPv6's global part: protocols with Teredo, documentation, 6to4. All outside is refused.
    "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20",
)  # fmt: skip
_GLOBAL_V6 = ipaddress.ip_network("2000::/3")
_NEVER = _networks(
    # What no allowed host may be: unspecified, link-local and metadata, multicast, reserved.
    "0.0.0.0/8", "169.254.0.0/16", "100.100.100.200/32", "168.63.129.16/32", "192.0.0.192/32",
    "224.0.0.0/3", "::/128", "fe80::/10", "fd00:ec2::/32", "ff00::/8",
    # IPv4 addresses inside others: mapped, compatible, translated, 6to4, Teredo.
    "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16",
    "2001::/32",
)  # fmt: skip


class WebError(Exception):
    """A URL is refused, or an exchange failed; the tool decides what follows."""


@dataclass(frozen=True)
class WebAddress:
    """A URL in its one spelling."""

    scheme: str
    host: str
    """A name in ASCII, an IPv4 address, or an IPv6 address without brackets; in small letters."""

    port: int

    target: str
    """Path and query in ASCII; begins with `/`."""

    @property
    def authority(self) -> str:
        """Host and, where it is not the scheme's own, port: the value of the header `Host`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The whole address."""
        return f"{self.scheme}://{self.authority}{self.target}"


def read_url(url: str) -> WebAddress:
    """Take a URL apart.

    Args:
        url: As a model, a page or a configuration wrote it.

    Raises:
        WebError: If it is no plain http or https URL of a host in its one spelling.
    """
    url = url.strip()
    if len(url) > MAX_URL_CHARS:
        raise WebError(f"the url is longer than {MAX_URL_CHARS} characters")
    parts = _URL.fullmatch(url)
    if parts is None or _CONTROL.search(url):
        raise WebError("the url must be http://host/path or https://host/path, without a user")
    scheme = parts["scheme"].lower()
    port = int(parts["port"] or DEFAULT_PORTS[scheme])
    if port > 65535:
        raise WebError(f"the url has no valid port: {port}")
    target = parts["target"] or "/"
    try:
        target = quote(target if target.startswith("/") else f"/{target}", safe=_AS_THEY_ARE)
    except UnicodeEncodeError:
        raise WebError("the url is not valid text") from None
    return WebAddress(scheme, _host(parts["host"]), port, target)


def _host(spelled: str) -> str:
    """A host in its one spelling."""
    refused = WebError(f"the host {spelled[:100]!r} is not written as hosts are: a name, or an IP "
                       "address in its usual form")  # fmt: skip
    if spelled.startswith("["):
        try:
            return str(ipaddress.IPv6Address(spelled[1:-1]))
        except ValueError:
            raise refused from None
    host = spelled.lower()
    try:
        host = host if host.isascii() else idna.encode(host).decode("ascii")
    except (idna.IDNAError, UnicodeError):
        raise refused from None
    if not _NAME.fullmatch(host):
        raise refused
    if _NUMBER.fullmatch(host.rpartition(".")[2]):
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError:
            raise refused from None
    return host


def resolve_host(host: str, port: int) -> list[str]:
    """The IP addresses of a name, by the machine's resolver."""
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def allowed_entry(url: str) -> str:
    """The entry of `allow` that a URL of the settings stands for: its host and port."""
    parts = urlsplit(url)
    if ":" in parts.netloc.rpartition("]")[2]:
        return parts.netloc
    return f"{parts.netloc}:{DEFAULT_PORTS[parts.scheme]}"


class AddressGuard:
    """Decides which URLs may be asked, and at which IP addresses.

    Invariants:
        - Every address that `addresses` returns has been checked, and is the one to connect to.
        - A host of `allow` may be private or loopback, and is never link-local, multicast, or a
          cloud's metadata.
    """

    def __init__(
        self, allow: Iterable[str], ports: Iterable[int], resolve: Resolve = resolve_host
    ) -> None:
        """Of one tool.

        Args:
            allow: Hosts, with or without a port, as in `WebSettings.allow`.
            ports: Ports of every other host.
            resolve: Resolves names; called once for each request.
        """
        self._ports = frozenset(ports)
        self._resolve = resolve
        self._allowed: set[tuple[str, int]] = set()
        for entry in allow:
            host, colon, port = entry.lower().rpartition(":")
            if not colon or "]" in port:
                host, port = entry.lower(), ""
            host = _allowed_host(host)
            self._allowed |= {(host, int(port))} if port else {(host, p) for p in self._ports}

    def check_port(self, address: WebAddress) -> None:
        """See that a URL's port may be connected to.

        Raises:
            WebError: If it may not.
        """
        if address.port not in self._ports and not self._is_allowed(address):
            raise WebError(f"port {address.port} is not allowed")

    def addresses(self, address: WebAddress) -> list[IpAddress]:
        """The IP addresses of a URL's host, all of them checked.

        Raises:
            WebError: If the host has none, or one that may not be connected to.
        """
        self.check_port(address)
        try:
            found = [ipaddress.ip_address(address.host)]
        except ValueError:
            found = self._resolved(address)
        is_allowed = self._is_allowed(address)
        for ip in found:
            if not (_may_be_named(ip) if is_allowed else _is_public(ip)):
                raise WebError(f"the host {address.host!r} has no public address")
        return found

    def _resolved(self, address: WebAddress) -> list[IpAddress]:
        none = WebError(f"the host {address.host!r} has no public address")
        try:
            found = [ipaddress.ip_address(ip) for ip in self._resolve(address.host, address.port)]
        except (OSError, ValueError):
            raise none from None
        if not found:
            raise none
        return list(dict.fromkeys(found))

    def _is_allowed(self, address: WebAddress) -> bool:
        return (address.host, address.port) in self._allowed


def _allowed_host(host: str) -> str:
    """As `WebAddress.host` has it."""
    try:
        return str(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        return host


def _is_public(ip: IpAddress) -> bool:
    if isinstance(ip, ipaddress.IPv6Address) and ip not in _GLOBAL_V6:
        return False
    return not any(ip in network for network in _NOT_PUBLIC)


def _may_be_named(ip: IpAddress) -> bool:
    return not any(ip in network for network in _NEVER)
