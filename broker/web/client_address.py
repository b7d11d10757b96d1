"""Client address: the network that rate limits count a request under, also behind proxies.

The client is the peer of the connection, unless `BROKER_TRUSTED_PROXIES` lists the peer. It is then
the right-most address of `X-Forwarded-For` that the list lacks; without that header, of `Forwarded`
(RFC 7239 §5.2). Each proxy appends the address of its own peer. So every address from the client's
on was written by a trusted proxy, and a caller can forge none of them. An entry that is no address
ends the walk: the client is then the proxy that wrote the entry. So does an entry of `Forwarded`
whose quoted text has a separator: a proxy may repeat the caller's Host there.

An IPv6 client is counted by its /64, which is what a provider gives to one customer. An
IPv4-mapped address is the IPv4 address.

Requests of one page repeat the same text, so results are cached: a look-up then costs about a
microsecond.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from aiohttp import web

CLIENT_ADDRESS: web.AppKey[ClientAddress] = web.AppKey("CLIENT_ADDRESS")
Network = IPv4Network | IPv6Network
Address = IPv4Address | IPv6Address

_CACHED = 1024
_MOST_HOPS = 32  # addresses of one request that are looked at
_LONGEST = 2048  # characters of a header that are looked at and cached, from its end
_PAIR = re.compile(r'\s*([A-Za-z]+)\s*=\s*("[^"]*"|[^"]*)')


class ClientAddress:
    """Finds the client of a request. `trusted` are the networks of the proxies. Without any,
    `on_proxy` is called at the first request that a proxy seems to have forwarded.
    """

    def __init__(
        self, trusted: Sequence[Network] = (), on_proxy: Callable[[], None] | None = None
    ) -> None:
        self._trusted = tuple(trusted)
        self._on_proxy = on_proxy
        self._found = lru_cache(_CACHED)(self._find)

    def of(self, request: web.Request) -> str:
        """The client's IPv4 address or IPv6 network; the peer's name where it is no IP address."""
        peer = request.remote or ""
        if not self._trusted:
            if self._on_proxy is not None and "X-Forwarded-For" in request.headers:
                told, self._on_proxy = self._on_proxy, None
                told()
            return self._found(peer, "", "")
        return self._found(
            peer,
            ",".join(request.headers.getall("X-Forwarded-For", ()))[-_LONGEST:],
            ",".join(request.headers.getall("Forwarded", ()))[-_LONGEST:],
        )

    def _find(self, peer: str, listed: str, forwarded: str) -> str:
        client = _parse(peer)
        if client is None:
            return peer
        if self._is_trusted(client):
            for address in _addresses(listed) if listed else _addresses(forwarded, _for):
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


def _addresses(
    text: str, within: Callable[[str], str] = lambda entry: entry
) -> Iterator[Address | None]:
    """The addresses of a list, right-most first; None for an entry that is none."""
    for entry in reversed(text.rsplit(",", _MOST_HOPS)[-_MOST_HOPS:]):
        yield _parse(within(entry))


def _for(entry: str) -> str:
    """The parameter `for` of an entry of `Forwarded`; "" without one, or if quotes don't match."""
    pairs = [_PAIR.fullmatch(pair) for pair in entry.split(";") if pair.strip()]
    return {p[1].lower(): p[2] for p in pairs if p}.get("for", "") if all(pairs) else ""


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
