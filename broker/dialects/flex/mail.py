"""Mail codes in the Flex API: keyed routes under `/v1/apps/{app_id}/mail_codes`.

    POST   /mail_codes          {email, purpose, external_id?, metadata?, invalidate_others?,
           skip_rate_limit?} -> 201 {mail_code}
    POST   /mail_codes/verify   {id, secret, code} -> {mail_code}
    GET    /mail_codes/{id}     -> {mail_code}
    DELETE /mail_codes/{id}     -> 200, empty, also for an unknown id

Only the response to the creation has `secret`, `code` and `message`. `external_id` and `metadata`
are null if the request had none.
"""

from __future__ import annotations

from typing import Any

from aiohttp import web

from broker.dialects.flex.objects import rfc3339
from broker.durable import instant
from broker.errors import InvalidRequest
from broker.mailbox import MailCode
from broker.model import Caller
from broker.web import MAILBOX, json_answer, keyed, read_object
from broker.web.body import optional_text, text_field


async def create(request: web.Request, caller: Caller) -> web.StreamResponse:
    """Create a mail code and its message. The caller sends the mail."""
    body = await read_object(request)
    metadata = body.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise InvalidRequest("metadata is not an object.", reason="field_type")
    made = await request.app[MAILBOX].create(
        caller.app,
        text_field(body, "email"),
        text_field(body, "purpose"),
        external_id=optional_text(body, "external_id"),
        metadata=metadata,
        replace_others=_switch(body, "invalidate_others"),
        skip_rate=_switch(body, "skip_rate_limit"),
    )
    shown = {
        **mail_code_object(made.code),
        "secret": made.secret,
        "code": made.digits,
        "message": {"html": made.message.html, "text": made.message.text},
    }
    return json_answer({"mail_code": shown}, status=201)


async def verify(request: web.Request, caller: Caller) -> web.StreamResponse:
    """Redeem a mail code with the digits that the person typed."""
    body = await read_object(request)
    code_id, secret, digits = (text_field(body, name) for name in ("id", "secret", "code"))
    return json_answer(
        {
            "mail_code": mail_code_object(
                await request.app[MAILBOX].verify(caller.app, code_id, secret, digits)
            )
        }
    )


async def get(request: web.Request, caller: Caller) -> web.StreamResponse:
    """Read a live mail code."""
    code = await request.app[MAILBOX].get(caller.app, request.match_info["mail_code_id"])
    return json_answer({"mail_code": mail_code_object(code)})


async def delete(request: web.Request, caller: Caller) -> web.StreamResponse:
    """End a mail code."""
    await request.app[MAILBOX].delete(caller.app, request.match_info["mail_code_id"])
    return web.Response(status=200)


def routes(base: str) -> list[web.RouteDef]:
    """The keyed routes below `base`, the path of an app."""
    return [
        web.post(f"{base}/mail_codes", keyed(create)),
        web.post(f"{base}/mail_codes/verify", keyed(verify)),
        web.get(f"{base}/mail_codes/{{mail_code_id}}", keyed(get), allow_head=False),
        web.delete(f"{base}/mail_codes/{{mail_code_id}}", keyed(delete)),
    ]


def mail_code_object(code: MailCode) -> dict[str, Any]:
    """A mail code without its secret and its digits."""
    return {
        "id": code.id,
        "purpose": code.purpose,
        "email": code.email,
        "external_id": code.external_id,
        "metadata": code.metadata,
        "created_at": rfc3339(instant(code.created_at)),
        "expires_at": rfc3339(instant(code.expires_at)),
        "attempts_left": code.attempts_left,
    }


def _switch(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest(f"{name} is true or false.", reason="field_type")
    return bool(value)
