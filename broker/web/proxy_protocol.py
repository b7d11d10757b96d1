"""PROXY protocol, versions 1 and 2: the client's address at the beginning of a connection.

A proxy that forwards TCP adds no HTTP header, so it writes the address before the first byte of the
connection. The header is not authenticated: where it is expected, only the proxy may reach the
port. A connection without a header is refused (§2: "The receiver MUST NOT try to guess whether the
protocol header is present or not").

Source: https://www.haproxy.org/download/2.9/doc/proxy-protocol.txt
"""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import NamedTuple

_V1 = re.compile(rb"PROXY (?:UNKNOWN[^\r\n]*|(TCP4|TCP6) (\S+) \S+ [0-9]{1,5} [0-9]{1,5})\r\n")
_V1_MOST = 107  # bytes
_V2 = b"\r\n\r\n\0\r\nQUIT\n"
_V2_HEAD = 16
_V2_MOST = 4096  # bytes behind the head, which the protocol lets be 65535
_V2_LENGTHS = {0x11: 4, 0x12: 4, 0x21: 16, 0x22: 16}  # bytes of an address over IPv4, over IPv6


class ProxyHeader(NamedTuple):
    """A whole header: its length in bytes, and the client's address. None: the connection is the
    proxy's own, such as a health check.
    """

    length: int
    source: str | None


def read_header(data: bytes) -> ProxyHeader | None:
    """The header that `data` begins with; None while it is incomplete.

    Raises:
        ValueError: `data` begins with no header.
    """
    if data[:12] == _V2[: len(data)]:
        return _read_v2(data)
    if not data.startswith(b"PROXY "[: len(data)]) or (b"\n" not in data and len(data) >= _V1_MOST):
        raise ValueError("no PROXY header")
    if b"\n" not in data:
        return None
    found = _V1.match(data)
    if found is None or found.end() > _V1_MOST:
        raise ValueError("no PROXY header")
    source = str(ip_address(found[2].decode("ascii"))) if found[2] else None
    return ProxyHeader(found.end(), source)


def _read_v2(data: bytes) -> ProxyHeader | None:
    if len(data) < _V2_HEAD:
        return None
    version, command = divmod(data[12], 16)
    more = int.from_bytes(data[14:_V2_HEAD], "big")
    if version != 2 or command > 1 or more > _V2_MOST:
        raise ValueError("no PROXY header")
    size = _V2_LENGTHS.get(data[13]) if command else None
    if size and more < 2 * size + 4:
        raise ValueError("a PROXY header without addresses")
    if len(data) < _V2_HEAD + more:
        return None
    source = str(ip_address(data[_V2_HEAD : _V2_HEAD + size])) if size else None
    return ProxyHeader(_V2_HEAD + more, source)
