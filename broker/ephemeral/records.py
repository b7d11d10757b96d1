"""One-time values as bytes: a line of JSON, a NUL, then the byte strings as they are.

The JSON is an array, a tag with the format's number and then the fields in order; a byte string stands there as its length and
follows behind the NUL, which JSON can't hold. A third smaller than base64 in JSON, and as quick. The app is left out: it is part of every
key's digest, so who finds a record knows it. So is the owner of an offered passkey, the record's user.

A tag that this code doesn't know is of newer code, in a roll-back say: the value is as unknown, and its owner starts over.
"""

from __future__ import annotations

from typing import Any, cast

import orjson

from broker.model import (
    Asked,
    Offered,
    PendingAuthentication,
    PendingRegistration,
    Receipt,
    Redeemable,
    Transaction,
    fields_of,
)

Record = Transaction | PendingRegistration | PendingAuthentication | Redeemable

_KINDS: dict[str, type[Record]] = {
    "t3": Transaction,
    "r4": PendingRegistration,
    "a3": PendingAuthentication,
    "n3": Redeemable,
}
_TAGS = {kind: tag for tag, kind in _KINDS.items()}
_BYTES = frozenset({"challenge", "transaction", "credential_id", "public_key"})
_APP, _OWNER = "app_id", "user_id"
_NOTHING_ASKED = Asked()  # stored as null: most ceremonies


def dump(record: Record) -> bytes:
    """The record as bytes."""
    blobs: list[bytes] = []
    head = orjson.dumps([_TAGS[type(record)], *_values(record, blobs)])
    return b"\0".join((head, b"".join(blobs)))


def _values(record: object, blobs: list[bytes], without: str = "") -> list[object]:
    return [_value(v, blobs) for name, v in fields_of(record).items() if name not in (_APP, without)]


def _value(value: object, blobs: list[bytes]) -> object:
    if isinstance(value, bytes):
        blobs.append(value)
        return len(value)
    if isinstance(value, Asked):
        return None if value == _NOTHING_ASKED else _values(value, blobs)
    if isinstance(value, Receipt):
        return _values(value, blobs)
    if isinstance(value, tuple) and value and isinstance(value[0], Offered):
        return [_values(item, blobs, without=_OWNER) for item in value]
    return value


def load(app_id: str, stored: bytes) -> Record | None:
    """The record of this app; None for a format that this code does not know."""
    head, _, blobs = stored.partition(b"\0")
    tag, *values = orjson.loads(head)
    kind = _KINDS.get(tag)
    if kind is None:
        return None
    built, _ = _build(kind, values, app_id, blobs, 0)
    return cast(Record, built)


def _build(
    kind: type[Any], values: list[Any], app_id: str, blobs: bytes, at: int, owner: str | None = None
) -> tuple[object, int]:
    """An object, and where in `blobs` the next one's bytes begin."""
    found: dict[str, Any] = {}
    given = iter(values)
    for name in kind.__dataclass_fields__:
        if name == _APP or (name == _OWNER and owner is not None):
            found[name] = app_id if name == _APP else owner
            continue
        value = next(given)
        if name in _BYTES:
            if value is not None:
                end = at + int(value)
                value, at = blobs[at:end], end
        elif name == "receipt":
            value, at = _build(Receipt, value, app_id, blobs, at)
        elif name == "asked":
            value = _build(Asked, value, app_id, blobs, at)[0] if value is not None else _NOTHING_ASKED
        elif name == "offered":
            items = []
            for item in value:
                built, at = _build(Offered, item, app_id, blobs, at, found[_OWNER])
                items.append(built)
            value = tuple(items)
        elif isinstance(value, list):
            value = tuple(value)
        found[name] = value
    return kind(**found), at
