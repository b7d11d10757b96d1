"""The backend's client against a scripted broker: what it sends, what it makes of answers, and that
it sends everything once.

The server here stands in for the broker, never for the client; each test runs with the blocking
client and with the asynchronous one.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import FrozenInstanceError
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web

from broker.sdk import client as former
from broker.sdk import passkey_broker as sdk
from broker.sdk.passkey_broker import AsyncBrokerClient, BrokerClient, Passkey, Receipt
from tests.support.scripted import APP, KEY, KINDS, Caller, ScriptedBroker, scripted_broker

AT = "2026-01-16T12:00:00.250000Z"

RECEIPT: dict[str, Any] = {
    "external_id": "ada",
    "user_id": "U" * 24,
    "purpose": "authenticate",
    "passkey_id": "P" * 24,
    "credential_id": "AQID_-8",
    "origin": "https://example.com",
    "user_present": True,
    "user_verified": True,
    "backup_eligible": True,
    "backed_up": False,
    "backup_changed": False,
    "counter_regressed": False,
    "attestation": "none",
    "authenticator_name_claimed": None,
    "at": AT,
}
DEVICE: dict[str, Any] = {
    "id": "P" * 24,
    "cred_id": "AQID_-8",
    "friendly_name": "Ada's phone",
    "type": "passkey",
    "usage_count": 2,
    "created_at": AT,
    "updated_at": AT,
    "last_login_at": AT,
    "icons": {"light": None, "dark": None},
    "backed_up": True,
    "confirmed_at": None,
}
LISTED: dict[str, Any] = {"id": "U" * 24, "external_id": "ada"}
USER: dict[str, Any] = {
    **LISTED,
    "status": "active",
    "login_count": 2,
    "created_at": AT,
    "updated_at": AT,
    "last_login_at": AT,
    "webauthn_devices": [DEVICE],
}


@pytest.fixture
async def scripted() -> AsyncIterator[ScriptedBroker]:
    async with scripted_broker() as broker:
        yield broker


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> type[BrokerClient] | type[AsyncBrokerClient]:
    chosen: type[BrokerClient] | type[AsyncBrokerClient] = request.param
    return chosen


@pytest.fixture
async def call(
    kind: type[BrokerClient] | type[AsyncBrokerClient], scripted: ScriptedBroker
) -> AsyncIterator[Caller]:
    caller = Caller(kind(scripted.url + "/", APP, KEY))
    yield caller
    await caller("close")


def instant(text: str = AT) -> datetime:
    return datetime.fromisoformat(text)


async def test_opening_transactions(call: Caller, scripted: ScriptedBroker) -> None:
    scripted.says(201, {"transaction_id": "pbt_1"}).says(201, {"transaction_id": "pbt_2"})
    assert await call("create_register_transaction", "ada/ü", "Ada L.") == "pbt_1"
    assert await call("create_authenticate_transaction", "ada/ü") == "pbt_2"
    register, authenticate = scripted.seen
    assert (register.method, register.target) == ("POST", f"/v1/apps/{APP}/transactions/register")
    assert register.json == {"external_id": "ada/ü", "passkey_display_name": "Ada L."}
    assert register.headers["Authorization"] == f"Bearer {KEY}"
    assert register.headers["Content-Type"] == "application/json"
    assert (authenticate.method, authenticate.target) == (
        "POST",
        f"/v1/apps/{APP}/transactions/authenticate",
    )
    assert authenticate.json == {"external_id": "ada/ü"}


async def test_opening_transactions_with_wishes(call: Caller, scripted: ScriptedBroker) -> None:
    """Seconds become milliseconds; what was not asked is not sent, and an empty list that was asked
    is.
    """
    for _ in range(4):
        scripted.says(201, {"transaction_id": "pbt_1"})
    same = {"user_verification": "required", "second_factor": True, "binding_challenge": "c" * 43}
    wishes, sent = {**same, "ceremony_timeout": 90.5}, {**same, "timeout": 90_500}
    await call(
        "create_register_transaction",
        "ada",
        "Ada",
        user_name="ada@example.com",
        exclude_passkeys=("P" * 24,),
        **wishes,
    )
    await call("create_authenticate_transaction", "ada", passkeys=("P" * 24,), **wishes)
    await call("create_authenticate_transaction", discoverable=True)
    await call("create_authenticate_transaction", passkeys=[])
    names = {"external_id": "ada", "passkey_display_name": "Ada", "user_name": "ada@example.com"}
    assert [s.json for s in scripted.seen] == [
        {**names, "exclude_passkeys": ["P" * 24], **sent},
        {"external_id": "ada", "passkeys": ["P" * 24], **sent},
        {"discoverable": True},
        {"passkeys": []},
    ]


async def test_a_signed_receipt(call: Caller, scripted: ScriptedBroker) -> None:
    """The token is not in the repr; without one, where one was asked for, there is no receipt."""
    said = {**RECEIPT, "second_factor": True, "approval": "payment-7"}
    scripted.says(200, {**said, "token": "e.y.J"}).says(200, said)
    receipt = await call("verify_nonce", "pbn_1", signed=True)
    assert (receipt.token, receipt.second_factor, receipt.approval) == ("e.y.J", True, "payment-7")
    assert "e.y.J" not in repr(receipt)
    with pytest.raises(sdk.UnexpectedAnswer):
        await call("verify_nonce", "pbn_1", signed=True)
    assert scripted.seen[0].json == {"nonce": "pbn_1", "signed": True}


@pytest.mark.parametrize(
    "expected",
    [
        {},
        {"purpose": "authenticate"},
        {"purpose": "authenticate", "transaction_id": "pbt_1", "external_id": "ada"},
        {"binding_verifier": "v" * 43},
    ],
)
async def test_receipt(call: Caller, scripted: ScriptedBroker, expected: dict[str, str]) -> None:
    scripted.says(200, {**RECEIPT, "something_newer": {"a": 1}})
    receipt = await call("verify_nonce", "pbn_1", **expected)
    assert receipt == Receipt(**{**RECEIPT, "at": instant()})
    assert receipt.at == datetime(2026, 1, 16, 12, 0, 0, 250_000, UTC)
    assert [(s.method, s.target, s.json) for s in scripted.seen] == [
        ("POST", f"/v1/apps/{APP}/authenticate/verify", {"nonce": "pbn_1", **expected})
    ]
    with pytest.raises(FrozenInstanceError):
        receipt.external_id = "eve"


@pytest.mark.parametrize("expected", [{"purpose": "register"}, {"external_id": "eve"}])
async def test_receipt_for_something_else_is_no_receipt(
    call: Caller, scripted: ScriptedBroker, expected: dict[str, str]
) -> None:
    """A broker that does not know the fields ignores them; the client still refuses."""
    scripted.says(200, RECEIPT)
    with pytest.raises(sdk.InvalidNonce) as caught:
        await call("verify_nonce", "pbn_1", **expected)
    assert caught.value.code == "invalid_nonce"
    assert scripted.seen[0].json == {"nonce": "pbn_1", **expected}


@pytest.mark.parametrize(
    "damage",
    [
        {"external_id": None},
        {"external_id": 7},
        {"user_verified": 1},
        {"purpose": "other"},
        {"at": "yesterday"},
        {"at": "2026-01-16T12:00:00"},
        {"authenticator_name_claimed": 5},
        {"second_factor": "no"},
        {"approval": 7},
    ],
    ids=str,
)
async def test_damaged_receipt(
    call: Caller, scripted: ScriptedBroker, damage: dict[str, Any]
) -> None:
    scripted.says(200, {**RECEIPT, **damage}, X_Request_Id="r-1")
    with pytest.raises(sdk.UnexpectedAnswer) as caught:
        await call("verify_nonce", "pbn_1")
    assert (caught.value.code, caught.value.status, caught.value.request_id) == (
        "unexpected_answer",
        200,
        "r-1",
    )
    assert next(iter(damage)) in str(caught.value)
    assert len(scripted.seen) == 1


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b"null", b"[" * 100_000], ids=lambda b: b[:6].decode()
)
async def test_answer_that_is_no_object(
    call: Caller, scripted: ScriptedBroker, body: bytes
) -> None:
    scripted.says(200, body)
    with pytest.raises(sdk.UnexpectedAnswer):
        await call("verify_nonce", "pbn_1")
    assert len(scripted.seen) == 1


async def test_user(call: Caller, scripted: ScriptedBroker) -> None:
    unused = {**DEVICE, "id": "Q" * 24, "usage_count": 0, "confirmed_at": AT}
    scripted.says(200, {"users": [LISTED]}).says(
        200, {"user": {**USER, "webauthn_devices": [DEVICE, unused]}}
    )
    user = await call("get_user", "ada")
    assert (user.id, user.external_id, user.status, user.login_count) == (
        "U" * 24,
        "ada",
        "active",
        2,
    )
    assert user.last_login_at == user.created_at == instant()
    used, fresh = user.passkeys
    assert used == Passkey(
        id="P" * 24,
        credential_id="AQID_-8",
        name="Ada's phone",
        type="passkey",
        use_count=2,
        backed_up=True,
        confirmed_at=None,
        created_at=instant(),
        updated_at=instant(),
        last_used_at=instant(),
    )
    assert (fresh.last_used_at, fresh.confirmed_at) == (None, instant())
    assert [(s.method, s.target) for s in scripted.seen] == [
        ("GET", f"/v1/apps/{APP}/users?identifier=ada&limit=1"),
        ("GET", f"/v1/apps/{APP}/users/{'U' * 24}"),
    ]
    assert all(s.headers["Authorization"] == f"Bearer {KEY}" for s in scripted.seen)


async def test_user_before_the_first_login(call: Caller, scripted: ScriptedBroker) -> None:
    pending = {**USER, "status": "pending", "login_count": 0, "webauthn_devices": []}
    scripted.says(200, {"users": [LISTED]}).says(200, {"user": pending})
    user = await call("get_user", "ada")
    assert (user.status, user.last_login_at, user.passkeys) == ("pending", None, ())


async def test_listing_and_revoking(call: Caller, scripted: ScriptedBroker) -> None:
    scripted.says(200, {"users": [LISTED]}).says(200, {"devices": [DEVICE]})
    (passkey,) = await call("list_passkeys", "ada")
    assert (passkey.id, passkey.name) == ("P" * 24, "Ada's phone")
    scripted.says(200, {"users": [LISTED]}).says(200)
    assert await call("revoke_passkey", "ada", passkey.id) is None
    assert [(s.method, s.target) for s in scripted.seen[1::2]] == [
        ("GET", f"/v1/apps/{APP}/users/{'U' * 24}/devices"),
        ("DELETE", f"/v1/apps/{APP}/users/{'U' * 24}/devices/{'P' * 24}"),
    ]


OWNED: dict[str, Any] = {
    "id": "P" * 24,
    "external_id": None,
    "credential_id": "AQID_-8",
    "nickname": None,
    "user_name": "ada",
    "type": "passkey",
    "second_factor": False,
    "live": True,
    "backed_up": True,
    "use_count": 2,
    "created_at": AT,
    "last_used_at": None,
}


async def test_passkeys_of_the_app(call: Caller, scripted: ScriptedBroker) -> None:
    scripted.says(200, {"passkeys": [OWNED], "total": 7}).says(200, {"passkeys": [], "total": 0})
    page = await call("list_all_passkeys", page=2, limit=1)
    owned = sdk.OwnedPasskey(**{**OWNED, "created_at": instant()})
    assert page == sdk.PasskeyPage((owned,), 7)
    assert (await call("list_all_passkeys", "a b")).passkeys == ()
    scripted.says(200, {"passkey": {**OWNED, "nickname": "Work", "external_id": "ada"}})
    renamed = await call("rename_passkey", owned.id, "Work")
    assert (renamed.nickname, renamed.external_id) == ("Work", "ada")
    with pytest.raises(sdk.PasskeyNotFound):
        await call("rename_passkey", "..", "Work")
    assert [(s.method, s.target) for s in scripted.seen] == [
        ("GET", f"/v1/apps/{APP}/passkeys?page=2&limit=1"),
        ("GET", f"/v1/apps/{APP}/passkeys?page=1&limit=100&external_id=a+b"),
        ("PATCH", f"/v1/apps/{APP}/passkeys/{'P' * 24}"),
    ]
    assert scripted.seen[2].json == {"nickname": "Work"}


async def test_preparing_signals(call: Caller, scripted: ScriptedBroker) -> None:
    said = {"ticket": "pbs_secret", "expires_at": AT, "missing": ["P" * 24], "empty": False}
    scripted.says(201, said).says(201, said).says(201, {**said, "missing": [1]})
    ticket = await call(
        "prepare_signals", "update", external_id="ada", user_name="a", user_display_name="A"
    )
    assert ticket == sdk.SignalTicket("pbs_secret", instant(), ("P" * 24,), False)
    assert "pbs_secret" not in repr(ticket)
    await call("prepare_signals", "delete", passkeys=("P" * 24,))
    with pytest.raises(sdk.UnexpectedAnswer):
        await call("prepare_signals", "prune", external_id="ada")
    assert [(s.target.rpartition("/")[2], s.json) for s in scripted.seen] == [
        ("update", {"external_id": "ada", "user_name": "a", "user_display_name": "A"}),
        ("delete", {"passkeys": ["P" * 24]}),
        ("prune", {"external_id": "ada"}),
    ]


@pytest.mark.parametrize(
    ("method", "more"), [("get_user", ()), ("list_passkeys", ()), ("revoke_passkey", ("P" * 24,))]
)
@pytest.mark.parametrize(
    "users", [[], [{**LISTED, "external_id": "somebody else"}]], ids=["none", "other"]
)
async def test_unknown_user(
    call: Caller, scripted: ScriptedBroker, method: str, more: tuple[str, ...], users: list[Any]
) -> None:
    """The list answers 200 without users; a user with another external id is nobody's match
    either.
    """
    scripted.says(200, {"users": users}, X_Request_Id="r-2")
    with pytest.raises(sdk.UserNotFound) as caught:
        await call(method, "ada", *more)
    assert (caught.value.code, caught.value.request_id) == ("user_not_found", "r-2")
    assert len(scripted.seen) == 1


NO_TEXTS: list[Any] = [None, "", 7, True, False, b"pbn_1", ["pbn_1"], {"nonce": "pbn_1"}]
REQUIRED: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("verify_nonce", (...,), {"purpose": "authenticate"}),
    ("create_register_transaction", (..., "Ada"), {}),
    ("create_register_transaction", ("ada", ...), {}),
    ("cancel_transaction", (...,), {}),
    ("get_user", (...,), {}),
    ("list_passkeys", (...,), {}),
    ("revoke_passkey", (..., "P" * 24), {}),
    ("rename_passkey", ("P" * 24, ...), {}),
    ("prepare_signals", (...,), {"external_id": "ada"}),
]
# What may be left out, so that None states nothing.
STATED: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    *[
        ("verify_nonce", ("pbn_1",), {name: ...})
        for name in ("purpose", "transaction_id", "external_id")
    ],
    ("create_authenticate_transaction", (...,), {"discoverable": True}),
    ("create_authenticate_transaction", ("ada",), {"user_verification": ...}),
    ("create_register_transaction", ("ada", "Ada"), {"user_name": ...}),
    ("list_all_passkeys", (...,), {}),
    *[
        ("prepare_signals", ("update",), {name: ...})
        for name in ("external_id", "user_name", "user_display_name")
    ],
]
ITEMS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("create_authenticate_transaction", ("ada",), {"passkeys": [...]}),
    ("create_register_transaction", ("ada", "Ada"), {"exclude_passkeys": ["P" * 24, ...]}),
    ("prepare_signals", ("delete",), {"passkeys": (...,)}),
]


def with_value(argument: Any, value: Any) -> Any:
    """The argument, with `value` in the place of each `...`."""
    if argument is ...:
        return value
    if isinstance(argument, list | tuple):
        return [with_value(item, value) for item in argument]
    return argument


@pytest.mark.parametrize(("method", "args", "named"), REQUIRED + STATED + ITEMS, ids=str)
async def test_what_is_no_text_is_never_sent(
    call: Caller,
    scripted: ScriptedBroker,
    method: str,
    args: tuple[Any, ...],
    named: dict[str, Any],
) -> None:
    """A session's field that is not there is None: it buys nothing, and is not even asked for."""
    may_be_left_out = (method, args, named) in STATED
    for value in NO_TEXTS[may_be_left_out:]:
        with pytest.raises(sdk.InvalidRequest) as caught:
            await call(
                method,
                *[with_value(argument, value) for argument in args],
                **{name: with_value(argument, value) for name, argument in named.items()},
            )
        assert caught.value.code == "invalid_request"
        assert "pbn_1" not in caught.value.message
    assert scripted.seen == []


async def test_a_passkeys_id_that_is_no_text_is_never_sent(
    call: Caller, scripted: ScriptedBroker
) -> None:
    for value in (None, 7, b"P"):
        with pytest.raises(sdk.InvalidRequest):
            await call("revoke_passkey", "ada", value)
        with pytest.raises(sdk.InvalidRequest):
            await call("rename_passkey", value, "Phone")
    for method, args, name in (
        ("create_authenticate_transaction", ("ada",), "passkeys"),
        ("create_register_transaction", ("ada", "Ada"), "exclude_passkeys"),
        ("prepare_signals", ("delete",), "passkeys"),
    ):
        with pytest.raises(sdk.InvalidRequest):
            await call(method, *args, **{name: "P" * 24})  # a text is a sequence of texts
    assert scripted.seen == []


@pytest.mark.parametrize("passkey_id", ["", ".", "..", "a/b", "a?b", "a%2Fb", "ü"])
async def test_passkey_id_that_would_change_the_path(
    call: Caller, scripted: ScriptedBroker, passkey_id: str
) -> None:
    with pytest.raises(sdk.PasskeyNotFound):
        await call("revoke_passkey", "ada", passkey_id)
    assert scripted.seen == []


async def test_identifiers_survive_the_query(call: Caller, scripted: ScriptedBroker) -> None:
    for external_id in ["a b+c@d/é&x=1#?%", "<like:%>", "日本", " "]:
        received: list[str] = []

        async def answer(
            request: web.BaseRequest, received: list[str] = received
        ) -> web.StreamResponse:
            received.append(request.query["identifier"])
            return web.json_response({"users": []})

        scripted.does(answer)
        with pytest.raises(sdk.UserNotFound):
            await call("get_user", external_id)
        assert received == [external_id]


async def test_app_and_user_ids_are_percent_encoded(
    kind: type[BrokerClient] | type[AsyncBrokerClient], scripted: ScriptedBroker
) -> None:
    scripted.says(200, {"users": [{**LISTED, "id": "../x?y"}]}).says(200, {"devices": []})
    call = Caller(kind(scripted.url, "a/b", KEY))
    assert await call("list_passkeys", "ada") == []
    assert scripted.seen[1].target == "/v1/apps/a%2Fb/users/..%2Fx%3Fy/devices"
    await call("close")


ERRORS = [
    (400, "invalid_request", sdk.InvalidRequest),
    (401, "invalid_access_token", sdk.InvalidKey),
    (401, "invalid_nonce", sdk.InvalidNonce),
    (404, "user_not_found", sdk.UserNotFound),
    (404, "device_not_found", sdk.PasskeyNotFound),
    (409, "user_has_no_passkeys", sdk.NoPasskeys),
    (429, "too_many_requests", sdk.TooManyRequests),
    (500, "internal_server_error", sdk.BrokerUnavailable),
    (503, "service_unavailable", sdk.BrokerUnavailable),
    (413, "request_too_large", sdk.BrokerError),
]


@pytest.mark.parametrize(("status", "code", "error"), ERRORS, ids=[row[1] for row in ERRORS])
async def test_errors_by_code(
    call: Caller, scripted: ScriptedBroker, status: int, code: str, error: type[sdk.BrokerError]
) -> None:
    scripted.says(
        status,
        {"code": code, "error": "A sentence.", "retry": "backend"},
        X_Request_Id="r-3",
        Retry_After="7",
    )
    with pytest.raises(sdk.BrokerError) as caught:
        await call("create_authenticate_transaction", "ada")
    told = caught.value
    assert type(told) is error
    assert (told.code, told.message, told.status) == (code, "A sentence.", status)
    assert (told.request_id, told.retry, told.retry_after) == ("r-3", "backend", 7.0)
    assert str(told) == f"{code}: A sentence. ({status}, r-3)"
    again = pickle.loads(pickle.dumps(told))
    assert (type(again), again.code, again.request_id) == (error, code, "r-3")
    assert len(scripted.seen) == 1


@pytest.mark.parametrize(
    ("status", "body", "error", "code"),
    [
        (502, b"<html>Bad Gateway", sdk.BrokerUnavailable, "service_unavailable"),
        (404, b"<html>Not Found", sdk.UnexpectedAnswer, "unexpected_answer"),
        (401, b'{"code":5,"error":6,"retry":7}', sdk.UnexpectedAnswer, "unexpected_answer"),
        (307, b"", sdk.UnexpectedAnswer, "unexpected_answer"),
    ],
)
async def test_answers_of_somebody_else(
    call: Caller,
    scripted: ScriptedBroker,
    status: int,
    body: bytes,
    error: type[sdk.BrokerError],
    code: str,
) -> None:
    scripted.says(status, body, Location=scripted.url + "/elsewhere", Retry_After="soon")
    with pytest.raises(sdk.BrokerError) as caught:
        await call("verify_nonce", "pbn_1")
    told = caught.value
    assert (type(told), told.code, told.status, told.retry, told.retry_after) == (
        error,
        code,
        status,
        None,
        None,
    )
    assert len(scripted.seen) == 1, "a redirect was followed or the request repeated"


IDEMPOTENT: list[tuple[str, tuple[str, ...]]] = [
    ("verify_nonce", ("pbn_1",)),
    ("create_register_transaction", ("ada", "Ada")),
    ("create_authenticate_transaction", ("ada",)),
]
ONCE: list[tuple[str, tuple[str, ...]]] = [
    ("get_user", ("ada",)),
    ("list_passkeys", ("ada",)),
    ("revoke_passkey", ("ada", "P" * 24)),
]


@pytest.mark.parametrize(("method", "arguments"), IDEMPOTENT + ONCE, ids=lambda part: str(part))
@pytest.mark.parametrize("fault", ["lost answer", "half an answer", "503"])
async def test_only_idempotent_requests_are_repeated_and_once(
    call: Caller, scripted: ScriptedBroker, method: str, arguments: tuple[str, ...], fault: str
) -> None:
    """The repeated request is the same, with the same Idempotency-Key, which no other one has."""

    async def lose(request: web.BaseRequest) -> web.StreamResponse:
        if fault == "half an answer":
            half = web.StreamResponse(headers={"Content-Length": "1000"})
            await half.prepare(request)
            await half.write(b'{"external_id":')
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    for _ in range(2):
        if fault == "503":
            scripted.says(503, {"code": "service_unavailable", "error": "Down."}, Retry_After="0")
        else:
            scripted.does(lose)
    with pytest.raises(sdk.BrokerError) as caught:
        await call(method, *arguments)
    assert type(caught.value) is (
        sdk.BrokerUnavailable if fault == "503" else sdk.BrokerUnreachable
    )
    assert (caught.value.status is None) == (fault != "503")
    keys = [seen.headers.get("Idempotency-Key") for seen in scripted.seen]
    if (method, arguments) not in IDEMPOTENT:
        assert keys == [None]
        return
    first, second = scripted.seen
    assert first == second
    assert keys[0] is not None
    scripted.says(404, {"code": "user_not_found", "error": "No."})
    with pytest.raises(sdk.UserNotFound):
        await call(method, *arguments)
    assert scripted.seen[-1].headers["Idempotency-Key"] not in keys


async def test_the_second_answer_is_the_callers(call: Caller, scripted: ScriptedBroker) -> None:
    scripted.says(503, {"code": "service_unavailable", "error": "Briefly."}, Retry_After="0")
    scripted.says(201, {"transaction_id": "pbt_1"})
    assert await call("create_authenticate_transaction", "ada") == "pbt_1"


async def test_an_idle_connection_that_the_server_closed_is_no_error(
    call: Caller, scripted: ScriptedBroker
) -> None:
    scripted.says(201, {"transaction_id": "pbt_1"}, Connection="close").says(
        201, {"transaction_id": "pbt_2"}
    )
    assert await call("create_authenticate_transaction", "ada") == "pbt_1"
    assert await call("create_authenticate_transaction", "ada") == "pbt_2"


@pytest.mark.parametrize("manner", ["silent", "dripping"])
async def test_timeout(
    kind: type[BrokerClient] | type[AsyncBrokerClient], scripted: ScriptedBroker, manner: str
) -> None:
    given_up = asyncio.Event()

    async def dawdle(request: web.BaseRequest) -> web.StreamResponse:
        if manner == "dripping":
            drops = web.StreamResponse()
            await drops.prepare(request)
            while not given_up.is_set():
                await drops.write(b" ")
                await asyncio.sleep(0.02)  # the drip itself
            return drops
        await given_up.wait()
        return web.Response()

    scripted.does(dawdle)
    call = Caller(kind(scripted.url, APP, KEY, timeout=1.0))
    try:
        with pytest.raises(sdk.BrokerUnreachable) as caught:
            await asyncio.wait_for(call("cancel_transaction", "pbt_1"), 30)
    finally:
        given_up.set()
        await call("close")
    assert (caught.value.code, caught.value.status) == ("unreachable", None)
    assert "in time" in str(caught.value)
    assert len(scripted.seen) == 1


async def test_unreachable(
    kind: type[BrokerClient] | type[AsyncBrokerClient], unused_tcp_port: int
) -> None:
    call = Caller(kind(f"http://127.0.0.1:{unused_tcp_port}", APP, KEY))
    with pytest.raises(sdk.BrokerUnreachable) as caught:
        await call("verify_nonce", "pbn_1")
    assert isinstance(caught.value.__cause__, httpx.ConnectError)
    assert KEY not in f"{caught.value!r} {caught.value} {caught.value.__cause__!r}"
    await call("close")


async def test_answer_too_large(call: Caller, scripted: ScriptedBroker) -> None:
    scripted.says(200, json.dumps({**RECEIPT, "padding": "x" * sdk.LARGEST_ANSWER}).encode())
    with pytest.raises(sdk.UnexpectedAnswer, match="larger than"):
        await call("verify_nonce", "pbn_1")
    assert len(scripted.seen) == 1


async def test_text_that_no_encoding_carries(call: Caller, scripted: ScriptedBroker) -> None:
    for method, arguments in [
        ("get_user", ("\ud800",)),
        ("create_register_transaction", ("ada", "\udfff")),
    ]:
        with pytest.raises(sdk.InvalidRequest):
            await call(method, *arguments)
    assert scripted.seen == []


async def test_environment_proxies_do_not_see_loopback(
    kind: type[BrokerClient] | type[AsyncBrokerClient],
    scripted: ScriptedBroker,
    monkeypatch: pytest.MonkeyPatch,
    unused_tcp_port: int,
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{unused_tcp_port}")
    scripted.says(201, {"transaction_id": "pbt_1"})
    call = Caller(kind(scripted.url, APP, KEY))
    assert await call("create_authenticate_transaction", "ada") == "pbt_1"
    await call("close")


async def test_context_managers_close_and_repr_hides_the_key(scripted: ScriptedBroker) -> None:
    scripted.says(201, {"transaction_id": "pbt_1"}).says(201, {"transaction_id": "pbt_2"})
    with BrokerClient(scripted.url, APP, KEY) as blocking:
        assert await asyncio.to_thread(blocking.create_authenticate_transaction, "ada") == "pbt_1"
    async with AsyncBrokerClient(scripted.url, APP, KEY) as client:
        assert await client.create_authenticate_transaction("ada") == "pbt_2"
    for closed in (blocking, client):
        assert KEY not in repr(closed)
        assert scripted.url in repr(closed)
        assert APP in repr(closed)
    with pytest.raises(RuntimeError, match="closed"):
        await asyncio.to_thread(blocking.create_authenticate_transaction, "ada")
    with pytest.raises(RuntimeError, match="closed"):
        await client.create_authenticate_transaction("ada")
    assert len(scripted.seen) == 2


@pytest.mark.parametrize(
    ("url", "app_id", "api_key", "names"),
    [
        ("broker.example", APP, KEY, "url"),
        ("ftp://broker.example", APP, KEY, "url"),
        ("https://broker.example/?a=b", APP, KEY, "url"),
        ("https://broker.example", "", KEY, "app_id"),
        ("https://broker.example", APP, "", "api_key"),
        ("https://broker.example", APP, KEY + "\n", "api_key"),
        ("https://broker.example", APP, KEY + "é", "api_key"),
    ],
)
def test_arguments_that_cannot_work(
    kind: type[BrokerClient] | type[AsyncBrokerClient],
    url: str,
    app_id: str,
    api_key: str,
    names: str,
) -> None:
    with pytest.raises(ValueError, match=names) as caught:
        kind(url, app_id, api_key)
    assert KEY not in str(caught.value)


def test_imports_nothing_of_the_server() -> None:
    """What the import loads beyond the standard library is httpx with its own dependencies."""
    program = (
        "import sys, httpx; before = set(sys.modules); import passkey_broker;"
        "print(*sorted({m for m in set(sys.modules) - before"
        " if m.split('.')[0] not in sys.stdlib_module_names}))"
    )
    home = Path(sdk.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=home,
        timeout=60,
    )
    assert {name.split(".")[0] for name in done.stdout.split()} == {"passkey_broker"}


def test_its_former_name_gives_the_same_classes() -> None:
    """Until 1.0: an error that is caught under one name was raised under the other."""
    assert {name: getattr(former, name) for name in sdk.__all__} == {
        name: getattr(sdk, name) for name in sdk.__all__
    }
