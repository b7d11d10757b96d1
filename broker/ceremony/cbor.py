"""Strict CBOR reader for authenticator output: CTAP2 canonical form, in any order of keys.

Accepted: integers, byte and text strings, arrays, maps with integer or text keys, false, true, null
and floats, as WebAuthn L3 §6.5 and §8 use them. Refused: tags, indefinite lengths, other simple
values, lengths and integers longer than their shortest form, equal keys, invalid UTF-8, more than
`DEPTH` levels, more than `MAX_VALUES` values. So the same bytes have one meaning in every reader.
An attestation object of empty values, within its limit of bytes, would take 100 ms to read.

Home-made, because cbor2 (6.2) is too lenient. It can refuse indefinite lengths, equal keys and
depth. It accepts every longer form of a length. It decodes tags to objects (regular expressions,
big decimals, cycles), and each tag has to be switched off by its number.

`read` returns the end of the value. Authenticator data needs that: the public key and the
extensions follow each other without a length.

Source: CTAP 2.1 §8 "Message Encoding"; RFC 8949 §3, §4.2.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from broker.ceremony.reasons import refuse, require

DEPTH = 8
MAX_VALUES = 1000  # with keys; the test vectors of WebAuthn L3 have 20 at most

_FLOATS = {25: ">e", 26: ">f", 27: ">d"}
_SIMPLE = {20: False, 21: True, 22: None}


def read(data: bytes, at: int = 0) -> tuple[Any, int]:
    """Read the value that begins at offset `at`; return the value and the offset of its end.

    Raises:
        CeremonyRefused: "malformed".
    """
    return _read(data, at, DEPTH, iter(range(MAX_VALUES)))


def _read(data: bytes, at: int, depth: int, left: Iterator[int]) -> tuple[Any, int]:
    """As `read`, with at most `depth` levels, and a value for each item of `left`."""
    require(next(left, None) is not None, "malformed", "The CBOR has too many values.")
    head, at = _take(data, at, 1)
    major, low = head[0] >> 5, head[0] & 0x1F
    if major == 7:
        return _simple(data, at, low)
    number, at = _number(data, at, low)
    if major < 2:
        return -1 - number if major else number, at
    if major == 2:
        return _take(data, at, number)
    if major == 3:
        raw, at = _take(data, at, number)
        try:
            return raw.decode(), at
        except UnicodeDecodeError:
            raise refuse("malformed", "A CBOR text is not UTF-8.") from None
    require(major != 6, "malformed", "CBOR tags are not allowed.")
    require(depth > 0, "malformed", "The CBOR is nested too deeply.")
    # An item has one byte at least: the loops below end before a huge number takes memory.
    require(number <= len(data) - at, "malformed", "The CBOR ends too early.")
    if major == 4:
        items = []
        for _ in range(number):
            item, at = _read(data, at, depth - 1, left)
            items.append(item)
        return items, at
    members: dict[int | str, Any] = {}
    for _ in range(number):
        require(
            at >= len(data) or data[at] >> 5 in (0, 1, 3),
            "malformed",
            "A CBOR map has a key that is neither a number nor text.",
        )
        key, at = _read(data, at, 0, left)
        require(key not in members, "malformed", "A CBOR map has the same key twice.")
        members[key], at = _read(data, at, depth - 1, left)
    return members, at


def read_all(data: bytes) -> Any:
    """Read the only value of `data`.

    Raises:
        CeremonyRefused: "malformed", also if bytes follow the value.
    """
    value, end = read(data)
    require(end == len(data), "malformed", "Bytes are left over behind the CBOR.")
    return value


def _take(data: bytes, at: int, count: int) -> tuple[bytes, int]:
    require(count <= len(data) - at, "malformed", "The CBOR ends too early.")
    return data[at : at + count], at + count


def _number(data: bytes, at: int, low: int) -> tuple[int, int]:
    if low < 24:
        return low, at
    require(low <= 27, "malformed", "CBOR of indefinite length is not allowed.")
    size = 1 << (low - 24)
    raw, at = _take(data, at, size)
    number = int.from_bytes(raw, "big")
    shortest = number >= (24 if size == 1 else 1 << (size * 4))
    require(shortest, "malformed", "A CBOR number is not in its shortest form.")
    return number, at


def _simple(data: bytes, at: int, low: int) -> tuple[Any, int]:
    if low in _SIMPLE:
        return _SIMPLE[low], at
    require(low in _FLOATS, "malformed", "CBOR simple values are not allowed.")
    raw, at = _take(data, at, 1 << (low - 24))
    return struct.unpack(_FLOATS[low], raw)[0], at
