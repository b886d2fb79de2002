"""Which addresses pages are fetched from."""

from __future__ import annotations

import socket
from ipaddress import ip_network

import aiohttp
import pytest
from yarl import URL

from services.retriever.web.guard import Guard, Refused, Resolver, check_url, guarded_connector
from tests.retriever.web_internet import Internet, internet, text_answer  # noqa: F401 - a fixture

INSIDE = [
    "127.0.0.1", "127.9.9.9", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",  # loopback and private
    "169.254.169.254", "100.64.0.1", "100.127.255.255",  # metadata services, carrier-grade NAT
    "0.0.0.0", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255",  # unspecified, multicast, reserved
    "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1",  # documentation and benchmarks
    "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00::1", "fec0::1", "ff02::1", "2001:db8::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1",  # IPv4 inside IPv6
    "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2002:a9fe:a9fe::", "2001::1",
]  # fmt: skip
OUTSIDE = ["8.8.8.8", "1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "2a00:1450:4001::200e"]


@pytest.mark.parametrize("address", INSIDE)
def test_the_inside_is_refused(address: str) -> None:
    assert not Guard([]).allows(address)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with pytest.raises(Refused):
        Guard([]).socket((family, socket.SOCK_STREAM, 0, "", (address, 80)))


@pytest.mark.parametrize("address", OUTSIDE)
def test_the_public_net_is_allowed(address: str) -> None:
    assert Guard([]).allows(address)


def test_a_network_that_is_let_through_lets_no_other_through() -> None:
    guard = Guard([ip_network("10.1.0.0/16")])
    assert guard.allows("10.1.2.3")
    assert not guard.allows("10.2.0.1")
    assert not guard.allows("::ffff:10.1.2.3")


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.org/", "file:///etc/passwd", "gopher://example.org/", "javascript:alert(1)", "/relative", "",
        "http://localhost/", "http://LOCALHOST./", "http://a.localhost/", "http://user@example.org/", "http://u:p@example.org/",
        "http://example.org:22/", "https://example.org:6379/", "http://example.org:0/",
    ],
)  # fmt: skip
def test_addresses_that_no_web_page_has_are_refused(url: str) -> None:
    with pytest.raises(Refused):
        check_url(URL(url), [80, 443])


@pytest.mark.parametrize("url", ["http://example.org/", "https://example.org/a?b#c", "http://example.org:443/", "http://8.8.8.8"])
def test_common_addresses_are_let_through(url: str) -> None:
    check_url(URL(url), [80, 443])


async def test_a_name_that_changes_between_check_and_connection_leads_nowhere_else(internet: Internet) -> None:  # noqa: F811
    """DNS rebinding: the first look finds a good address, every later one the inside."""
    internet.pages["/"] = text_answer("hello")
    looks = iter([["127.0.0.1"], *[["127.0.0.2"]] * 9])
    guard = Guard([ip_network("127.0.0.1/32")])
    async with (
        aiohttp.ClientSession(connector=guarded_connector(guard, lambda host, port: next(looks))) as session,
        session.get(f"http://rebind.example:{internet.port}/") as response,
    ):
        assert await response.text() == "hello"
    assert internet.inside == []


async def test_of_several_addresses_only_the_public_ones_are_tried(internet: Internet) -> None:  # noqa: F811
    internet.pages["/"] = text_answer("hello")
    lookup = lambda host, port: ["127.0.0.2", "::1", "127.0.0.1"]  # noqa: E731
    async with aiohttp.ClientSession(connector=guarded_connector(Guard([ip_network("127.0.0.1/32")]), lookup)) as session:
        await session.get(f"http://both.example:{internet.port}/")
    assert (internet.fetched, internet.inside) == (["/"], [])


@pytest.mark.parametrize("host", ["127.0.0.2", "2130706434", "0x7f000002", "127.2", "[::ffff:127.0.0.2]", "inner.example"])
async def test_no_spelling_of_an_inner_address_is_connected_to(internet: Internet, host: str) -> None:  # noqa: F811
    def lookup(host: str, port: int) -> list[str]:
        return ["127.0.0.2"]

    async with aiohttp.ClientSession(connector=guarded_connector(Guard([ip_network("127.0.0.1/32")]), lookup)) as session:
        with pytest.raises((aiohttp.ClientError, Refused)):
            await session.get(f"http://{host}:{internet.port}/")
    assert internet.fetched == []


async def test_a_name_without_a_public_address_is_refused_before_any_socket_is_made() -> None:
    resolver = Resolver(Guard([]), lambda host, port: ["10.0.0.1", "::1"] if host == "inner.example" else ["10.0.0.1", "8.8.8.8"])
    with pytest.raises(Refused, match="inner.example has no public address"):
        await resolver.resolve("inner.example", 80)
    assert [found["host"] for found in await resolver.resolve("mixed.example", 80)] == ["8.8.8.8"]
    await resolver.close()
