"""Client address: the network that rate limits count a request under, also behind proxies.

The client is the peer of the connection, unless `BROKER_TRUSTED_PROXIES` lists the peer. It is then
the right-most address of `X-Forwarded-For` that the list lacks; without that header, of `Forwarded`
(RFC 7239 §5.2). Each proxy appends the address of its own peer. So every address from the client's
on was written by a trusted proxy, and a caller can forge none of them. An entry that is no address
ends the walk: the client is then the proxy that wrote the entry.

An IPv6 client is counted by its /64, which is what a provider gives to one customer. An
IPv4-mapped address is the IPv4 address.

Requests of one page repeat the same text, so results are cached: a look-up then costs about a
microsecond.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from aiohttp import web

CLIENT_ADDRESS: web.AppKey[ClientAddress] = web.AppKey("CLIENT_ADDRESS")
Network = IPv4Network | IPv6Network
Address = IPv4Address | IPv6Address

_CACHED = 1024
_MOST_HOPS = 32  # addresses of one request that are looked at
_FOR = re.compile(r"(?:^|;)\s*for\s*=\s*([^;]+)", re.I)


class ClientAddress:
    """Finds the client of a request. `trusted` are the networks of the proxies."""

    def __init__(self, trusted: Sequence[Network] = ()) -> None:
        self._trusted = tuple(trusted)
        self._found = lru_cache(_CACHED)(self._find)

    def of(self, request: web.Request) -> str:
        """The client's IPv4 address or IPv6 network; the peer's name where it is no IP address."""
        peer = request.remote or ""
        if not self._trusted:
            return self._found(peer, "", "")
        return self._found(
            peer,
            ",".join(request.headers.getall("X-Forwarded-For", ())),
            ",".join(request.headers.getall("Forwarded", ())),
        )

    def _find(self, peer: str, listed: str, forwarded: str) -> str:
        client = _parse(peer)
        if client is None:
            return peer
        if self._is_trusted(client):
            for address in _addresses(listed) if listed else _addresses(forwarded, _FOR):
                if address is None:
                    break
                client = address
                if not self._is_trusted(client):
                    break
        if isinstance(client, IPv6Address):
            return f"{IPv6Address(int(client) >> 64 << 64)}/64"
        return str(client)

    def _is_trusted(self, address: Address) -> bool:
        return any(address in network for network in self._trusted)


def _addresses(text: str, within: re.Pattern[str] | None = None) -> Iterator[Address | None]:
    """The addresses of a list, right-most first; None for an entry that is none."""
    for entry in reversed(text.rsplit(",", _MOST_HOPS)[-_MOST_HOPS:]):
        found = within.search(entry) if within else None
        yield _parse(found[1] if found else "" if within else entry)


def _parse(text: str) -> Address | None:
    """An IP address, with or without brackets, quotes and a port."""
    text = text.strip().strip('"')
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
