"""The declaration of a dialect: its name, settings and policy keys, and how its wire format loads.

The package of a dialect declares it without importing aiohttp, so that every command of `broker`
reads the declarations at little cost. A process that serves loads the wire formats.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from broker.errors import Refusal
from broker.model import Opener, PolicyKey
from broker.settings import Setting

if TYPE_CHECKING:
    from aiohttp import web


class WireFormat(Protocol):
    """The module of a dialect that parses the vendor's requests and renders its answers."""

    PATHS: re.Pattern[str]  # the dialect's own: a fault on one of them is rendered in its shape
    STATUS: Mapping[type[Refusal], int]  # of every refusal

    def routes(self, *, management: bool, browser: bool) -> list[web.RouteDef]:
        """The routes of a port that serves keyed callers, pages, or both."""

    def render(self, refusal: Refusal, request: web.Request | None = None) -> web.Response:
        """A refusal in the dialect's shape. `request` is None if the bytes were not HTTP."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """The declaration of a dialect. `name` is its word in the setting `dialects`, `segments` the
    first segments of its paths, `openers` the openers of its ceremonies. No two dialects share one
    of these.
    """

    name: str
    load: Callable[[], WireFormat]
    segments: tuple[str, ...]
    openers: tuple[Opener, ...]
    signs: bool = False  # signs tokens, which needs a secret key
    settings: tuple[Setting[Any], ...] = ()
    policy_keys: tuple[PolicyKey[Any], ...] = ()
