"""Answers that WebAuthn refuses, over HTTP: verdict, signal for the page, event, metric, and the
stored credential as it was.

`signal` tells a page that its authenticator keeps a passkey which no user of the app has. It must
be there where that is proved and must never be there otherwise: a page hands it on, and the
authenticator removes the passkey.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from broker.model import Credential, Policy
from tests.conftest import OpenApp, Started
from tests.support.authenticator import (
    ES256,
    ES384,
    Authenticator,
    Misbehaviour,
    b64,
    new_key,
    unb64,
)
from tests.support.signals import counted, refused, same_answer
from tests.support.stall import stalled
from tests.support.wire import ORIGIN, RP_ID, Answer, Wire

ORIGINS = [
    "https://evil.example",
    "http://example.org",
    "https://example.org:8443",
    "https://www.example.org",
    "https://example.org.evil.example",
    "https://example.org/",
    "HTTPS://EXAMPLE.ORG",
    "https://ex\u0430mple.org",  # the first a is Cyrillic
    "null",
    "",
    "android:apk-key-hash:" + "k" * 43,
]

EITHER: list[tuple[str, Misbehaviour, str]] = [
    ("another challenge", {"challenge": b64(os.urandom(32))}, "challenge"),
    ("no challenge", {"challenge": ""}, "challenge"),
    ("another RP ID", {"rp_id": "evil.example"}, "rp_id"),
    ("the RP ID's parent", {"rp_id": "org"}, "rp_id"),
    ("user not present", {"up": False}, "user_presence"),
    ("user not verified", {"uv": False}, "user_verification"),
    ("backed up, not eligible", {"be": False, "bs": True}, "backup_flags"),
    ("in a foreign frame", {"cross_origin": True}, "cross_origin"),
    (
        "in a foreign page",
        {"cross_origin": True, "top_origin": "https://evil.example"},
        "cross_origin",
    ),
    ("top origin alone", {"top_origin": "https://evil.example"}, "top_origin"),
    ("client data no JSON", {"client_data_json": b"{"}, "malformed"),
    ("client data no object", {"client_data_json": b"[]"}, "malformed"),
    ("client data of NaN", {"client_data": {"more": float("nan")}}, "malformed"),
    ("authenticator data cut off", {"auth_data": lambda data: data[:36]}, "malformed"),
    ("authenticator data too long", {"auth_data": lambda data: data + b"\0"}, "malformed"),
    (
        "extensions no CBOR",
        {"auth_data": lambda d: d[:32] + bytes([d[32] | 0x80]) + d[33:]},
        "malformed",
    ),
]
REGISTRATION: list[tuple[str, Misbehaviour, str]] = [
    *EITHER,
    ("type of a sign-in", {"type": "webauthn.get"}, "type"),
    ("algorithm not offered", {"algorithm": ES384}, "algorithm"),
    ("unknown algorithm", {"key": {3: -999}}, "algorithm"),
    ("no algorithm", {"key": {3: None}}, "algorithm"),
    ("no key type", {"key": {1: None}}, "public_key"),
    ("no curve", {"key": {-1: None}}, "public_key"),
    ("no point", {"key": {-2: None}}, "public_key"),
    ("a short point", {"key": {-2: b"x"}}, "public_key"),
    ("a point off the curve", {"key": {-3: bytes(32)}}, "public_key"),
    ("a point of text", {"key": {-2: "x" * 32}}, "public_key"),
    ("another key's algorithm", {"private_key": new_key(ES384), "key": {3: ES256}}, "public_key"),
    (
        "another credential id",
        {"answer": {"id": b64(b"other"), "rawId": b64(b"other")}},
        "credential_id",
    ),
    ("attestation of no bytes of CBOR", {"attestation_object": lambda _: b"\xff\xff"}, "malformed"),
    ("attestation cut off", {"attestation_object": lambda whole: b"\xa3" + b"cfmt"}, "malformed"),
    ("attestation a list", {"attestation_object": lambda whole: list(whole)}, "malformed"),
    (
        "attestation without data",
        {"attestation_object": lambda w: {**w, "authData": None}},
        "malformed",
    ),
    ("attestation nested", {"attestation_object": lambda _: b"\x81" * 20_000}, "malformed"),
    (
        "attestation of a huge length",
        {"attestation_object": lambda _: b"\x5b" + b"\xff" * 8},
        "malformed",
    ),
    ("unknown format", {"attestation_object": lambda w: {**w, "fmt": "future"}}, "attestation"),
    ("none with a statement", {"statement": lambda _: {"sig": b"x"}}, "attestation"),
    (
        "self attestation of another key",
        {"attestation": "packed-self", "signature": b"x"},
        "attestation",
    ),
    (
        "a certificate of garbage",
        {"attestation": "packed", "statement": lambda s: {**s, "x5c": [b"\x30\x03\x02\x01\x01"]}},
        "attestation",
    ),
    (
        "no certificates",
        {"attestation": "packed", "statement": lambda s: {**s, "x5c": []}},
        "attestation",
    ),
    (
        "certificates of text",
        {"attestation": "packed", "statement": lambda s: {**s, "x5c": "x"}},
        "attestation",
    ),
    (
        "half a certificate",
        {"attestation": "packed", "statement": lambda s: {**s, "x5c": [s["x5c"][0][:200]]}},
        "attestation",
    ),
    (
        "another certificate's signature",
        {"attestation": "packed", "signature": b"x"},
        "attestation",
    ),
]
AUTHENTICATION: list[tuple[str, Misbehaviour, str]] = [
    *EITHER,
    ("type of a registration", {"type": "webauthn.create"}, "type"),
    ("backup eligibility changed", {"be": False, "bs": False}, "backup_eligibility"),
    ("signature of garbage", {"signature": b"no"}, "signature"),
    ("signature of another", {"signature": lambda s: s[:-1] + bytes([s[-1] ^ 1])}, "signature"),
    ("another user handle", {"user_handle": b64(b"x" * 43)}, "user_handle"),
    ("a user handle that is no handle", {"user_handle": "\u2028'; DROP"}, "user_handle"),
    ("counter went back", {"counter": 0}, "counter"),
    ("counter stood still", {"counter": 1}, "counter"),
]


async def stored(broker: Started, wire: Wire, external_id: str) -> list[Credential]:
    """Every field of every credential of a user."""
    app = await broker.parts.directory.app(wire.app_id)
    user = await broker.parts.directory.user(app, external_id=external_id)
    return await broker.parts.directory.credentials(app, user)


def signal(credential_id: bytes) -> dict[str, str]:
    return {"type": "unknown_credential", "rp_id": RP_ID, "credential_id": b64(credential_id)}


async def finish_registration(
    wire: Wire, device: Authenticator, transaction: str, origin: str = ORIGIN, **how: Any
) -> tuple[Answer, str]:
    """Begin and finish; the answer, and the credential id that the page sent."""
    handle, options = await wire.begin("register", transaction)
    made = device.register(options, origin, **how)
    return await wire.finish("register", handle, made, transaction), made["id"]


@pytest.mark.parametrize(("how", "reason"), [pytest.param(h, r, id=n) for n, h, r in REGISTRATION])
async def test_refused_registration(
    broker: Started, wire: Wire, device: Authenticator, how: Misbehaviour, reason: str
) -> None:
    transaction = await wire.open_registration("ann")
    with (
        refused(broker, "webauthn_login_failed", reason),
        counted(
            broker, "broker_ceremonies_total", kind="register", step="finish", result="refused"
        ),
    ):
        answer, sent = await finish_registration(wire, device, transaction, **how)
    assert (answer.status, answer.code) == (401, "webauthn_login_failed")
    assert answer.json["signal"] == signal(unb64(sent))
    assert (await broker.events(wire.app_id))[-1] == ("passkey.registered", "refused", reason)
    assert await stored(broker, wire, "ann") == []
    await wire.register(transaction, Authenticator())


@pytest.mark.parametrize("origin", ORIGINS)
async def test_refused_origin(
    broker: Started, wire: Wire, device: Authenticator, origin: str
) -> None:
    transaction = await wire.open_registration("ann")
    with refused(broker, "webauthn_login_failed", "origin"):
        answer, sent = await finish_registration(wire, device, transaction, origin)
    assert answer.json["signal"] == signal(unb64(sent))
    nonce = await wire.register(transaction, device)
    assert (await wire.redeem(nonce)).json["origin"] == ORIGIN
    for code, given in (
        ("webauthn_login_failed", await wire.open_authentication("ann")),
        ("discoverable_login_failed", None),
    ):
        handle, options = await wire.begin("authenticate", given)
        with refused(broker, code, "origin"):
            answer = await wire.finish(
                "authenticate", handle, device.authenticate(options, origin), given
            )
        assert (answer.status, answer.code, "signal" in answer.json) == (401, code, False)


@pytest.mark.parametrize("discoverable", [False, True], ids=["transaction", "discoverable"])
@pytest.mark.parametrize(
    ("how", "reason"), [pytest.param(h, r, id=n) for n, h, r in AUTHENTICATION]
)
async def test_refused_authentication(
    broker: Started,
    wire: Wire,
    device: Authenticator,
    how: Misbehaviour,
    reason: str,
    discoverable: bool,
) -> None:
    await wire.user("ann", device)
    before = await stored(broker, wire, "ann")
    transaction = None if discoverable else await wire.open_authentication("ann")
    code = "discoverable_login_failed" if discoverable else "webauthn_login_failed"
    kind = "discoverable" if discoverable else "authenticate"
    handle, options = await wire.begin("authenticate", transaction)
    with (
        refused(broker, code, reason),
        counted(broker, "broker_ceremonies_total", kind=kind, step="finish", result="refused"),
    ):
        made = device.authenticate(options, ORIGIN, **how)
        answer = await wire.finish("authenticate", handle, made, transaction)
    assert (answer.status, answer.code) == (401, code)
    assert "signal" not in answer.json, "somebody has this passkey"
    told = ("passkey.used", "refused", reason) in await broker.events(wire.app_id)
    proved = reason == "counter"  # a genuine passkey signed that
    assert told == (proved or not discoverable), (
        "without a transaction anybody could fill the events"
    )
    assert await stored(broker, wire, "ann") == before
    with refused(broker, "transaction_not_found", "handle_unknown"):
        again = await wire.finish("authenticate", handle, made, transaction)
    assert again.status == 404
    await wire.authenticate(transaction, device)


async def never_stored(wire: Wire) -> Authenticator:
    """An authenticator that made a passkey whose registration was never finished."""
    device = Authenticator()
    _, options = await wire.begin("register", await wire.open_registration("eve"))
    device.register(options, ORIGIN)
    return device


@pytest.mark.parametrize("discoverable", [False, True], ids=["transaction", "discoverable"])
async def test_a_credential_that_nobody_has(
    broker: Started, wire: Wire, device: Authenticator, discoverable: bool
) -> None:
    """Made and never stored: proved to be unknown here, so the page may tell the authenticator."""
    await wire.user("ann", device)
    stranger = await never_stored(wire)
    transaction = None if discoverable else await wire.open_authentication("ann")
    code = "discoverable_login_failed" if discoverable else "webauthn_login_failed"
    handle, options = await wire.begin("authenticate", transaction)
    options.pop("allowCredentials", None)
    with refused(broker, code, "unknown_credential"):
        made = stranger.authenticate(options, ORIGIN)
        answer = await wire.finish("authenticate", handle, made, transaction)
    assert (answer.status, answer.code) == (401, code)
    assert answer.json["signal"] == signal(next(iter(stranger.held)))
    told = ("passkey.used", "refused", "unknown_credential") in await broker.events(wire.app_id)
    assert told is not discoverable, (
        "an event tells of somebody; without a transaction there is nobody"
    )


async def test_a_passkey_of_another_app_with_the_same_rp_id_is_not_signalled(
    broker: Started, wire: Wire, open_app: OpenApp
) -> None:
    """An authenticator knows RP IDs, not apps: told to forget, it would forget a passkey that signs
    in over there.
    """
    visitor, other = Authenticator(), await open_app()
    await other.user("ann", visitor)
    handle, options = await wire.begin("authenticate", None)
    with refused(broker, "discoverable_login_failed", "unknown_credential"):
        answer = await wire.finish("authenticate", handle, visitor.authenticate(options, ORIGIN))
    assert (answer.status, "signal" in answer.json) == (401, False)
    await other.authenticate(None, visitor)


async def test_another_user_never_finishes_the_transaction(broker: Started, wire: Wire) -> None:
    """A right assertion by Bob for the transaction of Ann, in all that he can vary: refused, and
    both stay as they are.
    """
    ann, bob = Authenticator(), Authenticator()
    await wire.user("ann", ann)
    await wire.user("bob", bob)
    before = await stored(broker, wire, "ann"), await stored(broker, wire, "bob")
    anns_handle = b64(next(iter(ann.held.values())).user_handle)
    anns_id = next(iter(ann.held))
    for how, reason in (
        (Misbehaviour(), "not_offered"),
        (Misbehaviour(user_handle=anns_handle), "not_offered"),
        (Misbehaviour(user_handle=None), "not_offered"),
        (Misbehaviour(credential_id=anns_id), "user_handle"),
        (Misbehaviour(credential_id=anns_id, user_handle=anns_handle), "signature"),
        (Misbehaviour(credential_id=anns_id, user_handle=None), "signature"),
    ):
        transaction = await wire.open_authentication("ann")
        handle, options = await wire.begin("authenticate", transaction)
        options.pop("allowCredentials")
        with refused(broker, "webauthn_login_failed", reason):
            made = bob.authenticate(options, ORIGIN, **how)
            answer = await wire.finish("authenticate", handle, made, transaction)
        assert (answer.status, "signal" in answer.json) == (401, False)
        assert (await broker.events(wire.app_id))[-1] == ("passkey.used", "refused", reason)
    assert (await stored(broker, wire, "ann"), await stored(broker, wire, "bob")) == before


async def test_a_passkey_that_was_not_offered(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    """Of the right user, but registered after the sign-in had begun: what was offered is what
    counts.
    """
    await wire.user("ann", device)
    transaction = await wire.open_authentication("ann")
    handle, options = await wire.begin("authenticate", transaction)
    newer = Authenticator()
    await wire.user("ann", newer)
    options.pop("allowCredentials")
    with refused(broker, "webauthn_login_failed", "not_offered"):
        answer = await wire.finish(
            "authenticate", handle, newer.authenticate(options, ORIGIN), transaction
        )
    assert (answer.status, "signal" in answer.json) == (401, False)
    assert ("passkey.used", "refused", "not_offered") in await broker.events(wire.app_id)
    await wire.authenticate(await wire.open_authentication("ann"), newer)


# -- duplicates ------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", ["ann", "bob"], ids=["same user", "another user"])
async def test_a_registered_credential_id(
    broker: Started, wire: Wire, device: Authenticator, owner: str
) -> None:
    """Refused without naming the owner and without a signal, and the owner goes on signing in."""
    await wire.user(owner, device)
    taken = next(iter(device.held))
    before = await stored(broker, wire, owner)
    transaction = await wire.open_registration("ann")
    with refused(broker, "webauthn_login_failed", "duplicate"):
        answer, _ = await finish_registration(
            wire, Authenticator(), transaction, credential_id=taken
        )
    assert (answer.status, answer.code, "signal" in answer.json) == (
        401,
        "webauthn_login_failed",
        False,
    )
    assert owner not in answer.json["error"]
    assert (await broker.events(wire.app_id))[-1] == ("passkey.registered", "refused", "duplicate")
    assert await stored(broker, wire, owner) == before
    with refused(broker, "transaction_not_found", "transaction_unknown"):
        page = await wire.page(
            "/register/transactions/webauthn/start", {"transaction_id": transaction}
        )
    assert page.status == 404, "the transaction ended with it"
    assert (await wire.redeem(await wire.authenticate(None, device))).json["external_id"] == owner


async def test_20_registrations_of_one_credential_id(broker: Started, wire: Wire) -> None:
    """Twenty users at once: the unique index has one winner, the others see one and the same
    refusal.
    """
    credential_id = os.urandom(32)

    async def one(number: int) -> Answer:
        transaction = await wire.open_registration(f"user-{number}")
        return (
            await finish_registration(
                wire, Authenticator(), transaction, credential_id=credential_id
            )
        )[0]

    with refused(broker, "webauthn_login_failed", "duplicate", times=19):
        answers = await asyncio.gather(*(one(number) for number in range(20)))
    lost = [answer for answer in answers if answer.status != 200]
    assert [answer.status for answer in lost] == [401] * 19
    for answer in lost[1:]:
        same_answer(lost[0], answer)
    assert "signal" not in lost[0].json
    events = await broker.events(wire.app_id)
    assert events.count(("passkey.registered", "refused", "duplicate")) == 19
    assert events.count(("passkey.registered", "done", None)) == 1


async def test_another_app_may_have_the_same_credential_id(
    broker: Started, wire: Wire, open_app: OpenApp, device: Authenticator
) -> None:
    await wire.user("ann", device)
    other = await open_app()
    answer, _ = await finish_registration(
        other,
        Authenticator(),
        await other.open_registration("ann"),
        credential_id=next(iter(device.held)),
    )
    assert answer.status == 200
    assert ("passkey.registered", "done", None) in await broker.events(other.app_id)


@pytest.mark.parametrize("length", [1, 16, 1023])
async def test_credential_ids_up_to_1023_bytes(wire: Wire, length: int) -> None:
    device = Authenticator()
    transaction = await wire.open_registration("ann")
    answer, _ = await finish_registration(
        wire, device, transaction, credential_id=os.urandom(length)
    )
    assert answer.status == 200
    nonce = await wire.authenticate(await wire.open_authentication("ann"), device)
    assert (await wire.redeem(nonce)).json["external_id"] == "ann"


async def test_a_credential_id_over_1023_bytes(broker: Started, wire: Wire) -> None:
    """In the answer a fault of form, which spends nothing; inside authenticator data a refusal."""
    transaction = await wire.open_registration("ann")
    long = os.urandom(1024)
    with refused(broker, "invalid_request", "invalid_request"):
        answer, _ = await finish_registration(
            wire, Authenticator(), transaction, credential_id=long
        )
    assert answer.status == 400
    short = b64(long[:32])
    with refused(broker, "webauthn_login_failed", "credential_id"):
        answer, _ = await finish_registration(
            wire,
            Authenticator(),
            transaction,
            credential_id=long,
            answer={"id": short, "rawId": short},
        )
    assert answer.status == 401
    assert await stored(broker, wire, "ann") == []


async def test_a_registration_answer_that_comes_again(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    """An old answer in a new ceremony is refused without a signal: it would make the authenticator
    remove a working passkey.
    """
    transaction = await wire.open_registration("ann")
    handle, options = await wire.begin("register", transaction)
    made = device.register(options, ORIGIN)
    assert (await wire.finish("register", handle, made, transaction)).status == 200
    handle, _ = await wire.begin("register", await wire.open_registration("ann"))
    with refused(broker, "webauthn_login_failed", "challenge"):
        answer = await wire.finish("register", handle, made)
    assert (answer.status, "signal" in answer.json) == (401, False)
    assert (await wire.redeem(await wire.authenticate(None, device))).json["external_id"] == "ann"


async def test_a_registration_for_a_user_who_was_deleted_meanwhile(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    transaction = await wire.open_registration("ann")
    handle, options = await wire.begin("register", transaction)
    app = await broker.parts.directory.app(wire.app_id)
    await broker.parts.directory.delete_user(app, "ann")
    with refused(broker, "webauthn_login_failed", "no_user"):
        made = device.register(options, ORIGIN)
        answer = await wire.finish("register", handle, made, transaction)
    assert (answer.status, answer.json["signal"]) == (401, signal(unb64(made["id"])))
    assert answer.json["error"] == "This registration has ended; start again."
    assert (await broker.events(wire.app_id))[-1] == ("passkey.registered", "refused", "no_user")


# -- revocation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("discoverable", [False, True], ids=["transaction", "discoverable"])
async def test_revoked_after_begin(
    broker: Started, wire: Wire, device: Authenticator, discoverable: bool
) -> None:
    passkey = await wire.user("ann", device)
    user = (await wire.keyed("GET", "/users?identifier=ann")).json["users"][0]["id"]
    transaction = None if discoverable else await wire.open_authentication("ann")
    code = "discoverable_login_failed" if discoverable else "webauthn_login_failed"
    handle, options = await wire.begin("authenticate", transaction)
    assert (await wire.keyed("DELETE", f"/users/{user}/devices/{passkey}")).status == 200
    made = device.authenticate(options, ORIGIN)
    with refused(broker, code, "unknown_credential" if discoverable else "revoked_or_counter"):
        answer = await wire.finish("authenticate", handle, made, transaction)
    assert answer.status == 401
    assert answer.json["signal"] == signal(next(iter(device.held))), "nobody has it any more"


@pytest.mark.parametrize("discoverable", [False, True], ids=["transaction", "discoverable"])
async def test_revoked_between_the_verdict_and_the_write(
    broker: Started, wire: Wire, device: Authenticator, discoverable: bool
) -> None:
    """The assertion was right and the passkey there; the write that records the sign-in finds it
    gone.
    """
    passkey = await wire.user("ann", device)
    transaction = None if discoverable else await wire.open_authentication("ann")
    code = "discoverable_login_failed" if discoverable else "webauthn_login_failed"
    handle, options = await wire.begin("authenticate", transaction)
    made = device.authenticate(options, ORIGIN)
    with refused(broker, code, "revoked_or_counter"):
        async with stalled(broker, "credentials", mode="SHARE") as stall:
            running = asyncio.create_task(wire.finish("authenticate", handle, made, transaction))
            await stall.waiting(1)
            await stall.connection.execute("DELETE FROM credentials WHERE id = $1", passkey)
        answer = await running
    assert (answer.status, answer.code, "signal" in answer.json) == (401, code, True)
    assert ("passkey.used", "done", None) not in await broker.events(wire.app_id)


async def test_two_sign_ins_with_one_counter_value(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    """Two copies of a passkey at once: both pass the first look, the write lets one through."""
    await wire.user("ann", device)
    begun = [await wire.begin("authenticate", None) for _ in range(2)]
    answers = [device.authenticate(options, ORIGIN, counter=7) for _, options in begun]
    with refused(broker, "discoverable_login_failed", "revoked_or_counter"):
        async with stalled(broker, "credentials", mode="SHARE") as stall:
            running = [
                asyncio.create_task(wire.finish("authenticate", handle, answer))
                for (handle, _), answer in zip(begun, answers, strict=True)
            ]
            await stall.waiting(2)
        statuses = sorted([(await task).status for task in running])
    assert statuses == [200, 401]
    credential = (await stored(broker, wire, "ann"))[0]
    assert (credential.sign_count, credential.use_count) == (7, 1)


# -- what a policy decides -------------------------------------------------------------------------


async def test_a_counter_that_went_back_is_flagged_where_the_policy_says_so(
    open_app: OpenApp, broker: Started, device: Authenticator
) -> None:
    wire = await open_app(Policy(counter="flag"))
    await wire.user("ann", device)
    await wire.authenticate(None, device, counter=9)
    receipt = (await wire.redeem(await wire.authenticate(None, device, counter=3))).json
    assert receipt["counter_regressed"] is True
    assert (await broker.events(wire.app_id))[-1] == ("passkey.used", "done", "counter")
    assert (await stored(broker, wire, "ann"))[0].sign_count == 9, "the highest is remembered"
    receipt = (await wire.redeem(await wire.authenticate(None, device, counter=10))).json
    assert receipt["counter_regressed"] is False


async def test_user_verification_as_the_policy_asks(
    open_app: OpenApp, device: Authenticator
) -> None:
    wire = await open_app(Policy(user_verification="preferred"))
    nonce = await wire.register(await wire.open_registration("ann"), device, uv=False)
    assert (await wire.redeem(nonce)).json["user_verified"] is False
    nonce = await wire.authenticate(await wire.open_authentication("ann"), device, uv=False)
    assert (await wire.redeem(nonce)).json["user_verified"] is False
    nonce = await wire.authenticate(None, device)
    assert (await wire.redeem(nonce)).json["user_verified"] is True


async def test_a_backup_that_came_or_went_is_on_the_receipt(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    await wire.user("ann", device)
    seen = []
    for backed_up in (True, False, False, True):
        receipt = (await wire.redeem(await wire.authenticate(None, device, bs=backed_up))).json
        seen.append((receipt["backed_up"], receipt["backup_changed"]))
    assert seen == [(True, False), (False, True), (False, False), (True, True)]
    assert (await broker.events(wire.app_id)).count(("passkey.used", "done", None)) == 4


async def test_the_name_of_an_authenticator_is_a_claim(wire: Wire, broker: Started) -> None:
    aaguid = bytes.fromhex("bada5566a7aa401fbd9645619a55120d")
    nonce = await wire.register(await wire.open_registration("ann"), Authenticator(aaguid=aaguid))
    receipt = (await wire.redeem(nonce)).json
    assert (receipt["authenticator_name_claimed"], receipt["attestation"]) == ("1Password", "none")
    claimed = Authenticator(attestation="packed")
    nonce = await wire.register(await wire.open_registration("bob"), claimed)
    assert (await wire.redeem(nonce)).json["attestation"] == "claimed"
    assert broker.metric("broker_redemptions_total", result="ok") == 2
