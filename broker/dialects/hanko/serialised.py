"""Serialisation of an approved payload before it is hashed: JSON as Go's encoding/json writes a
value that it has read.

The vendor's server decodes `transaction_data` into Go's own types, writes it again, and puts
SHA-256 of the transaction id and that text into the challenge. A later verifier computes the same
text, so this module reproduces it byte for byte. Object keys are sorted by their UTF-8 bytes, and
there is no white space. Strings have the escapes that Go's HTML-safe encoder writes, and every
number is a double in its shortest form. Go 1.22 and newer write `\\b` and `\\f` for U+0008 and
U+000C, as here; older ones wrote `\\u0008` and `\\u000c`.

So numbers of a payload keep 53 bits (9007199254740993 is hashed as 9007199254740992, 1.0 as 1), and
`-0` keeps its sign. JSON that parsers disagree on does not reach this module: `broker.web.body`
refuses duplicate keys, lone surrogates, invalid UTF-8, NUL, numbers beyond 64
bits that are written as integers, and nesting below 32 levels.
"""

from __future__ import annotations

import json
import re

# Python's `json` writes none of these as Go does: Go escapes characters with a meaning in HTML and
# JavaScript, and does not escape U+007F.
_ESCAPED = re.compile('[\\x00-\\x1f"\\\\<>&\u2028\u2029]')
_SHORT = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def go_json(value: object) -> str:
    """Serialise a value as Go's `json.Marshal` does. The value comes from `json.loads`; integers
    become doubles.

    Raises:
        ValueError: not a JSON value: NaN, an infinity, or an object of another kind.
        OverflowError: an integer beyond a double.
    """
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            return _text(value)
        case int() | float():
            return _number(float(value))
        case list():
            return "[" + ",".join(map(go_json, value)) + "]"
        case dict():
            # Code points sort as their UTF-8 bytes do.
            return "{" + ",".join(f"{_text(k)}:{go_json(value[k])}" for k in sorted(value)) + "}"
        case _:
            raise ValueError(f"{type(value).__name__} is not JSON")


def go_json_again(body: bytes, name: str) -> str:
    """Parse a JSON object that has passed `broker.web.body` with Go's numbers, and serialise its
    member `name`.
    """
    return go_json(json.loads(body, parse_int=float)[name])


def _text(value: str) -> str:
    return (
        '"'
        + _ESCAPED.sub(lambda found: _SHORT.get(found[0]) or f"\\u{ord(found[0]):04x}", value)
        + '"'
    )


def _number(value: float) -> str:
    """The shortest digits that parse to the same double: plain between 1e-6 and 1e21, otherwise
    with an exponent, as in ECMAScript.
    """
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError("no JSON number")
    mantissa, _, exponent = repr(value).lstrip("-").partition("e")
    whole, _, fraction = mantissa.partition(".")
    fraction = fraction.rstrip("0")
    # value = 0.digits * 10**point
    digits = (whole + fraction).lstrip("0")
    point = len(whole) + int(exponent or 0) - (len(whole + fraction) - len(digits))
    digits = digits.rstrip("0")
    sign = "-" if repr(value).startswith("-") else ""
    if not digits:
        return sign + "0"
    if -5 <= point <= 21:  # 1e-6 <= value < 1e21
        if point <= 0:
            return f"{sign}0.{'0' * -point}{digits}"
        padded = digits.ljust(point, "0")
        return sign + padded[:point] + (f".{padded[point:]}" if len(padded) > point else "")
    power = point - 1
    fraction = "." + digits[1:] if len(digits) > 1 else ""
    return f"{sign}{digits[0]}{fraction}e{'+' if power > 0 else '-'}{abs(power)}"
