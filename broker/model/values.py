"""Parsers of the values that operators choose, shared by settings and policy keys.

A parser takes the text of an environment variable or of `--set`. It raises `ValueError` for a text
that it does not take, with what it takes as a noun phrase. The caller makes the sentence, because
only a policy key may quote the text: a setting can hold a secret.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Values(Generic[T]):
    """A parser, and the values that it takes in words, for a list."""

    in_words: str
    parse: Callable[[str], T]

    def __call__(self, text: str) -> T:
        """The value of a text.

        Raises:
            ValueError: with what it takes as a noun phrase.
        """
        return self.parse(text)


def choice(*choices: Any) -> Values[Any]:
    """One of some words."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return text

    return Values(", ".join(choices), parse)


def whole(low: int, high: int) -> Values[int]:
    """A whole number within limits."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return int(text)

    return Values(f"{low} to {high}", parse)


def _switch(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("true or false")
    return text == "true"


SWITCH = Values("true, false", _switch)


class Rate(NamedTuple):
    """A rate limit: one request each `interval` (ms), and `burst` of them at once. A burst of 0: no
    limit.
    """

    interval: int
    burst: int


UNLIMITED = Rate(1, 0)
DEFAULT_RATE = "default"  # the setting of the same name
_RATE = re.compile(r"([1-9][0-9]{0,8})/(s|min):([1-9][0-9]{0,8})")
_UNITS = {"s": 1000, "min": 60_000}  # ms
_RATE_WORDS = "a rate with its burst like 600/min:300 or 200/s:400, at most 1000/s, or 0"


@lru_cache(maxsize=256)
def rate_of(text: str) -> Rate | None:
    """The value of a rate's text; None: the setting decides.

    Raises:
        ValueError: with what it takes as a noun phrase.
    """
    if text == DEFAULT_RATE:
        return None
    if text == "0":
        return UNLIMITED
    found = _RATE.fullmatch(text)
    if found is None or int(found[1]) > _UNITS[found[2]]:
        raise ValueError(_RATE_WORDS)
    return Rate(round(_UNITS[found[2]] / int(found[1])), int(found[3]))


def rate(text: str) -> str:
    """The text of a rate, as a setting has it."""
    if rate_of(text) is None:
        raise ValueError(_RATE_WORDS)
    return text


def _rate_or_default(text: str) -> str:
    try:
        return text if text == DEFAULT_RATE else rate(text)
    except ValueError:
        raise ValueError(f"{_RATE_WORDS}, or {DEFAULT_RATE}") from None


RATE = Values(f"{DEFAULT_RATE}, {_RATE_WORDS}; {DEFAULT_RATE} is the setting", _rate_or_default)


def items(text: str) -> tuple[str, ...]:
    """The items of a list with commas."""
    return tuple(filter(None, map(str.strip, text.split(","))))
