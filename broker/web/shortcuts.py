"""Finding a route without asking the router.

aiohttp's router tries the resources of a path one after the other, each with a regular expression:
some ten microseconds where an API has dozens of routes. Most templates here are fixed but for an
app's id, which has one form. What such a path leads to is remembered whole, as the match that the
router would have made: one look-up in a dictionary finds it again.

The router stays the judge. A path is looked at only where its template has no variable besides the
app's id, and each such template is tried against every resource: at the start with a sample, and
with each new path against those that may take one id and not another. Where another one may answer,
there is no shortcut. Paths that are written in another way (percent-encoded, with a query), ids of
another form, and methods that a template doesn't have go to the router.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from aiohttp import web
from aiohttp.typedefs import Handler
from aiohttp.web_urldispatcher import AbstractResource, UrlMappingMatchInfo

_ID = 24  # ASCII alphanumerics
_ONE_VARIABLE = re.compile(r"([^{}]*/)\{(\w+)\}(/[^{}]*)?\Z")
_CHOOSY = re.compile(
    r"\{\w+:|/[A-Za-z0-9]{24}(?:/|\Z)"
)  # a template that may take one id and not another
_OPEN = re.compile(r"\{\w+\}|(?<=/)[A-Za-z0-9]{24}(?=/|\Z)")  # where an id may stand in it
_REMEMBERED = 4096  # paths; each is one of ours with an id in it, so of bounded length


class Way(NamedTuple):
    """What a path leads to. `route` is the template."""

    handler: Handler
    match: UrlMappingMatchInfo
    route: str


class Shortcuts:
    """What paths of `app` lead to."""

    def __init__(self, app: web.Application) -> None:
        self._app = app
        self._routes: dict[
            tuple[str, str, str], tuple[web.AbstractRoute, str, list[AbstractResource]]
        ] = {}
        self._plain: dict[tuple[str, str], Way] = {}
        resources = list(app.router.resources())
        choosy = [resource for resource in resources if _CHOOSY.search(_written(resource))]
        for resource in resources:
            found = _ONE_VARIABLE.match(resource.canonical)
            sample = f"{found[1]}{'a' * _ID}{found[3] or ''}" if found else resource.canonical
            for route in resource:
                if "{" in sample or any(_rivals(other, route, sample) for other in resources):
                    continue
                if found:
                    may_rival = [other for other in choosy if _takes_some(other, sample)]
                    self._routes[route.method, found[1], found[3] or ""] = (
                        route,
                        found[2],
                        may_rival,
                    )
                else:
                    self._plain[route.method, sample] = self._way({}, route)
        self._prefixes = tuple(
            sorted({prefix for _, prefix, _ in self._routes}, key=len, reverse=True)
        )
        self._known = self._plain.copy()

    def find(self, method: str, path: str) -> Way | None:
        """What the request's path, as it was sent, leads to; None where only the router can tell.
        It is shared: change nothing of it.
        """
        return self._known.get((method, path)) or self._look(method, path)

    def _look(self, method: str, path: str) -> Way | None:
        for prefix in self._prefixes:
            if not path.startswith(prefix):
                continue
            end = len(prefix) + _ID
            identifier = path[len(prefix) : end]
            found = self._routes.get((method, prefix, path[end:]))
            if found and len(identifier) == _ID and identifier.isascii() and identifier.isalnum():
                route, variable, may_rival = found
                if any(_rivals(other, route, path) for other in may_rival):
                    return None
                if len(self._known) >= _REMEMBERED:
                    self._known = self._plain.copy()
                way = self._known[method, path] = self._way({variable: identifier}, route)
                return way
        return None

    def _way(self, variables: dict[str, str], route: web.AbstractRoute) -> Way:
        match = UrlMappingMatchInfo(variables, route)
        match.add_app(self._app)
        match.freeze()
        return Way(route.handler, match, route.resource.canonical if route.resource else "")


def _written(resource: AbstractResource) -> str:
    """The template with the patterns of its variables."""
    return resource._orig_path if isinstance(resource, web.DynamicResource) else resource.canonical


def _takes_some(resource: AbstractResource, sample: str) -> bool:
    """Whether the resource may take this path if another id stood in it."""
    form = ".*".join(map(re.escape, _OPEN.split(resource.canonical)))
    return not isinstance(resource, web.Resource) or re.fullmatch(form, sample) is not None


def _rivals(resource: AbstractResource, route: web.AbstractRoute, path: str) -> bool:
    """Whether `resource`, and not `route`, may answer such a request for this path."""
    if resource is route.resource:  # a folder or another application looks further by itself
        return not isinstance(resource, web.Resource) or resource._match(path) is None
    if not isinstance(resource, web.Resource):
        return path.startswith(resource.canonical)
    return resource._match(path) is not None and any(
        r.method in (route.method, "*") for r in resource
    )
