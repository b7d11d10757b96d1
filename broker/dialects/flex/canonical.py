"""Canonical JSON (RFC 8785): the form in which an approval is hashed.

A passkey signs a challenge of 64 bytes for an approval: 32 of chance and then SHA-256 of the
canonical form of

    {"data": …, "id": …}

the two members of `approval` as the caller gave them. A caller that keeps the authenticator's
answer can prove later what was approved: take the challenge out of the client data, compute the
digest of the expected approval, and compare the last 32 bytes.

The form is what ECMAScript's `JSON.stringify` writes of a value whose members are sorted by their
names' UTF-16 code units: no white space, short escapes, numbers as the shortest digits that give
the double again. For text, lists, objects with names in ASCII and whole numbers, Python's
`json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)` is the same.

A number that a double can't hold is refused, because two parsers would read two different numbers.
"""

from __future__ import annotations

import hashlib
import json
import math

from broker.errors import InvalidRequest

_EXACT = 2**53 - 1  # RFC 7493 §2.2


def approval_digest(identifier: str, data: object) -> bytes:
    """SHA-256 of the canonical form of `{"data", "id"}`: the end of the challenge."""
    return hashlib.sha256(canonical({"id": identifier, "data": data}).encode()).digest()


def canonical(value: object) -> str:
    """A JSON value in the form of RFC 8785 §3.2.

    Raises:
        InvalidRequest: an integer beyond 2^53 - 1.
    """
    match value:
        case None | bool():
            return json.dumps(value)
        case str():
            # §3.2.2.2: the two escapes that must be, five short ones, \u00xx in lower case for the
            # other control characters.
            return json.dumps(value, ensure_ascii=False)
        case int():
            if abs(value) > _EXACT:
                raise InvalidRequest(
                    "approval.data has a whole number beyond 2^53 - 1, which parsers read differently; send it as text.",
                    reason="number",
                )
            return str(value)
        case float():
            return _number(value)
        case list():
            return "[" + ",".join(map(canonical, value)) + "]"
        case dict():
            members = sorted(value, key=lambda name: name.encode("utf-16-be"))
            return (
                "{"
                + ",".join(f"{canonical(name)}:{canonical(value[name])}" for name in members)
                + "}"
            )
        case _:
            raise TypeError(f"{type(value).__name__} is not JSON")


def _number(value: float) -> str:
    """ECMA-262, Number::toString with radix 10. Python's `repr` has the same shortest digits,
    written otherwise.
    """
    assert math.isfinite(value), "bodies with other numbers are refused before"
    if value == 0:
        return "0"
    mantissa, _, exponent = repr(abs(value)).partition("e")
    before, _, after = mantissa.partition(".")
    after = after.rstrip("0")
    # |value| = 0.digits * 10^point
    point = (
        len(before) + int(exponent or 0) - (len(before + after) - len((before + after).lstrip("0")))
    )
    digits = (before + after).strip("0")
    if 0 < point <= 21:
        whole = digits[:point].ljust(point, "0")
        text = whole + ("." + digits[point:] if len(digits) > point else "")
    elif -6 < point <= 0:
        text = "0." + "0" * -point + digits
    else:
        power = point - 1
        text = (
            digits[0]
            + ("." + digits[1:] if len(digits) > 1 else "")
            + f"e{'+' if power > 0 else '-'}{abs(power)}"
        )
    return "-" + text if value < 0 else text
