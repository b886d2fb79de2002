"""Which addresses a page may be fetched from: public ones. What stands on a web page must not make us read our own network.

| checked                         | where                                                                          |
|---------------------------------|--------------------------------------------------------------------------------|
| scheme, port, user, host's name | `check_url`, before each request and each redirect                             |
| what the name resolves to       | `Resolver`: refused addresses are dropped, and none left is a refusal           |
| the address connected to        | `Guard.socket`, when the socket is made: there is no later look at the name     |

Refused are private, shared (carrier-grade NAT), loopback, link-local, multicast, reserved and unspecified addresses, and IPv6
addresses that wrap an IPv4 address.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any, TypeAlias

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

Lookup: TypeAlias = Callable[[str, int], Sequence[str]]
"""Blocks; the addresses of a host's name. Raises OSError."""

LOOKUPS = 16
"""Names looked up at a time."""
UNICAST = IPv6Network("2000::/3")
"""What else is global by the books wraps an IPv4 address, which a gateway would unwrap (mapped, NAT64), or is multicast."""
SIX_TO_FOUR = IPv6Network("2002::/16")


class Refused(OSError):
    """The page lies where none may be fetched from. An OSError, since it is raised where sockets are made."""


def check_url(url: URL, ports: Collection[int]) -> None:
    """Raises Refused."""
    host = (url.host or "").rstrip(".").lower()
    if url.scheme not in ("http", "https"):
        raise Refused(f"the scheme {url.scheme!r} is not http or https")
    if url.user or url.password:
        raise Refused("it brings a user name or password")
    if url.port not in ports:
        raise Refused(f"port {url.port} is not in retriever.web.page_ports")
    if not host or host == "localhost" or host.endswith(".localhost"):
        raise Refused(f"{host or 'no host'} is this machine")


class Guard:
    """`networks` are let through although they are not public."""

    def __init__(self, networks: Sequence[IPv4Network | IPv6Network]) -> None:
        self._networks = networks

    def allows(self, text: str) -> bool:
        address = ip_address(text.split("%")[0])
        return any(address in network for network in self._networks) or _is_public(address)

    def socket(self, info: tuple[Any, ...]) -> socket.socket:
        """For aiohttp's connector, which calls it for every connection. `info` is getaddrinfo's tuple. Raises Refused."""
        family, kind, protocol, _, address = info
        if not self.allows(address[0]):
            raise Refused(f"{address[0]} is not a public address")
        return socket.socket(family, kind, protocol)


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv6Address):
        return address in UNICAST and address not in SIX_TO_FOUR and address.is_global
    return address.is_global and not address.is_multicast


class Resolver(AbstractResolver):
    """Names to the addresses that the guard allows."""

    def __init__(self, guard: Guard, lookup: Lookup) -> None:
        self._guard, self._lookup = guard, lookup
        self._threads = ThreadPoolExecutor(LOOKUPS, "dns")  # its own: slow name servers must not keep others waiting

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        found = await asyncio.get_running_loop().run_in_executor(self._threads, self._lookup, host, port)
        allowed = [address for address in found if self._guard.allows(address)]
        if not allowed:
            raise Refused(f"{host} has no public address")
        return [_result(host, address, port) for address in allowed]

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _result(host: str, address: str, port: int) -> ResolveResult:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    return ResolveResult(hostname=host, host=address, port=port, family=family, proto=socket.IPPROTO_TCP, flags=flags)


def system_lookup(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def guarded_connector(guard: Guard, lookup: Lookup = system_lookup) -> aiohttp.TCPConnector:
    """Limits nothing: the fetches have limits of their own. No connection is kept, since few hosts are met twice."""
    return aiohttp.TCPConnector(resolver=Resolver(guard, lookup), socket_factory=guard.socket, limit=0, force_close=True)
