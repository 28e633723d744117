"""One HTTP exchange with a checked address: bounded in time, in bytes and in redirects.

Proxies of the environment are not used: a proxy would resolve the name again.
"""

from __future__ import annotations

import functools
import queue
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin

import httpcore2

from serve_app.config.tools import WebSettings
from serve_app.errors import ToolTimeout
from serve_app.tools.web.addresses import (
    AddressGuard,
    IpAddress,
    Resolve,
    WebAddress,
    WebError,
    read_url,
    resolve_host,
)

MAX_REDIRECTS = 5
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_MAX_TRIED = 4
"""Addresses of one host that are tried in turn."""
_WRITE_BYTES = 1 << 16


@dataclass(frozen=True)
class WebReply:
    """What a server answered."""

    url: str
    """Of the last redirect."""

    status: int
    headers: Mapping[str, str]
    """By name in small letters; the first of each."""

    body: bytes
    """Decompressed."""

    @property
    def media_type(self) -> str:
        """`type/subtype` in small letters; empty where the server names none."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()


class WebClient:
    """Sends requests for one tool.

    Invariants:
        - A connection goes to an address that the guard has just checked; the name is resolved
          once for each request, and stands in `Host` and in TLS.
        - An exchange ends at its deadline, name look-up, handshake and redirects included.
        - No more than `max_bytes` are read of a body, or made of one by decompressing.
    """

    def __init__(
        self,
        settings: WebSettings,
        *,
        also_allow: Iterable[str] = (),
        resolve: Resolve = resolve_host,
        backend: httpcore2.NetworkBackend | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """Prepare; connects to nothing.

        Args:
            settings: Hosts, ports and bytes that are allowed.
            also_allow: Hosts that other settings of the tool name.
            resolve: Resolves names.
            backend: Opens connections to IP addresses; `None`: sockets.
            ssl_context: Whom to trust; `None`: the machine's certificates.
        """
        self._guard = AddressGuard((*settings.allow, *also_allow), settings.ports, resolve)
        self._max_bytes = settings.max_bytes
        self._backend = backend or httpcore2.SyncBackend()
        self._ssl_context = ssl_context

    def send(
        self,
        method: str,
        url: str,
        *,
        deadline_s: float,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        max_redirects: int = 0,
    ) -> WebReply:
        """Ask, and read the answer whole.

        Args:
            method: Of HTTP.
            url: Where; refused where the guard does not allow it.
            deadline_s: Seconds from now for everything together.
            headers: Beside those that frame the request.
            body: Of the request.
            max_redirects: Redirects that are followed, each checked as the first; more than these
                end the exchange. 0: a redirect is the reply.

        Raises:
            WebError: If a URL is refused, or there is no answer within the limits.
            ToolTimeout: If time ran out.
        """
        clock = _Clock(deadline_s)
        address = read_url(url)
        for _ in range(max_redirects + 1):
            reply = self._exchange(method, address, headers or {}, body, clock)
            location = reply.headers.get("location")
            if reply.status not in _REDIRECTS or location is None or not max_redirects:
                return reply
            try:
                target = urljoin(address.url, location)
            except ValueError:
                raise WebError("the server redirects to what is no url") from None
            address = read_url(target)
        raise WebError(f"more than {max_redirects} redirects")

    def _exchange(
        self,
        method: str,
        address: WebAddress,
        headers: Mapping[str, str],
        body: bytes,
        clock: _Clock,
    ) -> WebReply:
        self._guard.check_port(address)
        found = _in_time(lambda: self._guard.addresses(address), clock)
        is_tls = address.scheme == "https"
        url = httpcore2.URL(
            scheme=address.scheme.encode(),
            host=address.host.encode(),
            port=address.port,
            target=address.target.encode(),
        )
        sent = {
            "Host": address.authority,
            "User-Agent": "atlas-serve",
            "Accept-Encoding": "gzip, deflate",
            "Connection": "close",
        }
        if body or method in ("POST", "PUT", "PATCH"):
            sent["Content-Length"] = str(len(body))
        pairs: list[tuple[bytes | str, bytes | str]] = [*sent.items(), *headers.items()]
        last_of_each = {str(name).lower(): (name, value) for name, value in pairs}
        try:
            with (
                httpcore2.HTTPConnection(
                    url.origin,
                    ssl_context=(self._ssl_context or _machine_context()) if is_tls else None,
                    network_backend=_Pinned(self._backend, found[:_MAX_TRIED], clock),
                ) as connection,
                connection.stream(
                    method, url, headers=[*last_of_each.values()], content=body
                ) as response,
            ):
                received = _first_of_each(response.headers)
                content = self._read(response.iter_stream(), received.get("content-encoding", ""))
                return WebReply(address.url, response.status, received, content)
        except httpcore2.TimeoutException:
            raise _late() from None
        except (httpcore2.NetworkError, httpcore2.ProtocolError, OSError):
            raise WebError(f"no answer could be had of {address.host!r}") from None

    def _read(self, chunks: Iterable[bytes], encoding: str) -> bytes:
        """A body, decompressed, within the limit."""
        too_large = WebError(f"the answer is larger than {self._max_bytes} bytes")
        coding = encoding.strip().lower()
        if coding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise WebError("the answer is compressed in a way that was not asked for")
        inflate = None if coding in ("", "identity") else zlib.decompressobj(zlib.MAX_WBITS | 32)
        pieces, num_raw, num_made = [], 0, 0
        for chunk in chunks:
            num_raw += len(chunk)
            if num_raw > self._max_bytes:
                raise too_large
            if inflate is not None:
                try:
                    chunk = inflate.decompress(chunk, self._max_bytes - num_made + 1)
                except zlib.error:
                    raise WebError("the answer cannot be decompressed") from None
            num_made += len(chunk)
            if num_made > self._max_bytes:
                raise too_large
            pieces.append(chunk)
        if inflate is not None and num_raw and not inflate.eof:
            raise WebError("the answer breaks off")
        return b"".join(pieces)


class _Clock:
    """The time that an exchange has left."""

    def __init__(self, seconds: float) -> None:
        self._end_s = time.monotonic() + seconds

    def left_s(self) -> float:
        """Seconds left.

        Raises:
            httpcore2.TimeoutException: If none are.
        """
        left = self._end_s - time.monotonic()
        if left <= 0:
            raise httpcore2.ReadTimeout
        return left


class _Pinned(httpcore2.NetworkBackend):
    """Connects to given addresses, whatever the name."""

    def __init__(
        self, inner: httpcore2.NetworkBackend, addresses: Sequence[IpAddress], clock: _Clock
    ) -> None:
        self._inner = inner
        self._addresses = addresses
        self._clock = clock

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        """Connect to the first address that answers; each gets its share of the time."""
        for untried in range(len(self._addresses), 0, -1):
            address = str(self._addresses[-untried])
            try:
                stream = self._inner.connect_tcp(
                    address, port, self._clock.left_s() / untried, local_address, socket_options
                )
                return _Timed(stream, self._clock)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                if untried == 1:
                    raise
        raise httpcore2.ConnectError


class _Timed(httpcore2.NetworkStream):
    """A connection whose every step ends by the deadline, so that drops of data win no time."""

    def __init__(self, inner: httpcore2.NetworkStream, clock: _Clock) -> None:
        self._inner = inner
        self._clock = clock

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Read what is there."""
        return self._inner.read(max_bytes, self._clock.left_s())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Write all of it."""
        for start in range(0, len(buffer), _WRITE_BYTES):
            self._inner.write(buffer[start : start + _WRITE_BYTES], self._clock.left_s())

    def close(self) -> None:
        """Close."""
        self._inner.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore2.NetworkStream:
        """Encrypt."""
        inner = self._inner.start_tls(ssl_context, server_hostname, self._clock.left_s())
        return _Timed(inner, self._clock)

    def get_extra_info(self, info: str) -> Any:
        """What the connection knows of itself."""
        return self._inner.get_extra_info(info)


def _in_time(look_up: Callable[[], list[IpAddress]], clock: _Clock) -> list[IpAddress]:
    """Look a name up in a thread of its own: the machine's resolver keeps no deadline."""
    done: queue.SimpleQueue[list[IpAddress] | WebError] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put(look_up())
        except WebError as error:
            done.put(error)

    threading.Thread(target=run, daemon=True, name="resolve").start()
    try:
        found = done.get(timeout=clock.left_s())
    except (queue.Empty, httpcore2.TimeoutException):
        raise _late() from None
    if isinstance(found, WebError):
        raise found
    return found


@functools.cache
def _machine_context() -> ssl.SSLContext:
    return httpcore2.default_ssl_context()


def _first_of_each(headers: Sequence[tuple[bytes, bytes]]) -> dict[str, str]:
    first: dict[str, str] = {}
    for name, value in headers:
        first.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
    return first


def _late() -> ToolTimeout:
    return ToolTimeout("the server did not answer in time")
