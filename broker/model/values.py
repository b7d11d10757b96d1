"""Parsers of the values that operators choose, shared by settings and policy keys.

A parser takes the text of an environment variable or of `--set`. It raises `ValueError` for a text
that it does not take, with what it takes as a noun phrase. The caller makes the sentence, because
only a policy key may quote the text: a setting can hold a secret.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

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


def items(text: str) -> tuple[str, ...]:
    """The items of a list with commas."""
    return tuple(filter(None, map(str.strip, text.split(","))))
