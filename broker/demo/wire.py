"""Trace of the calls from this backend to the broker, for the diagram beside each step.

A site of yours needs none of this. `TracedClient` is the SDK's client. It appends every request
that it sends to the `TRACE` of the visitor's request, a context variable, so that one client serves
all visitors. An entry has method, path below the app, status, duration, the values that a reader
follows from hop to hop, and the bodies.

Tokens and ids are shortened, in bodies too: 4 of a token's 43 random characters and its last 2
identify it, and leave more than 200 unknown bits. The API key travels in a header and is never
recorded.

`TracedClient.send` overrides the one method that sends requests, and changes no byte of them.
"""

from __future__ import annotations

import json
import re
import time
from contextvars import ContextVar
from typing import Any

from broker.sdk.passkey_broker import Answer, AsyncBrokerClient, Request

# Fields of a body that the diagram shows, with their labels.
_SENT = {
    "transaction_id": "transaction",
    "nonce": "nonce",
    "external_id": "external id",
    "passkey_display_name": "name",
    "purpose": "purpose",
    "identifier": "external id",
}
_GOT = {
    "transaction_id": "transaction",
    "external_id": "external id",
    "purpose": "purpose",
    "code": "code",
}

_TOKEN = re.compile(r"[A-Za-z0-9_+/=.-]{20,}")  # base64url, hex, UUID; a sentence has spaces
BODY_SHOWN = 16_384  # bytes; a longer answer is not shown

# The calls of one request of a visitor, in order, as JSON values.
TRACE: ContextVar[list[dict[str, Any]]] = ContextVar("demo_trace")


def short(text: str) -> str:
    """A token shortened to an identifiable part. A text of up to 14 characters is no token."""
    return f"{text[:8]}…{text[-2:]}" if len(text) > 14 else text


def redacted(value: Any) -> Any:
    """A JSON value whose tokens and ids are shortened."""
    match value:
        case str():
            return short(value) if _TOKEN.fullmatch(value) else value
        case dict():
            return {name: redacted(inner) for name, inner in value.items()}
        case list():
            return [redacted(inner) for inner in value]
        case _:
            return value


def _shown(values: dict[str, Any], words: dict[str, str]) -> dict[str, str]:
    """The labelled fields, with tokens shortened."""
    return {
        words[name]: value if name in ("passkey_display_name", "code") else short(value)
        for name, value in values.items()
        if name in words and isinstance(value, str)
    }


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


class TracedClient(AsyncBrokerClient):
    """`AsyncBrokerClient` that appends each request to the current `TRACE`."""

    async def send(self, request: Request) -> Answer:
        hop: dict[str, Any] = {
            "method": request.method,
            "path": "/".join(short(part) for part in request.path.split("/")),
            "status": "no answer",
            "ms": None,
            "body": redacted(request.body),
            "query": redacted(request.query),
            "answer": None,
            "sent": {**_shown(request.body or {}, _SENT), **_shown(request.query or {}, _SENT)},
            "got": {},
        }
        TRACE.get().append(hop)
        begun = time.perf_counter()
        try:
            answer = await super().send(request)
        finally:
            hop["ms"] = round((time.perf_counter() - begun) * 1000, 1)
        hop["status"] = answer.status
        body = _object(answer.body)
        hop["answer"] = redacted(body) if len(answer.body) <= BODY_SHOWN else None
        hop["got"] = _shown(body, _GOT)
        if isinstance(body.get("user_verified"), bool):
            hop["got"]["person"] = "verified" if body["user_verified"] else "present"
        for name, shown in (("devices", "passkeys"), ("events", "events")):
            if isinstance(body.get(name), list):
                hop["got"][shown] = str(len(body[name]))
        return answer
