"""A strict reader of the CBOR that authenticators write: CTAP2 canonical form, less its order of
keys.

Only what WebAuthn L3 §6.5 and §8 use is read: integers, byte and text strings, arrays, maps with
integer or text keys, false, true, null and floats. Tags, indefinite lengths, other simple values,
lengths and integers not in their shortest form, equal keys, invalid UTF-8 and more than `DEPTH`
levels are refused, so two readers can't see two values in the same bytes, and no tag can make a
library build something (a regular expression, a cycle, a huge number) out of a stranger's bytes.
cbor2 reads all of these, and can't be told to leave tags alone. It tells where the value ended,
which authenticator data needs, for there the public key and the extensions follow each other
without a length. Work and memory are linear in the input.

Source: CTAP 2.1 §8 "Message Encoding"; RFC 8949 §3, §4.2.
"""

from __future__ import annotations

import struct
from typing import Any

from broker.ceremony.verdict import refuse

DEPTH = 8

_FLOATS = {25: ">e", 26: ">f", 27: ">d"}
_SIMPLE = {20: False, 21: True, 22: None}


def read(data: bytes, at: int = 0, depth: int = DEPTH) -> tuple[Any, int]:
    """Read the value that begins at offset `at`; return it with the offset behind it.

    Raises:
        CeremonyRefused: "malformed".
    """
    head, at = _take(data, at, 1)
    major, low = head[0] >> 5, head[0] & 0x1F
    if major == 7:
        return _simple(data, at, low)
    number, at = _number(data, at, low)
    if major == 0:
        return number, at
    if major == 1:
        return -1 - number, at
    if major == 2:
        return _take(data, at, number)
    if major == 3:
        raw, at = _take(data, at, number)
        try:
            return raw.decode(), at
        except UnicodeDecodeError:
            raise refuse("malformed", "A CBOR text is not UTF-8.") from None
    if major == 6:
        raise refuse("malformed", "CBOR tags are not allowed.")
    if depth == 0:
        raise refuse("malformed", "The CBOR is nested too deeply.")
    if number > len(data) - at:
        raise refuse("malformed", "The CBOR ends too early.")
    if major == 4:
        items = []
        for _ in range(number):
            item, at = read(data, at, depth - 1)
            items.append(item)
        return items, at
    members: dict[int | str, Any] = {}
    for _ in range(number):
        if at < len(data) and data[at] >> 5 not in (0, 1, 3):
            raise refuse("malformed", "A CBOR map has a key that is neither a number nor text.")
        key, at = read(data, at, 0)
        if key in members:
            raise refuse("malformed", "A CBOR map has the same key twice.")
        members[key], at = read(data, at, depth - 1)
    return members, at


def read_all(data: bytes) -> Any:
    """Read the one value that `data` consists of.

    Raises:
        CeremonyRefused: "malformed", also for bytes behind it.
    """
    value, end = read(data)
    if end != len(data):
        raise refuse("malformed", "Bytes are left over behind the CBOR.")
    return value


def _take(data: bytes, at: int, count: int) -> tuple[bytes, int]:
    if count > len(data) - at:
        raise refuse("malformed", "The CBOR ends too early.")
    return data[at : at + count], at + count


def _number(data: bytes, at: int, low: int) -> tuple[int, int]:
    if low < 24:
        return low, at
    if low > 27:
        raise refuse("malformed", "CBOR of indefinite length is not allowed.")
    size = 1 << (low - 24)
    raw, at = _take(data, at, size)
    number = int.from_bytes(raw, "big")
    if number < (24 if size == 1 else 1 << (size * 4)):
        raise refuse("malformed", "A CBOR number is not in its shortest form.")
    return number, at


def _simple(data: bytes, at: int, low: int) -> tuple[Any, int]:
    if low in _SIMPLE:
        return _SIMPLE[low], at
    if low not in _FLOATS:
        raise refuse("malformed", "CBOR simple values are not allowed.")
    raw, at = _take(data, at, 1 << (low - 24))
    return struct.unpack(_FLOATS[low], raw)[0], at
