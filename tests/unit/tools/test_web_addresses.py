"""Which URLs are read, and which addresses may be connected to."""

from __future__ import annotations

import pytest

from serve_app.tools.web.addresses import (
    AddressGuard,
    Resolve,
    WebAddress,
    WebError,
    allowed_entry,
    read_url,
)
from tests.web_fakes import PUBLIC, Names


def guard(*allow: str, resolve: Resolve | None = None) -> AddressGuard:
    return AddressGuard(allow, (80, 443), resolve or Names())


@pytest.mark.parametrize(
    "url",
    [
        "http://2130706433/",
        "http://0x7f000001/",
        "http://017700000001/",
        "http://0x7f.1/",
        "http://127.1/",
        "http://127.0.1/",
        "http://0177.0.0.1/",
        "http://127.0.0.01/",
        "http://127.0.0.1./",
        "http://localhost./",
        "http://256.256.256.256/",
        "http://1.2.3.4.5/",
        "http://example.0x1/",
        "http://%31%32%37.0.0.1/",
        "http://127%2e0%2e0%2e1/",
        "http://example.com%00.evil.test/",
        "http://user@127.0.0.1/",
        "http://user:secret@example.com/",
        "http://example.com@127.0.0.1/",
        "http://example.com:80@127.0.0.1/",
        "http://example.com\\@127.0.0.1/",
        "http:\\\\127.0.0.1/",
        "http:/127.0.0.1/",
        "http:127.0.0.1",
        "//127.0.0.1/",
        "http://\u2460\u2461\u2466.\u24ea.\u24ea.\u2460/",
        "http://\uff11\uff12\uff17.0.0.1/",
        "http://127\u30020\u30020\u30021/",
        "http://[127.0.0.1]/",
        "http://[::1/",
        "http://[::1%25lo]/",
        "http://[fe80::1%eth0]/",
        "http://[v1.x]/",
        "http://::1/",
        "http://exa mple.com/",
        "http://example.com\n.evil.test/",
        "http://example.com/\r\nHost: evil.test",
        "http://example.com:0/",
        "http://example.com:080/",
        "http://example.com:99999/",
        "http://example.com:1e3/",
        "http://-a.example.com/",
        "http://a..b/",
        "http:///path",
        "http://",
        "",
        "ftp://example.com/",
        "file:///etc/passwd",
        "gopher://127.0.0.1:6379/_x",
        "javascript:alert(1)",
        f"http://example.com/{'a' * 3000}",
        f"http://{'a' * 64}.example.com/",
        f"http://{'a.' * 130}example.com/",
        "http://example.com/\ud800",
    ],
)
def test_other_spellings_of_an_address_are_no_url(url: str) -> None:
    with pytest.raises(WebError) as refused:
        read_url(url)
    assert len(str(refused.value)) < 250


@pytest.mark.parametrize(
    ("url", "host", "port", "target"),
    [
        ("http://example.com", "example.com", 80, "/"),
        (" HTTPS://Example.COM/Path?Q=1#part ", "example.com", 443, "/Path?Q=1"),
        ("http://example.com:8080?q=a b", "example.com", 8080, "/?q=a%20b"),
        ("http://m\u00fcnchen.example/\u00e4", "xn--mnchen-3ya.example", 80, "/%C3%A4"),
        ("http://93.184.215.14/%2e%2e/x", "93.184.215.14", 80, "/%2e%2e/x"),
        ("https://[2606:4700:0::1111]/", "2606:4700::1111", 443, "/"),
        ("http://my_host.example/a@b:c", "my_host.example", 80, "/a@b:c"),
    ],
)
def test_the_usual_spelling_is_read(url: str, host: str, port: int, target: str) -> None:
    found = read_url(url)
    assert (found.host, found.port, found.target) == (host, port, target)
    assert read_url(found.url) == found


PRIVATE = [
    "0.0.0.0",
    "10.1.2.3",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:93.184.215.14",
    "::ffff:0:127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b:1::a00:1",
    "100::1",
    "2001::1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:a00:1::1",
    "3fff::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
]


@pytest.mark.parametrize("ip", PRIVATE)
def test_a_name_that_resolves_to_what_is_not_public_is_refused(ip: str) -> None:
    address = WebAddress("http", "name.test", 80, "/")
    for answer in ([ip], [PUBLIC, ip], [ip, PUBLIC]):
        with pytest.raises(WebError, match="no public address"):
            guard(resolve=Names(name_test=[answer])).addresses(address)


@pytest.mark.parametrize("ip", [ip for ip in PRIVATE if "%" not in ip])
def test_an_address_that_is_not_public_is_refused_without_a_name(ip: str) -> None:
    address = read_url(f"http://[{ip}]/" if ":" in ip else f"http://{ip}/")
    with pytest.raises(WebError, match="no public address"):
        guard().addresses(address)


@pytest.mark.parametrize("ip", [PUBLIC, "8.8.8.8", "172.32.0.1", "2606:4700::1111", "2a00:1450::5"])
def test_public_addresses_are_returned_as_they_were_checked(ip: str) -> None:
    names = Names(name_test=[[ip, ip]])
    found = guard(resolve=names).addresses(read_url("http://name.test/"))
    assert [str(address) for address in found] == [ip]
    assert names.asked == ["name.test"]


@pytest.mark.parametrize("answer", [[], ["no address"]])
def test_a_name_without_an_address_is_refused_in_the_same_words(answer: list[str]) -> None:
    for names in (Names(name_test=[answer]), Names()):
        with pytest.raises(WebError, match="no public address"):
            guard(resolve=names).addresses(read_url("http://name.test/"))


@pytest.mark.parametrize("name", ["a" * 70, "x.", ""])
def test_the_machines_resolver_fails_as_a_refusal(name: str) -> None:
    with pytest.raises(WebError):
        AddressGuard((), (80,)).addresses(WebAddress("http", f"{name}.invalid", 80, "/"))


@pytest.mark.parametrize(
    ("allow", "url", "is_fine"),
    [
        ("search.internal", "http://search.internal/", True),
        ("Search.Internal", "https://search.internal/", True),
        ("search.internal", "http://search.internal:8080/", False),
        ("search.internal:8080", "http://search.internal:8080/", True),
        ("search.internal:8080", "http://search.internal/", False),
        ("search.internal", "http://other.internal/", False),
        ("10.0.0.5:8080", "http://10.0.0.5:8080/", True),
        ("10.0.0.5", "http://10.0.0.6/", False),
        ("[fd00::5]:8080", "http://[fd00:0::5]:8080/", True),
        ("[fd00::5]", "http://[fd00::5]/", True),
        ("169.254.169.254", "http://169.254.169.254/", False),
        ("[fd00:ec2::254]", "http://[fd00:ec2::254]/", False),
        ("metadata.internal", "http://metadata.internal/", False),
    ],
)
def test_allow_opens_one_host_and_port_and_never_metadata(
    allow: str, url: str, is_fine: bool
) -> None:
    names = Names(
        search_internal=[["10.0.0.5"]],
        other_internal=[["10.0.0.5"]],
        metadata_internal=[["169.254.169.254"]],
    )
    asked = guard(allow, resolve=names)
    if is_fine:
        assert asked.addresses(read_url(url))
    else:
        with pytest.raises(WebError):
            asked.addresses(read_url(url))


@pytest.mark.parametrize(
    ("url", "entry"),
    [
        ("http://search.internal", "search.internal:80"),
        ("https://search.internal/x", "search.internal:443"),
        ("http://search.internal:8080/", "search.internal:8080"),
        ("http://[fd00::5]/", "[fd00::5]:80"),
        ("http://[fd00::5]:81/", "[fd00::5]:81"),
    ],
)
def test_a_url_of_the_settings_allows_its_host_and_port(url: str, entry: str) -> None:
    assert allowed_entry(url) == entry
    found = guard(entry, resolve=Names(search_internal=[["10.0.0.5"]])).addresses(read_url(url))
    assert found
