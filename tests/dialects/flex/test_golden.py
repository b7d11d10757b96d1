"""Every endpoint of the Flex API on the wire, against golden files: request, status, headers
that matter, body.

The answers are also read by a client as strict as the strictest that exists, and that client is
shown to be strict.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from broker.dialects.flex.objects import rfc3339
from tests.conftest import Started
from tests.dialects.flex.contract import (
    APP,
    DEVICES,
    ERROR,
    NONCE,
    TRANSACTION,
    USER,
    USERS,
    VERIFIED,
    strict,
)
from tests.support.authenticator import Authenticator, flex_wire_form
from tests.support.golden import golden, masked
from tests.support.shapes import Maybe
from tests.support.signals import counted, lines, refused
from tests.support.wire import ORIGIN, Wire

PAGE = {
    "Origin": ORIGIN,
    "Content-Type": "application/json",
    "Passage-Flex-Version": "flex-js 1.0.2",
}
USER_FIELDS = {"external_id": "ann", "passkey_display_name": "Ann's passkey"}


def key(wire: Wire) -> dict[str, str]:
    return {"Authorization": f"Bearer {wire.key}"}


async def user_id(wire: Wire, external_id: str) -> str:
    users = (await wire.keyed("GET", f"/users?identifier={external_id}&limit=1")).json["users"]
    return str(users[0]["id"])


async def test_m1_open_registration(broker: Started, wire: Wire) -> None:
    answer = await golden(
        wire, "flex/m1", "POST", "/transactions/register", USER_FIELDS, headers=key(wire)
    )
    strict(answer.json, TRANSACTION)
    assert lines(
        broker, route="/v1/apps/{app_id}/transactions/register", status=201, app=wire.app_id
    )


async def test_m2_open_authentication(broker: Started, wire: Wire, device: Authenticator) -> None:
    await wire.user("ann", device)
    body = {"external_id": "ann"}
    answer = await golden(
        wire, "flex/m2", "POST", "/transactions/authenticate", body, headers=key(wire)
    )
    strict(answer.json, TRANSACTION)
    assert lines(broker, route="/v1/apps/{app_id}/transactions/authenticate", status=201)


async def test_m3_redeem_registration_and_authentication(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    transaction = await wire.open_registration("ann")
    body = {"nonce": await wire.register(transaction, device)}
    with counted(broker, "broker_redemptions_total", result="ok"):
        answer = await golden(
            wire, "flex/m3-register", "POST", "/authenticate/verify", body, headers=key(wire)
        )
    strict(answer.json, VERIFIED)
    transaction = await wire.open_authentication("ann")
    body = {
        "nonce": await wire.authenticate(transaction, device),
        "purpose": "authenticate",
        "transaction_id": transaction,
        "external_id": "ann",
    }
    answer = await golden(
        wire, "flex/m3-authenticate", "POST", "/authenticate/verify", body, headers=key(wire)
    )
    strict(answer.json, VERIFIED)


async def test_m3_redeem_again(broker: Started, wire: Wire, device: Authenticator) -> None:
    body = {"nonce": await wire.register(await wire.open_registration("ann"), device)}
    assert (await wire.redeem(body["nonce"])).status == 200
    with (
        refused(broker, "invalid_nonce", "nonce_replayed"),
        counted(broker, "broker_redemptions_total", result="replayed"),
    ):
        answer = await golden(
            wire, "flex/m3-again", "POST", "/authenticate/verify", body, headers=key(wire)
        )
    strict(answer.json, ERROR)


async def test_m4_list_users(broker: Started, wire: Wire, device: Authenticator) -> None:
    await wire.user("ann", device)
    await wire.open_registration("bob")
    found = await golden(
        wire, "flex/m4-found", "GET", "/users?identifier=ann&limit=1", headers=key(wire)
    )
    nobody = await golden(
        wire, "flex/m4-unknown", "GET", "/users?identifier=eve&limit=1", headers=key(wire)
    )
    page = await golden(wire, "flex/m4-page", "GET", "/users?limit=1&page=2", headers=key(wire))
    for answer in (found, nobody, page):
        strict(answer.json, USERS)
    assert len(lines(broker, route="/v1/apps/{app_id}/users", status=200)) == 3


async def test_m5_get_user(broker: Started, wire: Wire, device: Authenticator) -> None:
    await wire.user("ann", device)
    await wire.redeem(await wire.authenticate(None, device))
    await wire.open_registration("bob")
    for name, external_id in (("flex/m5-active", "ann"), ("flex/m5-pending", "bob")):
        path = f"/users/{await user_id(wire, external_id)}"
        strict((await golden(wire, name, "GET", path, headers=key(wire))).json, USER)
    with refused(broker, "user_not_found", "user_not_found"):
        answer = await golden(
            wire, "flex/m5-unknown", "GET", "/users/" + "x" * 24, headers=key(wire)
        )
    strict(answer.json, ERROR)


async def test_m6_list_devices(broker: Started, wire: Wire, device: Authenticator) -> None:
    await wire.user("ann", device)
    await wire.user(
        "ann", Authenticator(backup_eligible=False, attachment=None, transports=("usb",))
    )
    path = f"/users/{await user_id(wire, 'ann')}/devices"
    strict((await golden(wire, "flex/m6", "GET", path, headers=key(wire))).json, DEVICES)
    assert lines(broker, route="/v1/apps/{app_id}/users/{user_id}/devices", status=200)


async def test_m7_revoke_device(broker: Started, wire: Wire, device: Authenticator) -> None:
    passkey = await wire.user("ann", device)
    path = f"/users/{await user_id(wire, 'ann')}/devices/{passkey}"
    answer = await golden(wire, "flex/m7", "DELETE", path, headers=key(wire))
    assert answer.body == b""
    assert ("passkey.revoked", "done", None) in await broker.events(wire.app_id)
    with refused(broker, "device_not_found", "device_not_found"):
        strict((await golden(wire, "flex/m7-again", "DELETE", path, headers=key(wire))).json, ERROR)


async def test_m8_get_app(broker: Started, wire: Wire) -> None:
    answer = await golden(wire, "flex/m8", "GET", "", headers=key(wire))
    strict(answer.json, APP)
    slash = await golden(wire, "flex/m8-slash", "GET", "/", headers=key(wire))
    assert slash.json == answer.json
    assert len(lines(broker, status=200, app=wire.app_id)) == 2


async def test_a1_begin_registration(broker: Started, wire: Wire, device: Authenticator) -> None:
    await wire.user("ann", device)
    body = {
        "transaction_id": await wire.open_registration("ann"),
        "authenticator_attachment": "platform",
    }
    with counted(broker, "broker_ceremonies_total", kind="register", step="begin", result="ok"):
        await golden(
            wire, "flex/a1", "POST", "/register/transactions/webauthn/start", body, headers=PAGE
        )


async def test_a2_finish_registration(broker: Started, wire: Wire, device: Authenticator) -> None:
    transaction = await wire.open_registration("ann")
    handle, options = await wire.begin("register", transaction)
    response = flex_wire_form(device.register(options, ORIGIN))
    body = {"handshake_id": handle, "transaction_id": transaction, "handshake_response": response}
    path = "/register/transactions/webauthn/finish"
    with counted(broker, "broker_ceremonies_total", kind="register", step="finish", result="ok"):
        answer = await golden(wire, "flex/a2", "POST", path, body, headers=PAGE)
    strict(answer.json, NONCE)
    with refused(broker, "transaction_not_found", "handle_unknown"):
        answer = await golden(wire, "flex/a2-again", "POST", path, body, headers=PAGE)
    strict(answer.json, ERROR)


async def test_a2_refused_with_a_signal(broker: Started, wire: Wire, device: Authenticator) -> None:
    transaction = await wire.open_registration("ann")
    handle, options = await wire.begin("register", transaction)
    response = flex_wire_form(device.register(options, ORIGIN, uv=False))
    body = {"handshake_id": handle, "transaction_id": transaction, "handshake_response": response}
    path = "/register/transactions/webauthn/finish"
    with refused(broker, "webauthn_login_failed", "user_verification"):
        strict(
            (await golden(wire, "flex/a2-refused", "POST", path, body, headers=PAGE)).json, ERROR
        )


async def test_a3_begin_authentication(broker: Started, wire: Wire, device: Authenticator) -> None:
    await wire.user("ann", device)
    path = "/authenticate/transactions/webauthn/start"
    body = {"transaction_id": await wire.open_authentication("ann")}
    await golden(wire, "flex/a3", "POST", path, body, headers=PAGE)
    with counted(
        broker, "broker_ceremonies_total", 2, kind="discoverable", step="begin", result="ok"
    ):
        await golden(wire, "flex/a3-discoverable", "POST", path, {}, headers=PAGE)
        await golden(wire, "flex/a3-empty", "POST", path, headers=PAGE, data=b"")


async def test_a4_finish_authentication(broker: Started, wire: Wire, device: Authenticator) -> None:
    await wire.user("ann", device)
    path = "/authenticate/transactions/webauthn/finish"
    transaction = await wire.open_authentication("ann")
    handle, options = await wire.begin("authenticate", transaction)
    response = flex_wire_form(device.authenticate(options, ORIGIN))
    body = {"handshake_id": handle, "handshake_response": response, "transaction_id": transaction}
    with counted(
        broker, "broker_ceremonies_total", kind="authenticate", step="finish", result="ok"
    ):
        strict((await golden(wire, "flex/a4", "POST", path, body, headers=PAGE)).json, NONCE)
    handle, options = await wire.begin("authenticate", None)
    body = {
        "handshake_id": handle,
        "handshake_response": flex_wire_form(device.authenticate(options, ORIGIN)),
    }
    strict(
        (await golden(wire, "flex/a4-discoverable", "POST", path, body, headers=PAGE)).json, NONCE
    )


async def test_a4_refused(broker: Started, wire: Wire, device: Authenticator) -> None:
    await wire.user("ann", device)
    path = "/authenticate/transactions/webauthn/finish"
    transaction = await wire.open_authentication("ann")
    handle, options = await wire.begin("authenticate", transaction)
    response = flex_wire_form(device.authenticate(options, ORIGIN, signature=b"no"))
    body = {"handshake_id": handle, "handshake_response": response, "transaction_id": transaction}
    with refused(broker, "webauthn_login_failed", "signature"):
        strict(
            (await golden(wire, "flex/a4-refused", "POST", path, body, headers=PAGE)).json, ERROR
        )
    stranger = Authenticator()
    stranger.register(
        (await wire.begin("register", await wire.open_registration("eve")))[1], ORIGIN
    )
    handle, options = await wire.begin("authenticate", None)
    body = {
        "handshake_id": handle,
        "handshake_response": flex_wire_form(stranger.authenticate(options, ORIGIN)),
    }
    with refused(broker, "discoverable_login_failed", "unknown_credential"):
        answer = await golden(
            wire, "flex/a4-discoverable-refused", "POST", path, body, headers=PAGE
        )
    strict(answer.json, ERROR)


async def test_a5_public_app(broker: Started, wire: Wire) -> None:
    answer = await golden(
        wire, "flex/a5", "GET", "", headers={"Origin": "https://anywhere.example"}
    )
    assert answer.json["app"]["auth_origin"] == ORIGIN
    await golden(wire, "flex/a5-slash", "GET", "/", headers={"Origin": "https://anywhere.example"})
    assert len(lines(broker, status=200, app=wire.app_id)) == 2


async def test_preflights(broker: Started, wire: Wire) -> None:
    asked = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type,passage-flex-version",
    }
    path = "/authenticate/transactions/webauthn/start"
    await golden(wire, "flex/preflight", "OPTIONS", path, headers=asked)
    asked["Origin"] = "https://anywhere.example"
    await golden(wire, "flex/preflight-stranger", "OPTIONS", path, headers=asked)
    with refused(broker, "operation_not_allowed", "origin"):
        await golden(
            wire, "flex/origin", "POST", path, headers={"Origin": "https://anywhere.example"}
        )
    await golden(wire, "flex/preflight-app", "OPTIONS", "", headers=asked)


async def test_errors_of_the_edge(broker: Started, wire: Wire) -> None:
    with refused(broker, "invalid_access_token", "key_missing"):
        await golden(
            wire, "flex/error-401", "POST", "/transactions/register", USER_FIELDS, headers={}
        )
    with refused(broker, "not_found", "not_found"):
        await golden(wire, "flex/error-404", "GET", "/nothing", headers=key(wire))
    with refused(broker, "method_not_allowed", "method_not_allowed"):
        await golden(wire, "flex/error-405", "PUT", "/transactions/register", {}, headers=key(wire))


def test_masks_hide_only_well_formed_values() -> None:
    token = "pbn_" + "a" * 43
    assert masked({"nonce": token}) == {"nonce": "<nonce>"}
    assert masked({"nonce": token + "a"}) != {"nonce": "<nonce>"}
    assert masked({"nonce": token[:-1]}) != {"nonce": "<nonce>"}
    assert masked({"created_at": "2026-01-01"}) == {"created_at": "2026-01-01"}
    assert masked({"id": "a" * 24}) == {"id": "<id>"}
    assert masked({"id": "a" * 23}) == {"id": "a" * 23}


def places(kind: object, at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], bool]]:
    """Every key of a schema as a path into an answer, and whether it may be null."""
    if isinstance(kind, dict):
        for name, inner in kind.items():
            yield (*at, name), isinstance(inner, Maybe)
            yield from places(inner, (*at, name))
    elif isinstance(kind, list):
        yield from places(kind[0], (*at, 0))


def reached(value: Any, path: tuple[Any, ...]) -> Any | None:
    """The container of the path's last step, None where an answer has nothing there (an empty
    list).
    """
    for step in path[:-1]:
        if isinstance(value, list) and not value:
            return None
        value = value[step]
    return value


async def test_the_strict_client_is_strict(wire: Wire, device: Authenticator) -> None:
    """Each field of each object, taken away or set to null, makes it fail: else "accepts" would say
    nothing.
    """
    await wire.user("ann", device)
    one = await user_id(wire, "ann")
    kinds = (
        ("/users?limit=1", USERS),
        (f"/users/{one}", USER),
        (f"/users/{one}/devices", DEVICES),
        ("", APP),
    )
    tried = 0
    for path, kind in kinds:
        whole = (await wire.keyed("GET", path)).json
        strict(whole, kind)
        for place, nullable in places(kind):
            broken = copy.deepcopy(whole)
            if (holder := reached(broken, place)) is None:
                continue
            tried += 1
            holder[place[-1]] = None
            if not nullable:
                with pytest.raises(AssertionError):
                    strict(broken, kind)
            del holder[place[-1]]
            with pytest.raises(AssertionError, match="missing"):
                strict(broken, kind)
    assert tried > 100
    user = (await wire.keyed("GET", f"/users/{one}")).json
    for name, wrong in (
        ("login_count", 2**31),
        ("login_count", 1.0),
        ("status", "gone"),
        ("webauthn", 1),
    ):
        with pytest.raises(AssertionError):
            strict({"user": user["user"] | {name: wrong}}, USER)


@given(
    st.datetimes(
        datetime(1000, 1, 2),
        datetime(9999, 12, 30),
        timezones=st.sampled_from([UTC, timezone(timedelta(hours=9))]),
    )
)
@example(datetime(2026, 1, 16, 12, 30, 5, tzinfo=UTC))
def test_a_time_has_one_form(value: datetime) -> None:
    """What sorts texts, or cuts them at a place, may."""
    assert rfc3339(value) == value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
