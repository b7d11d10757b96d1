"""Route cache: the handlers that aiohttp's router found, by method and path.

The router tries the resources of a path one after the other, each with a regular expression: 10 to
20 µs a request for an API with dozens of routes. Its result depends on method and path alone. So
one dictionary look-up by the raw method and path replaces it.

Only routes with at most one variable, the app's id, on paths of bounded length are cached. Ids of
users or passkeys differ from request to request, and would evict the routes of a login.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from aiohttp import web
from aiohttp.typedefs import Handler
from aiohttp.web_urldispatcher import UrlMappingMatchInfo

CAPACITY = 4096  # paths
LONGEST_PATH = 128  # characters


class RouteMatch(NamedTuple):
    """The router's result: the handler within its applications' middlewares, the variables, and the
    template ("unmatched" without a route). Requests share the match, so it must not be changed.
    """

    handler: Handler
    match: UrlMappingMatchInfo
    template: str


class RouteCache:
    """The routes of `app` and of the applications in it."""

    def __init__(self, app: web.Application) -> None:
        self._app = app
        self._known: dict[tuple[str, str], RouteMatch] = {}

    def find(self, request: web.Request) -> RouteMatch | None:
        """A route that was resolved before."""
        return self._known.get((request.method, request.raw_path))

    async def resolve(self, request: web.Request) -> RouteMatch:
        """Resolve a request by the router. Without a route, the handler raises aiohttp's error."""
        match = await self._app.router.resolve(request)
        match.add_app(self._app)
        match.freeze()
        handler = match.handler
        for middleware in [each for app in match.apps for each in app.middlewares][::-1]:
            handler = partial(middleware, handler=handler)
        resource = match.route.resource
        found = RouteMatch(handler, match, resource.canonical if resource else "unmatched")
        path = request.raw_path
        if match.http_exception is None and len(match) < 2 and len(path) <= LONGEST_PATH:
            if len(self._known) >= CAPACITY:
                self._known.clear()
            self._known[request.method, path] = found
        return found
