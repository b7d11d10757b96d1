"""Passlock's mailbox challenges: the broker's mail codes under the vendor's names. The word
"challenge" has this meaning in this module only.

    POST   …/challenges          -> 201 ChallengeCreated: facts, secret, code, message
    GET    …/challenges/{id}     -> Challenge
    POST   …/challenges/verify   -> ChallengeVerified: a whole Challenge, its tag too
    DELETE …/challenges/{id}     -> ChallengeDeleted, also for an unknown id: no client expects a
                                 refusal

The vendor's server SDK decodes by schema. So an absent optional field is left out, and `metadata`
alone is null. Times are milliseconds since the epoch. Verify answers a mistyped code with an error
that its schema names, never with BadRequest.

The application sends the mail. `sendEmail: true` is refused, because the caller would wait for a
mail that is not sent. `name` is ignored. The two paths belong to the client's generations, with and
without `/v2`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler as AnyHandler

from broker.dialects.passlock.fields import switch
from broker.errors import (
    InvalidRequest,
    MailCodeAttempts,
    MailCodeExpired,
    MailCodeRate,
    NotFound,
    Refusal,
    UnknownMailCode,
    WrongMailCode,
)
from broker.mailbox import MailCode
from broker.model import Caller
from broker.web import MAILBOX, Handler, json_answer, read_object
from broker.web.body import optional_text, text_field

_APP = "{app_id:[A-Za-z0-9]{24}}"
PATHS = (f"/v2/{_APP}/challenges", f"/{_APP}/challenges")

TAGS: Mapping[type[Refusal], str] = {
    UnknownMailCode: "@error/InvalidChallenge",
    WrongMailCode: "@error/InvalidChallengeCode",
    MailCodeExpired: "@error/ChallengeExpired",
    MailCodeAttempts: "@error/ChallengeAttemptsExceeded",
    MailCodeRate: "@error/ChallengeRateLimited",
}
STATUS: Mapping[type[Refusal], int] = {
    UnknownMailCode: 404,
    WrongMailCode: 400,
    MailCodeExpired: 410,
    MailCodeAttempts: 410,
    MailCodeRate: 429,
}


def details(refusal: Refusal) -> dict[str, Any]:
    """The fields of an error besides tag and message."""
    return {"retryAfterSeconds": refusal.retry_after} if isinstance(refusal, MailCodeRate) else {}


async def create(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{email, purpose, userId?, metadata?, invalidateOthers?, skipRateLimit?}`."""
    body = await read_object(request)
    metadata = body.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise InvalidRequest("metadata is not an object.", reason="field_type")
    if switch(body, "sendEmail"):
        raise InvalidRequest(
            "sendEmail is not offered: send the message of the answer.", reason="send_email"
        )
    made = await request.app[MAILBOX].create(
        caller.app,
        text_field(body, "email"),
        text_field(body, "purpose"),
        external_id=optional_text(body, "userId"),
        metadata=metadata,
        replace_others=switch(body, "invalidateOthers"),
        skip_rate=switch(body, "skipRateLimit"),
    )
    shown = {
        **_facts(made.code),
        "secret": made.secret,
        "code": made.digits,
        "message": {"html": made.message.html, "text": made.message.text},
    }
    return json_answer({"_tag": "ChallengeCreated", "challenge": shown}, status=201)


async def get(request: web.Request, caller: Caller) -> web.StreamResponse:
    """Read a live challenge."""
    try:
        code = await request.app[MAILBOX].get(caller.app, request.match_info["challenge_id"])
    except UnknownMailCode as unknown:  # the vendor's tag differs from that of verify
        raise NotFound("There is no such challenge.", reason=unknown.reason) from None
    return json_answer(challenge_object(code))


async def verify(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{challengeId, secret, code}`."""
    body = await read_object(request)
    challenge_id, secret, digits = (
        _string(body, name) for name in ("challengeId", "secret", "code")
    )
    code = await request.app[MAILBOX].verify(caller.app, challenge_id, secret, digits)
    return json_answer({"_tag": "ChallengeVerified", "challenge": challenge_object(code)})


async def delete(request: web.Request, caller: Caller) -> web.StreamResponse:
    """End a challenge."""
    await request.app[MAILBOX].delete(caller.app, request.match_info["challenge_id"])
    return json_answer({"_tag": "ChallengeDeleted"})


def routes(guard: Callable[[Handler], AnyHandler]) -> list[web.RouteDef]:
    """The keyed routes, each handler behind `guard`."""
    found: list[web.RouteDef] = []
    for path in PATHS:
        found += [
            web.post(path, guard(create)),
            web.post(f"{path}/verify", guard(verify)),
            web.get(f"{path}/{{challenge_id}}", guard(get), allow_head=False),
            web.delete(f"{path}/{{challenge_id}}", guard(delete)),
        ]
    return found


def challenge_object(code: MailCode) -> dict[str, Any]:
    """A challenge without its secret and its digits. The challenge in the response of create has no
    tag.
    """
    return {"_tag": "Challenge", **_facts(code)}


def _facts(code: MailCode) -> dict[str, Any]:
    found: dict[str, Any] = {"challengeId": code.id, "purpose": code.purpose, "email": code.email}
    if code.external_id is not None:
        found["userId"] = code.external_id
    return found | {
        "createdAt": round(code.created_at * 1000),
        "expiresAt": round(code.expires_at * 1000),
        "metadata": code.metadata,
    }


def _string(body: dict[str, Any], name: str) -> str:
    """A string field. It may be empty, as a form's field that is submitted too early."""
    return text_field(body, name) if body.get(name) != "" else ""
