"""Finding a route without asking the router.

aiohttp's router tries the resources of a path one after the other, each with a regular expression: some ten microseconds where an API has
dozens of routes. Most templates here are fixed but for an app's id, which has one form. What such a path leads to is remembered whole, as
the match that the router would have made: one look-up in a dictionary finds it again.

The router stays the judge. A path is looked at only where its template has no variable besides the app's id, and at the start each such
template is tried against every resource in the router's order: where another one would have answered, there is no shortcut. Paths that are
written in another way (percent-encoded, with a query), ids of another form, and methods that a template doesn't have go to the router.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from aiohttp import web
from aiohttp.typedefs import Handler
from aiohttp.web_urldispatcher import AbstractResource, UrlMappingMatchInfo

_ID = 24  # ASCII alphanumerics
_ONE_VARIABLE = re.compile(r"([^{}]*/)\{(\w+)\}(/[^{}]*)?\Z")
_REMEMBERED = 4096  # paths; each is one of ours with an id in it, so of bounded length


class Way(NamedTuple):
    """What a path leads to."""

    handler: Handler
    match: UrlMappingMatchInfo


class Shortcuts:
    """What paths of `app` lead to."""

    def __init__(self, app: web.Application) -> None:
        self._app = app
        self._routes: dict[tuple[str, str, str], tuple[web.AbstractRoute, str]] = {}
        self._plain: dict[tuple[str, str], Way] = {}
        resources = list(app.router.resources())
        for resource in resources:
            found = _ONE_VARIABLE.match(resource.canonical)
            sample = f"{found[1]}{'a' * _ID}{found[3] or ''}" if found else resource.canonical
            for route in resource:
                if "{" in sample or any(_rivals(other, route, sample) for other in resources):
                    continue
                if found:
                    self._routes[route.method, found[1], found[3] or ""] = route, found[2]
                else:
                    self._plain[route.method, sample] = self._way({}, route)
        self._prefixes = tuple(sorted({prefix for _, prefix, _ in self._routes}, key=len, reverse=True))
        self._known = self._plain.copy()

    def find(self, method: str, path: str) -> Way | None:
        """What the request's path, as it was sent, leads to; None where only the router can tell. It is shared: change nothing of it."""
        return self._known.get((method, path)) or self._look(method, path)

    def _look(self, method: str, path: str) -> Way | None:
        for prefix in self._prefixes:
            if not path.startswith(prefix):
                continue
            end = len(prefix) + _ID
            identifier = path[len(prefix) : end]
            found = self._routes.get((method, prefix, path[end:]))
            if found and len(identifier) == _ID and identifier.isascii() and identifier.isalnum():
                if len(self._known) >= _REMEMBERED:
                    self._known = self._plain.copy()
                route, variable = found
                way = self._known[method, path] = self._way({variable: identifier}, route)
                return way
        return None

    def _way(self, variables: dict[str, str], route: web.AbstractRoute) -> Way:
        match = UrlMappingMatchInfo(variables, route)
        match.add_app(self._app)
        match.freeze()
        return Way(route.handler, match)


def _rivals(resource: AbstractResource, route: web.AbstractRoute, path: str) -> bool:
    """Whether `resource`, and not the one of `route`, may answer such a request for this path."""
    if resource is route.resource:
        return not isinstance(
            resource, web.Resource
        )  # a folder or another application: they look further by themselves
    if not isinstance(resource, web.Resource):
        return path.startswith(resource.canonical)
    return resource._match(path) is not None and any(r.method in (route.method, "*") for r in resource)
