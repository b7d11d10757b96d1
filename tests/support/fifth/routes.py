"""The wire format of the fifth dialect."""

from __future__ import annotations

import re
from collections.abc import Mapping

from aiohttp import web

from broker import ceremony, errors
from broker.errors import Refusal
from broker.model import ByUser, Caller, ExpectedCeremony
from broker.web import BROKER, SETTINGS, edge, json_answer, keyed, read_object
from broker.web.body import text_field
from tests.support.fifth import KEEP, LETTERS, OPENER

PATHS = re.compile(r"/fifth/")
_OF_OTHER_ROUTES = (
    errors.UnknownNonce,
    errors.UnknownUser,
    errors.UserDisabled,
    errors.UnknownPasskey,
    errors.UnknownTicket,
    errors.UnknownMailCode,
    errors.WrongMailCode,
    errors.NoPasskeys,
    errors.TooManyPasskeys,
    errors.OwnedAlready,
    errors.DuplicateApproval,
    errors.CeremonyRefused,
    errors.DiscoverableRefused,
)
STATUS: Mapping[type[Refusal], int] = {
    **edge.STATUS,
    **dict.fromkeys(_OF_OTHER_ROUTES, 418),
    errors.InvalidKey: 402,
    errors.UnknownApp: 402,
    errors.UnknownTransaction: 410,
}


def render(refusal: Refusal, _: web.Request | None = None) -> web.Response:
    """`["no", code]`."""
    return json_answer(["no", refusal.code], status=STATUS[type(refusal)])


async def start(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{user}` to the request options."""
    link = ByUser(text_field(await read_object(request), "user"))
    begun = await request.app[BROKER].begin_authentication(caller, link, OPENER)
    return json_answer(["yes", begun.public_key])


async def finish(request: web.Request, caller: Caller) -> web.StreamResponse:
    """`{user, answer}` to `{name, keep}`."""
    body = await read_object(request)
    user, answer = text_field(body, "user"), ceremony.parse_authentication(body.get("answer"))
    await request.app[BROKER].finish_authentication(
        caller, ByUser(user), answer, ExpectedCeremony((OPENER,))
    )
    name = user.upper() if caller.app.policy[LETTERS] == "capital" else user.lower()
    return json_answer(["yes", {"name": name, "keep": request.app[SETTINGS][KEEP]}])


def routes(*, management: bool, browser: bool) -> list[web.RouteDef]:
    """Where keyed callers are served."""
    posts = {"start": start, "finish": finish} if management else {}
    return [web.post(f"/fifth/{{app_id}}/{name}", keyed(posts[name])) for name in posts]
