"""Shared aiohttp plumbing of every dialect: guards, bodies, the edge that turns refusals into
answers, the HTTP server.

body     bytes -> an object every JSON parser agrees on; limits of size and time
guards   who may call a route: API key, registered origin, anybody; CORS
edge     one place where requests get an id, a deadline, a log line, and refusals a status
client_address  the network that rate limits count a request under
proxy_protocol  the client's address at the beginning of a connection
refused_origins  an event and a line for the operator, rate-limited
server   aiohttp's protocol with limits on slow heads, and error answers that hold no request bytes
"""

from __future__ import annotations

from broker.web.answer import json_answer
from broker.web.body import LIMITS, Limits, read_object
from broker.web.client_address import CLIENT_ADDRESS, ClientAddress
from broker.web.edge import Edge, Renderer, TracedEdge
from broker.web.guards import (
    BROKER,
    DIRECTORY,
    MAILBOX,
    METRICS,
    PUBLIC_URL,
    RATE_LIMITS,
    REFUSED_ORIGINS,
    SETTINGS,
    SIGNALS,
    SIGNING,
    Access,
    Handler,
    access_of,
    authorise,
    bearer,
    browser_routes,
    header,
    keyed,
    preflight_any,
    public,
    public_app,
)
from broker.web.refused_origins import RefusedOrigins
from broker.web.server import Listener, listen

__all__ = [
    "BROKER",
    "CLIENT_ADDRESS",
    "DIRECTORY",
    "LIMITS",
    "MAILBOX",
    "METRICS",
    "PUBLIC_URL",
    "RATE_LIMITS",
    "REFUSED_ORIGINS",
    "SETTINGS",
    "SIGNALS",
    "SIGNING",
    "Access",
    "ClientAddress",
    "Edge",
    "Handler",
    "Limits",
    "Listener",
    "RefusedOrigins",
    "Renderer",
    "TracedEdge",
    "access_of",
    "authorise",
    "bearer",
    "browser_routes",
    "header",
    "json_answer",
    "keyed",
    "listen",
    "preflight_any",
    "public",
    "public_app",
    "read_object",
]
