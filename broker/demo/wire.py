"""What travelled between this backend and the broker, for the diagram beside each step. A site of
yours needs none of this.

`TracedClient` is the SDK's client, and notes every request that it really carries into the `Trace`
of the request being served (a context variable, so that one client and its connections serve all
visitors): method, path below the app, status, duration, the values that a reader follows from hop
to hop, and the bodies. Tokens and ids are cut, in bodies too, to what is enough to recognise them
by and useless otherwise: 4 of a token's 43 random characters and its last 2 leave more than 200
unknown bits. The API key is in a header and never noted.

`TracedClient.send` overrides the one method through which the client carries requests; it changes
nothing of what is sent.
"""

from __future__ import annotations

import json
import re
import time
from contextvars import ContextVar
from typing import Any

from broker.sdk.passkey_broker import Answer, AsyncBrokerClient, Request

# Fields of a body that the diagram shows -> the words it has for them. Everything else stays
# unsaid.
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


_TOKEN = re.compile(
    r"[A-Za-z0-9_+/=.-]{20,}"
)  # base64url, hex, UUID: nothing that a person writes with spaces
BODY_SHOWN = 16_384  # bytes; a longer answer is not shown


class Trace:
    """The calls of one request of a visitor, in order, as JSON values."""

    def __init__(self) -> None:
        self.hops: list[dict[str, Any]] = []


TRACE: ContextVar[Trace] = ContextVar("demo_trace")


def short(text: str) -> str:
    """Enough of a token to recognise it by. What has up to 14 characters is no token and stays
    whole.
    """
    return f"{text[:8]}…{text[-2:]}" if len(text) > 14 else text


def redacted(value: Any) -> Any:
    """A JSON value in which each text that may be a token or an id is cut."""
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
    """The known fields, under their words; tokens cut, names and codes whole."""
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
    """`AsyncBrokerClient` that tells the current `TRACE` of each request it carries."""

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
        TRACE.get().hops.append(hop)
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
        if isinstance(body.get("devices"), list):
            hop["got"]["passkeys"] = str(len(body["devices"]))
        return answer
