"""The client against a real broker: every keyed route of the Flex API, by a method, with the
blocking and the asynchronous client.
"""

from __future__ import annotations

import asyncio
import re
from datetime import timedelta
from typing import Any

import pytest

from broker.dialects.flex import routes as flex
from broker.sdk import passkey_broker as sdk
from broker.sdk.passkey_broker import (
    Answer,
    ApprovalRequest,
    AsyncBrokerClient,
    BrokerClient,
    Request,
)
from tests.conftest import Started
from tests.core.test_ownerless import ownerless
from tests.support.authenticator import Authenticator
from tests.support.scripted import Caller
from tests.support.signals import refused
from tests.support.wire import ORIGIN, Wire

SENT: list[tuple[str, str]] = []  # by the client of the test


class Watched(BrokerClient):
    def send(self, request: Request) -> Answer:
        SENT.append((request.method, request.path))
        return super().send(request)


class AsyncWatched(AsyncBrokerClient):
    async def send(self, request: Request) -> Answer:
        SENT.append((request.method, request.path))
        return await super().send(request)


@pytest.fixture(params=[Watched, AsyncWatched])
async def call(request: pytest.FixtureRequest, wire: Wire) -> Any:
    SENT.clear()
    caller = Caller(request.param(wire.url, wire.app_id, wire.key))
    yield caller
    await caller("close")


async def collected(call: Caller, method: str, **named: Any) -> list[Any]:
    found = getattr(call.client, method)(**named)
    if isinstance(call.client, AsyncBrokerClient):
        return [item async for item in found]
    return await asyncio.to_thread(list, found)


async def transactions(call: Caller, broker: Started, wire: Wire, device: Authenticator) -> None:
    """With the page's part over HTTP; the options reach the page."""
    options: dict[str, Any] = {"user_verification": "required", "ceremony_timeout": 60}
    transaction = await call(
        "create_register_transaction", "ada", "Ada L.", user_name="ada@x", **options
    )
    nonce = await wire.register(transaction, device)
    receipt = await call(
        "verify_nonce",
        nonce,
        purpose="register",
        transaction_id=transaction,
        external_id="ada",
        signed=True,
    )
    assert (receipt.external_id, receipt.purpose, receipt.token.count(".")) == (
        "ada",
        "register",
        2,
    )
    assert [key["alg"] for key in (await call("get_key_set"))["keys"]] == ["ES256"]
    with refused(broker, "invalid_nonce", "nonce_replayed"), pytest.raises(sdk.InvalidNonce):
        await call("verify_nonce", nonce)
    transaction = await call(
        "create_authenticate_transaction", "ada", mediation="conditional", **options
    )
    begun = await wire.page(
        "/authenticate/transactions/webauthn/start", {"transaction_id": transaction}
    )
    challenge = begun.json["handshake"]["challenge"]
    assert challenge["mediation"] == "conditional"
    assert challenge["publicKey"]["userVerification"] == "required"
    assert challenge["publicKey"]["timeout"] <= 60_000
    nonce = await wire.authenticate(transaction, device)
    receipt = await call("verify_nonce", nonce, purpose="authenticate", transaction_id=transaction)
    assert (receipt.external_id, receipt.second_factor) == ("ada", False)
    transaction = await call("create_authenticate_transaction", "ada")
    for _ in range(2):
        assert await call("cancel_transaction", transaction) is None
    begun = await wire.page(
        "/authenticate/transactions/webauthn/start", {"transaction_id": transaction}
    )
    assert begun.code == "transaction_not_found"


async def keyed_ceremonies(call: Caller, broker: Started, device: Authenticator) -> None:
    """Found by the challenge and by the user; second factors; approvals; what another finish makes
    of them.
    """
    options = await call(
        "start_registration", "ada", "ada@x", second_factor=True, passkey_display_name="Key"
    )
    factor = Authenticator()
    credential = factor.register(options, ORIGIN)
    assert (
        await call("finish_registration", credential, second_factor=True)
    ).purpose == "register_second_factor"
    options = await call("start_authentication", "ada", second_factor=True)
    credential = factor.authenticate(options, ORIGIN)
    receipt = await call("finish_authentication", credential, second_factor=True)
    assert receipt.purpose == "authenticate_second_factor"

    data = {"amount": 12, "to": ["bob"]}
    options = await call("start_authentication", "ada", approval=ApprovalRequest("payment-7", data))
    receipt = await call(
        "finish_authentication", device.authenticate(options, ORIGIN), approval=True
    )
    assert (receipt.purpose, receipt.approval) == ("approve", "payment-7")
    (approval,) = await call("list_approvals", "ada")
    assert (approval.id, approval.data) == ("payment-7", data)
    assert approval.approved_at >= approval.created_at
    with pytest.raises(sdk.ApprovalExists):
        await call("start_authentication", "ada", approval=ApprovalRequest("payment-7", data))

    options = await call("start_authentication", discoverable=True)
    credential = device.authenticate(options, ORIGIN)
    assert (await call("finish_authentication", credential)).external_id == "ada"
    with pytest.raises(sdk.TransactionNotFound):
        await call("finish_authentication", credential)
    options = await call("start_authentication", discoverable=True)
    strange = Authenticator()
    strange.register(await call("start_registration", "eve", "eve"), ORIGIN)
    with (
        refused(broker, "discoverable_login_failed", "unknown_credential"),
        pytest.raises(sdk.DiscoverableRefused) as caught,
    ):
        await call("finish_authentication", strange.authenticate(options, ORIGIN))
    assert caught.value.signal is not None
    assert caught.value.signal.rp_id == "example.org"

    other = Authenticator()
    options = await call("start_user_registration", "bob", "bob", authenticator_attachment="any")
    receipt = await call("finish_user_registration", "bob", other.register(options, ORIGIN))
    assert (receipt.external_id, receipt.purpose) == ("bob", "register")
    options = await call("start_user_authentication", "bob", passkeys=[receipt.passkey_id])
    receipt = await call("finish_user_authentication", "bob", other.authenticate(options, ORIGIN))
    assert (receipt.external_id, receipt.purpose) == ("bob", "authenticate")


async def management(call: Caller, broker: Started, wire: Wire) -> None:
    page = await call("list_users", status="active", order_by="created_at:ASC", limit=1)
    assert (page.total, [user.external_id for user in page.users]) == (2, ["ada"])
    listed = await collected(call, "iter_users", limit=1)
    assert {user.external_id for user in listed} == {"ada", "bob", "eve"}
    user = await call("get_user", "ada")
    assert await call("get_user_by_id", user.id) == user
    with pytest.raises(sdk.UserNotFound):
        await call("get_user_by_id", "x" * 24)
    assert await call("list_passkeys", "ada") == list(user.passkeys)
    assert {passkey.second_factor for passkey in user.passkeys} == {True, False}

    found = await collected(call, "iter_passkeys", limit=1)
    assert [passkey.external_id for passkey in found] == ["ada", "ada", "bob"]
    newest = await call("list_all_passkeys", newest_first=True, limit=1)
    assert (newest.passkeys, newest.total) == ((found[-1],), 3)
    assert await call("get_passkey", found[0].id) == found[0]
    assert (found[0].user_id, found[0].live) == (user.id, True)
    assert (await call("rename_passkey", found[0].id, "Phone")).nickname == "Phone"
    renamed = await call("rename_user", "ada", "ada@y")
    assert {passkey.user_name for passkey in renamed} == {"ada@y"}
    assert await call("disable_user", "ada") is None
    with pytest.raises(sdk.UserDisabled):
        await call("create_authenticate_transaction", "ada")
    assert await call("enable_user", "ada") is None
    with pytest.raises(sdk.PasskeyHasOwner):
        await call("set_passkey_owner", found[0].id, "bob")
    _, nobodys = await ownerless(broker, wire, Authenticator())
    assert (await call("get_passkey", nobodys)).external_id is None
    assert (await call("set_passkey_owner", nobodys, "dan")).external_id == "dan"

    for kind, named in (
        ("update", {"external_id": "ada", "user_name": "ada@z"}),
        ("prune", {"external_id": "ada"}),
        ("delete", {"passkeys": [nobodys]}),
    ):
        ticket = await call("prepare_signals", kind, **named)
        assert (ticket.missing, ticket.empty) == ((), False)
    with pytest.raises(sdk.PasskeyNotFound):
        await call("get_passkey", nobodys)
    assert await call("revoke_passkey", "ada", found[1].id) is None
    assert await call("delete_passkey", found[2].id) is None
    with pytest.raises(sdk.PasskeyNotFound):
        await call("delete_passkey", found[2].id)
    with pytest.raises(sdk.NoPasskeys):
        await call("create_authenticate_transaction", "bob")
    app = await call("get_app")
    assert (app.id, app.rp_id, app.origins) == (wire.app_id, "example.org", (ORIGIN,))


async def events(call: Caller, wire: Wire) -> None:
    """By page, by iterator and behind a cursor: the same events."""
    page = await call("list_events", limit=500)
    assert page.total == len(page.events) > 10
    assert [event.id for event in await collected(call, "iter_events", limit=3)] == [
        e.id for e in page.events
    ]
    cursor, behind = "0", list[int]()
    while (batch := await call("list_events_after", cursor, limit=7)).events:
        cursor = batch.next_cursor
        behind += [event.id for event in batch.events]
    assert behind == [event.id for event in reversed(page.events)]
    oldest = page.events[-1].at
    found = await call(
        "list_events", action="passkey.revoked", user="ad", after=oldest - timedelta(seconds=1)
    )
    assert {event.external_id for event in found.events} == {"ada"}
    assert (await call("list_events", before=oldest)).total == 0


async def mail_codes(call: Caller) -> None:
    made = await call(
        "create_mail_code",
        "ada@example.org",
        "sign-up",
        external_id="ada",
        metadata={"plan": "pro"},
    )
    assert made.code in made.message.text
    wrong = f"{(int(made.code) + 1) % 1_000_000:06d}"
    with pytest.raises(sdk.WrongMailCode):
        await call("verify_mail_code", made.id, made.secret, wrong)
    assert (await call("get_mail_code", made.id)).attempts_left == made.attempts_left - 1
    taken = await call("verify_mail_code", made.id, made.secret, made.code)
    assert (taken.email, taken.external_id, taken.metadata) == (
        "ada@example.org",
        "ada",
        {"plan": "pro"},
    )
    with pytest.raises(sdk.MailCodeNotFound):
        await call("verify_mail_code", made.id, made.secret, made.code)
    other = await call("create_mail_code", "ada@example.org", "sign-up", invalidate_others=True)
    for _ in range(4):
        with pytest.raises(sdk.WrongMailCode):
            await call(
                "verify_mail_code",
                other.id,
                other.secret,
                f"{(int(other.code) + 1) % 1_000_000:06d}",
            )
    for typed in (f"{(int(other.code) + 1) % 1_000_000:06d}", other.code):
        with pytest.raises(sdk.MailCodeAttemptsExceeded):
            await call("verify_mail_code", other.id, other.secret, typed)
    assert await call("delete_mail_code", other.id) is None
    for _ in range(3):
        await call("create_mail_code", "ada@example.org", "sign-up")
    with pytest.raises(sdk.MailCodeRateLimited) as caught:
        await call("create_mail_code", "ada@example.org", "sign-up")
    assert caught.value.retry_after is not None
    assert (
        await call("create_mail_code", "ada@example.org", "sign-up", skip_rate_limit=True)
    ).attempts_left


async def test_the_whole_flex_api(
    call: Caller, broker: Started, wire: Wire, device: Authenticator
) -> None:
    await transactions(call, broker, wire, device)
    await keyed_ceremonies(call, broker, device)
    await management(call, broker, wire)
    await events(call, wire)
    await mail_codes(call)
    unsent = []
    for route in flex.routes(management=True, browser=False):
        path = route.path.removeprefix("/v1/apps/{app_id}")
        shape = re.compile(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(path)))
        if not any(method == route.method and shape.fullmatch(sent) for method, sent in SENT):
            unsent.append((route.method, path))
    assert unsent == [("GET", "")], (
        "no method of the client asks for these; the app is asked for at its other address"
    )
