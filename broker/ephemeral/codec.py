"""One-time values as bytes: msgpack of the model's types, by msgspec.

A NamedTuple is an array, in the order of its fields. A field that is added, moved or removed is a
new format: raise `VERSION` in `broker.ephemeral.one_time_scripts` with it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from msgspec import DecodeError
from msgspec.msgpack import Decoder, Encoder

__all__ = ["DecodeError", "decode", "encode"]

T = TypeVar("T")

encode = Encoder().encode


def decode(type_: type[T], stored: bytes) -> T:
    """A value of this type.

    Raises:
        DecodeError: the bytes are none.
    """
    value: T = _decoder(type_).decode(stored)
    return value


_decoder: Callable[[Any], Decoder[Any]] = cache(Decoder)
