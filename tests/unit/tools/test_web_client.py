"""One exchange: connected to as checked, bounded in time, bytes and redirects."""

from __future__ import annotations

import gzip
import ssl
import subprocess
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from serve_app.config.tools import FetchConfig
from serve_app.errors import ToolTimeout
from serve_app.tools.web.addresses import WebError
from serve_app.tools.web.client import MAX_REDIRECTS, WebClient, WebReply
from tests.web_fakes import PUBLIC, Detour, Names, Site, raw_server, running_site

LONG_S = 60.0
OTHER_PUBLIC = "8.8.8.8"


@pytest.fixture
def site() -> Iterator[Site]:
    with running_site() as running:
        yield running


def client(port: int, **settings: Any) -> WebClient:
    """A client that may ask the port of loopback."""
    return WebClient(FetchConfig(tool_id="fetch", allow=(f"127.0.0.1:{port}",), **settings))


def get(asked: WebClient, url: str, **settings: Any) -> WebReply:
    return asked.send("GET", url, **{"deadline_s": LONG_S, **settings})


def test_connection_goes_to_the_checked_address_and_the_name_stands_in_host(site: Site) -> None:
    """A name server that changes its answer after the check is not asked again."""
    site.page("/", "hello", "text/plain")
    names = Names(rebind_test=[[PUBLIC], ["127.0.0.1"], ["169.254.169.254"]])
    detour = Detour(site.port)
    asked = WebClient(FetchConfig(tool_id="fetch"), resolve=names, backend=detour)
    assert get(asked, "http://rebind.test/").body == b"hello"
    assert names.asked == ["rebind.test"]
    assert detour.connected == [(PUBLIC, 80)]
    assert site.requests[0].headers["Host"] == "rebind.test"
    with pytest.raises(WebError, match="no public address"):
        get(asked, "http://rebind.test/")
    assert len(site.requests) == 1


def test_second_address_is_tried_where_the_first_does_not_answer(site: Site) -> None:
    site.page("/", "hello")
    names = Names(two_test=[[PUBLIC, OTHER_PUBLIC]])
    detour = Detour(site.port, dead=[PUBLIC])
    asked = WebClient(FetchConfig(tool_id="fetch"), resolve=names, backend=detour)
    assert get(asked, "http://two.test/").status == 200
    assert [host for host, _ in detour.connected] == [PUBLIC, OTHER_PUBLIC]


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1/",
        "http://localhost/",
        "http://169.254.169.254/latest/meta-data/",
        "http://[::1]/",
        "http://inner.test/",
        "//127.0.0.1/",
        "http://0x7f.1/",
        "file:///etc/passwd",
        "http://public.test:6379/",
        "http://user:secret@public.test/",
        "http://[::1",
    ],
)
def test_redirect_is_checked_as_the_first_address_was(site: Site, location: str) -> None:
    site.redirect("/", location)
    names = Names(public_test=[[PUBLIC]], inner_test=[["10.0.0.1"]], localhost=[["127.0.0.1"]])
    detour = Detour(site.port)
    asked = WebClient(FetchConfig(tool_id="fetch"), resolve=names, backend=detour)
    with pytest.raises(WebError):
        get(asked, "http://public.test/", max_redirects=MAX_REDIRECTS)
    assert detour.connected == [(PUBLIC, 80)]


def test_redirects_are_followed_up_to_their_number(site: Site) -> None:
    for number in range(MAX_REDIRECTS + 1):
        site.redirect(f"/{number}", f"{number + 1}?x#y")
    site.page(f"/{MAX_REDIRECTS + 1}", "end")
    asked = client(site.port)
    found = get(asked, f"{site.url}/1", max_redirects=MAX_REDIRECTS)
    assert (found.body, found.url) == (b"end", f"{site.url}/{MAX_REDIRECTS + 1}?x")
    with pytest.raises(WebError, match="more than 5 redirects"):
        get(asked, f"{site.url}/0", max_redirects=MAX_REDIRECTS)
    assert get(asked, f"{site.url}/0").status == 302


def test_proxies_of_the_environment_are_not_used(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.page("/", "hello")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert get(client(site.port), site.url).body == b"hello"


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "identity", "GZIP"])
def test_bodies_are_decompressed(site: Site, encoding: str) -> None:
    whole = b"hello" * 1000
    packed = {"gzip": gzip.compress(whole), "deflate": zlib.compress(whole), "identity": whole}
    site.page("/", packed[encoding.lower()], Content_Encoding=encoding)
    assert get(client(site.port), site.url).body == b"hello" * 1000


@pytest.mark.parametrize(
    ("body", "encoding", "reason"),
    [
        (b"x" * 5000, "identity", "larger than 4096"),
        (gzip.compress(b"\0" * (64 << 20)), "gzip", "larger than"),
        (zlib.compress(b"\0" * 5000), "deflate", "larger than"),
        (gzip.compress(bytes(range(256)) * 8)[:-9], "gzip", "breaks off"),
        (b"no gzip", "gzip", "cannot be decompressed"),
        (gzip.compress(gzip.compress(b"x")), "gzip, gzip", "was not asked for"),
        (b"x", "br", "was not asked for"),
    ],
    ids=["large", "bomb", "small-bomb", "torn", "garbage", "twice", "brotli"],
)
def test_bodies_that_are_too_large_or_broken_are_refused(
    site: Site, body: bytes, encoding: str, reason: str
) -> None:
    site.page("/", body, Content_Encoding=encoding)
    with pytest.raises(WebError, match=reason):
        get(client(site.port, max_bytes=max(4096, len(body) - 1000)), site.url)


def test_endless_body_is_cut_off() -> None:
    def pieces() -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n"
        while True:
            yield b"x" * 65536

    with raw_server(pieces) as port, pytest.raises(WebError, match="larger than"):
        get(client(port), f"http://127.0.0.1:{port}/")


@pytest.mark.parametrize(
    ("first", "drop"),
    [
        (b"", b""),
        (b"HTTP/1.1 200 OK\r\nX: ", b"y"),
        (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"y"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\ny\r\n"),
    ],
    ids=["silent", "headers", "early-hints", "body", "chunks"],
)
def test_slow_server_does_not_outlast_the_deadline(first: bytes, drop: bytes) -> None:
    def pieces() -> Iterator[bytes]:
        yield first
        while True:
            yield drop

    with raw_server(pieces) as port:
        begin = time.monotonic()
        with pytest.raises(ToolTimeout):
            get(client(port), f"http://127.0.0.1:{port}/", deadline_s=0.5)
        assert time.monotonic() - begin < 10


def test_slow_name_server_does_not_outlast_the_deadline() -> None:
    released = threading.Event()

    def resolve(host: str, port: int) -> list[str]:
        released.wait(LONG_S)
        return [PUBLIC]

    asked = WebClient(FetchConfig(tool_id="fetch"), resolve=resolve)
    try:
        with pytest.raises(ToolTimeout):
            get(asked, "http://slow.test/", deadline_s=0.3)
    finally:
        released.set()


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\xff\xfe garbage \r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nA: " + b"x" * 200_000,
        b"SSH-2.0-OpenSSH_9.6\r\n",
    ],
    ids=["nothing", "bytes", "status", "length", "short", "header", "ssh"],
)
def test_what_is_no_http_is_no_answer(sent: bytes) -> None:
    with raw_server(lambda: [sent]) as port, pytest.raises(WebError, match="no answer"):
        get(client(port), f"http://127.0.0.1:{port}/")


def test_no_server_is_no_answer() -> None:
    with running_site() as site:
        port = site.port
    with pytest.raises(WebError, match="no answer"):
        get(client(port), f"http://127.0.0.1:{port}/")


def test_a_header_that_would_end_its_line_is_not_sent(site: Site) -> None:
    with pytest.raises(WebError, match="no answer"):
        get(client(site.port), site.url, headers={"X": "a\r\nY: b"})
    assert site.requests == []


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `good.test`, signed by itself, with its key."""
    path = tmp_path_factory.mktemp("tls") / "good.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=good.test", "-addext", "subjectAltName=DNS:good.test", "-keyout", str(path), "-out",
         f"{path}.crt"],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


def test_tls_is_of_the_name_and_not_of_the_address(certificate: Path) -> None:
    server_names: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.sni_callback = lambda _, name, __: server_names.append(name)
    trusted = ssl.create_default_context(cafile=str(certificate))
    names = Names(good_test=[[PUBLIC]], other_test=[[PUBLIC]])

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "2")
        handler.end_headers()
        handler.wfile.write(b"ok")

    with running_site(context) as site:
        site.answers["/"] = answer
        asked = WebClient(
            FetchConfig(tool_id="fetch"),
            resolve=names,
            backend=Detour(site.port),
            ssl_context=trusted,
        )
        assert get(asked, "https://good.test/").body == b"ok"
        with pytest.raises(WebError, match="no answer"):
            get(asked, "https://other.test/")
        untrusting = WebClient(
            FetchConfig(tool_id="fetch"), resolve=names, backend=Detour(site.port)
        )
        with pytest.raises(WebError, match="no answer"):
            get(untrusting, "https://good.test/")
        assert len(site.requests) == 1
    assert server_names[:2] == ["good.test", "other.test"]
