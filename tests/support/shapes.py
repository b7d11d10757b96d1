"""JSON shapes: what a client's decoder takes for a value, written as data.

    str, int, bool           exactly this type; a boolean is no integer
    {"name": …, "more?": …}  an object with these fields; one with `?` may be absent, and is not
                             null where it is there
    [kind]                   a list of one kind
    Word, Whole, Maybe       one of a few words; an integer of so many bits; null or a kind
    Either                   the first kind that fits
    Masked                   a kind that golden files replace by a placeholder
    TIME, OBJECT, NOTHING    RFC 3339 with an offset; any object; no body

`fits` raises AssertionError with the place of the first fault. A closed shape has no field besides
its own, an open one is read by a client that ignores what it does not know.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any


@dataclass(frozen=True, slots=True)
class Whole:
    """An integer of this many bits, signed. Not a float, not a boolean."""

    bits: int


@dataclass(frozen=True, slots=True)
class Word:
    """One of these words."""

    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Maybe:
    """May be null; the key has to be there."""

    kind: object


@dataclass(frozen=True, slots=True)
class Either:
    """One of these kinds."""

    kinds: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Masked:
    """`kind` in an answer, `mask` in a golden file."""

    kind: object
    mask: object


def word(*words: str) -> Word:
    return Word(words)


def either(*kinds: object) -> Either:
    return Either(kinds)


def text(*masks: str) -> Masked:
    """A text that differs from run to run: one of these placeholders."""
    return Masked(str, Word(masks))


OBJECT, NOTHING = "any object", Word(("",))
TIME = Masked("RFC 3339", Word(("<time>",)))
EPOCH = Masked(Whole(64), Word(("<epoch>",)))
EPOCH_MS = Masked(Whole(64), Word(("<epoch ms>",)))
ID = text("<id>")
UUID = text("<uuid>")
BYTES = text("<32 bytes>")
HANDLE = text("<user handle>")


def signed(claims: dict[str, object], *algorithms: str) -> Masked:
    """A signed token with exactly these claims."""
    header = {"alg": Word(algorithms), "kid": ID, "typ": word("JWT")}
    return Masked(str, {"header": header, "claims": claims})


def fits(
    value: Any, kind: object, at: str = "$", *, masked: bool = False, closed: bool = True
) -> None:
    """Fail unless `value` has this shape. `masked`: it is of a golden file. `closed`: no object has
    more fields than its shape.
    """
    how = {"masked": masked, "closed": closed}
    match kind:
        case Masked(kind=inner, mask=mask):
            fits(value, mask if masked else inner, at, **how)
        case Maybe(kind=inner):
            if value is not None:
                fits(value, inner, at, **how)
        case Either(kinds=kinds):
            faults = []
            for inner in kinds:
                try:
                    return fits(value, inner, at, **how)
                except AssertionError as fault:
                    faults.append(str(fault))
            raise AssertionError(" and ".join(faults))
        case Whole(bits=bits):
            assert type(value) is int, f"{at}: {value!r} is no integer"
            assert -(2 ** (bits - 1)) <= value < 2 ** (bits - 1), (
                f"{at}: {value} has more than {bits} bits"
            )
        case Word(words=words):
            assert isinstance(value, str), f"{at}: {value!r} is no text"
            assert value in words, f"{at}: {value!r} is none of {words}"
        case "RFC 3339":
            assert isinstance(value, str), f"{at}: {value!r} is no text"
            assert datetime.fromisoformat(value).tzinfo, f"{at}: {value!r} has no offset"
        case "any object":
            assert isinstance(value, dict), f"{at}: {value!r} is no object"
        case dict():
            assert isinstance(value, dict), f"{at}: {value!r} is no object"
            names = {name.removesuffix("?"): name for name in kind}
            assert not closed or set(value) <= set(names), (
                f"{at}: {set(value) - set(names)} is no field"
            )
            for bare, name in names.items():
                assert bare in value or bare != name, f"{at}: {bare} is missing"
                if bare in value:
                    fits(value[bare], kind[name], f"{at}.{bare}", **how)
        case [inner]:
            assert isinstance(value, list), f"{at}: {value!r} is no list"
            for number, item in enumerate(value):
                fits(item, inner, f"{at}[{number}]", **how)
        case type():
            assert type(value) is kind, f"{at}: {value!r} is not {kind.__name__}"
        case _:
            raise TypeError(f"no such kind: {kind!r}")
    return None
