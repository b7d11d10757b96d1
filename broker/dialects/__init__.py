"""Vendors' wire formats. A dialect only translates: parse the vendor's body, call one verb, render
the vendor's answer.

Each module is a `Dialect`, and `broker.app` lists them: a further one is a module here and a line
there. README.md holds the glossary, and each dialect's folder a page with every deviation.
"""

from __future__ import annotations

import re
from typing import Protocol

from aiohttp import web

from broker.errors import Refusal


class Dialect(Protocol):
    """What a dialect's module offers. Its name is the word of the setting `dialects`."""

    __name__: str
    PATHS: re.Pattern[str]  # the paths that are its own; what goes wrong there is told in its shape
    SIGNS: bool  # whether it signs tokens; then it answers only where there is a secret key

    def routes(self, *, management: bool, browser: bool) -> list[web.RouteDef]:
        """The routes of a port that serves keyed callers, pages, or both."""

    def render(self, refusal: Refusal, request: web.Request | None = None) -> web.Response:
        """A refusal in its shape; the request is there for shapes that depend on it, None where the
        bytes were no HTTP.
        """
