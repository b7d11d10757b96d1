"""Every way to begin a ceremony, crossed with every way to finish one: only a start's own finishes
find its ceremony.

A foreign finish gets the answer of an unknown ceremony and takes nothing, so the own finish still
works after all of them. The refusal's reason tells the operator that the ceremony waits for another
finish, where both look for it in the same way (`Link`).
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import pytest

from broker.model import Policy
from tests.conftest import OpenApp, Started
from tests.support import hanko
from tests.support.authenticator import Authenticator, b64, unb64
from tests.support.byo import Byo
from tests.support.hanko import Hanko
from tests.support.passlock import Passlock
from tests.support.signals import refused, same_answer
from tests.support.wire import ORIGIN, RP_ID, Answer, Wire

# How a finish finds its ceremony.
Link = Literal["handle", "user", "challenge"]
Kind = Literal["registration", "authentication"]
Options = dict[str, Any]
UNKNOWN: dict[Link, str] = {
    "handle": "handle_unknown",
    "user": "user_has_no_ceremony",
    "challenge": "challenge_unknown",
}
SECOND = {"second_factor": True}
POLICY = Policy(passlock_open_registration=True, declared={"hanko_algorithm": "ES256"})
_NUMBERS = count()


@dataclass(frozen=True)
class Finish:
    """One finish: how it finds a ceremony, of which kind, and its request with a handle, a user and
    an answer.
    """

    link: Link
    kind: Kind
    send: Callable[[Wire, str, str, Options], Awaitable[Answer]]


@dataclass(frozen=True)
class Start:
    """One start for the user ann: its kind, its handle ("" without one) and options, and its own
    finishes.
    """

    link: Link
    kind: Kind
    begin: Callable[[Wire], Awaitable[tuple[str, Options]]]
    own: tuple[str, ...]


# -- finishes --------------------------------------------------------------------------------------


def _of_page(kind: str) -> Callable[[Wire, str, str, Options], Awaitable[Answer]]:
    return lambda wire, handle, _, answer: wire.finish(kind, handle, answer)


def _of_user(kind: str) -> Callable[[Wire, str, str, Options], Awaitable[Answer]]:
    return lambda wire, _, user, answer: wire.keyed(
        "POST", f"/{kind}/finish", {"external_id": user, "credential": answer}
    )


def _of_challenge(
    kind: str, **more: bool
) -> Callable[[Wire, str, str, Options], Awaitable[Answer]]:
    return lambda wire, _, __, answer: wire.keyed(
        "POST", f"/ceremonies/{kind}/finish", {"credential": answer, **more}
    )


def _of_hanko(at: str) -> Callable[[Wire, str, str, Options], Awaitable[Answer]]:
    return lambda wire, _, __, answer: Hanko(wire).send("POST", f"{at}/finalize", answer)


def _of_hankos_page(at: str) -> Callable[[Wire, str, str, Options], Awaitable[Answer]]:
    return lambda wire, _, __, answer: Hanko(wire).page(f"{at}/finalize", answer)


def _of_passlock(prefix: str, kind: Kind) -> Callable[[Wire, str, str, Options], Awaitable[Answer]]:
    return lambda wire, handle, _, answer: Passlock(wire, prefix).finish(kind, handle, answer)


def _of_propelauth(command: str) -> Callable[[Wire, str, str, Options], Awaitable[Answer]]:
    return lambda wire, _, user, answer: Byo(wire).run(command, userId=user, publicKey=answer)


FINISHES: dict[str, Finish] = {
    "page register": Finish("handle", "registration", _of_page("register")),
    "page authenticate": Finish("handle", "authentication", _of_page("authenticate")),
    "user register": Finish("user", "registration", _of_user("register")),
    "user authenticate": Finish("user", "authentication", _of_user("authenticate")),
    "challenge register": Finish("challenge", "registration", _of_challenge("register")),
    "challenge register second": Finish(
        "challenge", "registration", _of_challenge("register", **SECOND)
    ),
    "challenge authenticate": Finish("challenge", "authentication", _of_challenge("authenticate")),
    "challenge authenticate second": Finish(
        "challenge", "authentication", _of_challenge("authenticate", **SECOND)
    ),
    "challenge approve": Finish(
        "challenge", "authentication", _of_challenge("authenticate", approval=True)
    ),
    "challenge approve second": Finish(
        "challenge", "authentication", _of_challenge("authenticate", approval=True, **SECOND)
    ),
    "hanko registration": Finish("challenge", "registration", _of_hanko(hanko.REGISTRATION)),
    "hanko page registration": Finish(
        "challenge", "registration", _of_hankos_page(hanko.REGISTRATION)
    ),
    "hanko second registration": Finish(
        "challenge", "registration", _of_hanko(hanko.SECOND_REGISTRATION)
    ),
    "hanko login": Finish("challenge", "authentication", _of_hanko(hanko.LOGIN)),
    "hanko page login": Finish("challenge", "authentication", _of_hankos_page(hanko.LOGIN)),
    "hanko second login": Finish("challenge", "authentication", _of_hanko(hanko.SECOND_LOGIN)),
    "hanko transaction": Finish("challenge", "authentication", _of_hanko(hanko.TRANSACTION)),
    "passlock registration": Finish("handle", "registration", _of_passlock("/v2", "registration")),
    "passlock authentication": Finish(
        "handle", "authentication", _of_passlock("/v2", "authentication")
    ),
    "passlock B registration": Finish("handle", "registration", _of_passlock("", "registration")),
    "passlock B authentication": Finish(
        "handle", "authentication", _of_passlock("", "authentication")
    ),
    "propelauth registration": Finish(
        "user", "registration", _of_propelauth("FinishPasskeyRegistration")
    ),
    "propelauth authentication": Finish(
        "user", "authentication", _of_propelauth("FinishPasskeyAuthentication")
    ),
}


# -- starts ----------------------------------------------------------------------------------------


def _by_page(kind: str, **asked: Any) -> Callable[[Wire], Awaitable[tuple[str, Options]]]:
    """With a transaction."""

    async def begin(wire: Wire) -> tuple[str, Options]:
        name = {"passkey_display_name": "Ann"} if kind == "register" else {}
        opened = await wire.keyed(
            "POST", f"/transactions/{kind}", {"external_id": "ann", **name, **asked}
        )
        return await wire.begin(kind, opened.json["transaction_id"])

    return begin


def _by_key(path: str, **body: Any) -> Callable[[Wire], Awaitable[tuple[str, Options]]]:
    async def begin(wire: Wire) -> tuple[str, Options]:
        who = {} if "discoverable" in body else {"external_id": "ann"}
        name = {"user_name": "ann"} if "register" in path else {}
        approval = (
            {"approval": {"id": f"a{next(_NUMBERS)}", "data": 1}} if "approval" in body else {}
        )
        answer = await wire.keyed("POST", path, {**who, **name, **body, **approval})
        assert answer.status == 200, answer.body
        return "", answer.json["options"]

    return begin


def _by_hanko(at: str, **body: Any) -> Callable[[Wire], Awaitable[tuple[str, Options]]]:
    async def begin(wire: Wire) -> tuple[str, Options]:
        if at.endswith(hanko.REGISTRATION):
            return "", await Hanko(wire).begin_registration("ann", at=at)
        given = {"transaction_id": f"t{next(_NUMBERS)}", "transaction_data": {"to": "bob"}}
        return "", await Hanko(wire).begin(at, **body, **(given if at == hanko.TRANSACTION else {}))

    return begin


def _by_passlock(
    prefix: str, kind: Kind, *, token: bool
) -> Callable[[Wire], Awaitable[tuple[str, Options]]]:
    async def begin(wire: Wire) -> tuple[str, Options]:
        backend, page = Passlock(wire), Passlock(wire, prefix)
        if kind == "registration":
            body = {"username": "ann"}
            if token:
                body = {"registrationToken": await backend.authorize_registration("ann")}
        else:
            body = {"rpId": RP_ID}
            if token:
                body = {"authenticationToken": await backend.authorize_authentication("ann")}
        return await page.begin(kind, body)

    return begin


async def _by_propelauth(wire: Wire) -> tuple[str, Options]:
    return "", await Byo(wire).begin_registration("ann")


async def _by_propelauth_login(wire: Wire) -> tuple[str, Options]:
    return "", await Byo(wire).begin_authentication("ann")


REGISTERS = ("passlock registration", "passlock B registration")
SIGNS_IN = ("passlock authentication", "passlock B authentication")
LOGINS = ("hanko login", "hanko page login")
CEREMONIES = "/ceremonies/authenticate/start"
STARTS: dict[str, Start] = {
    "page register": Start("handle", "registration", _by_page("register"), ("page register",)),
    "page register second": Start(
        "handle", "registration", _by_page("register", **SECOND), ("page register",)
    ),
    "page authenticate": Start(
        "handle", "authentication", _by_page("authenticate"), ("page authenticate",)
    ),
    "page authenticate second": Start(
        "handle", "authentication", _by_page("authenticate", **SECOND), ("page authenticate",)
    ),
    "page discoverable": Start(
        "handle",
        "authentication",
        lambda wire: wire.begin("authenticate", None),
        ("page authenticate",),
    ),
    "user register": Start("user", "registration", _by_key("/register/start"), ("user register",)),
    "user authenticate": Start(
        "user", "authentication", _by_key("/authenticate/start"), ("user authenticate",)
    ),
    "challenge register": Start(
        "challenge", "registration", _by_key("/ceremonies/register/start"), ("challenge register",)
    ),
    "challenge register second": Start(
        "challenge",
        "registration",
        _by_key("/ceremonies/register/start", **SECOND),
        ("challenge register second",),
    ),
    "challenge authenticate": Start(
        "challenge", "authentication", _by_key(CEREMONIES), ("challenge authenticate",)
    ),
    "challenge discoverable": Start(
        "challenge",
        "authentication",
        _by_key(CEREMONIES, discoverable=True),
        ("challenge authenticate",),
    ),
    "challenge authenticate second": Start(
        "challenge",
        "authentication",
        _by_key(CEREMONIES, **SECOND),
        ("challenge authenticate second",),
    ),
    "challenge approve": Start(
        "challenge", "authentication", _by_key(CEREMONIES, approval=True), ("challenge approve",)
    ),
    "challenge approve second": Start(
        "challenge",
        "authentication",
        _by_key(CEREMONIES, approval=True, **SECOND),
        ("challenge approve second",),
    ),
    "hanko registration": Start(
        "challenge",
        "registration",
        _by_hanko(hanko.REGISTRATION),
        ("hanko registration", "hanko page registration"),
    ),
    "hanko second registration": Start(
        "challenge",
        "registration",
        _by_hanko(hanko.SECOND_REGISTRATION),
        ("hanko second registration",),
    ),
    "hanko login": Start(
        "challenge", "authentication", _by_hanko(hanko.LOGIN, user_id="ann"), LOGINS
    ),
    "hanko keyless login": Start("challenge", "authentication", _by_hanko(hanko.LOGIN), LOGINS),
    "hanko second login": Start(
        "challenge",
        "authentication",
        _by_hanko(hanko.SECOND_LOGIN, user_id="ann"),
        ("hanko second login",),
    ),
    "hanko transaction": Start(
        "challenge",
        "authentication",
        _by_hanko(hanko.TRANSACTION, user_id="ann"),
        ("hanko transaction",),
    ),
    "passlock registration": Start(
        "handle", "registration", _by_passlock("/v2", "registration", token=True), REGISTERS
    ),
    "passlock open registration": Start(
        "handle", "registration", _by_passlock("/v2", "registration", token=False), REGISTERS
    ),
    "passlock authentication": Start(
        "handle", "authentication", _by_passlock("/v2", "authentication", token=True), SIGNS_IN
    ),
    "passlock open authentication": Start(
        "handle", "authentication", _by_passlock("/v2", "authentication", token=False), SIGNS_IN
    ),
    "passlock B registration": Start(
        "handle", "registration", _by_passlock("", "registration", token=True), REGISTERS
    ),
    "passlock B open registration": Start(
        "handle", "registration", _by_passlock("", "registration", token=False), REGISTERS
    ),
    "passlock B authentication": Start(
        "handle", "authentication", _by_passlock("", "authentication", token=True), SIGNS_IN
    ),
    "passlock B open authentication": Start(
        "handle", "authentication", _by_passlock("", "authentication", token=False), SIGNS_IN
    ),
    "propelauth registration": Start(
        "user", "registration", _by_propelauth, ("propelauth registration",)
    ),
    "propelauth authentication": Start(
        "user", "authentication", _by_propelauth_login, ("propelauth authentication",)
    ),
}


# -- each with each --------------------------------------------------------------------------------


def readable(answer: Options) -> Options:
    """The answer with the fields of both kinds, so that a finish of the other kind finds no fault
    of form.
    """
    more = {"attestationObject": "AAAA", "authenticatorData": "AAAA", "signature": "AAAA"}
    return {**answer, "response": {**more, **answer["response"]}}


def reason_of(start: Start, finish: Finish) -> str:
    """The word for the operator. A user has one ceremony of each purpose, so the other purpose's is
    not looked for.
    """
    alike = start.link == finish.link and (start.link != "user" or start.kind == finish.kind)
    return "other_finish" if alike else UNKNOWN[finish.link]


def test_every_start_has_a_finish_and_every_finish_a_start() -> None:
    assert {own for start in STARTS.values() for own in start.own} == FINISHES.keys()


@pytest.mark.parametrize("name", STARTS)
async def test_only_its_own_finishes_find_a_ceremony(
    broker: Started, open_app: OpenApp, device: Authenticator, name: str
) -> None:
    wire, start = await open_app(POLICY), STARTS[name]
    await wire.user("ann", device)
    for own in start.own:
        handle, options = await start.begin(wire)
        if start.kind == "registration":
            answer = Authenticator().register(options, ORIGIN)
        else:
            answer = device.authenticate(options, ORIGIN)
        # Where a start gives no handle, the best that a caller can make up is its challenge in a
        # handle's form.
        shown = handle or f"pbh_{options['challenge'][:43]}"
        for other, finish in FINISHES.items():
            if other in start.own:
                continue
            with refused(broker, "transaction_not_found", reason_of(start, finish)):
                foreign = await finish.send(wire, shown, "ann", readable(answer))
            same_answer(foreign, await _unknown(wire, finish, answer))
        done = await FINISHES[own].send(wire, handle, "ann", answer)
        assert done.status == 200, (own, done.body)
        gone = await FINISHES[own].send(wire, handle, "ann", answer)
        same_answer(gone, await _unknown(wire, FINISHES[own], answer))


async def _unknown(wire: Wire, finish: Finish, answer: Options) -> Answer:
    """The answer of this finish where no handle, no user and no challenge is known."""
    client_data = json.loads(unb64(answer["response"]["clientDataJSON"]))
    made_up = b64(json.dumps(client_data | {"challenge": "A" * 43}).encode())
    response = readable(answer)["response"] | {"clientDataJSON": made_up}
    return await finish.send(wire, "pbh_" + "A" * 43, "nobody", {**answer, "response": response})
