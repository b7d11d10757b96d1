"""What Hanko's backends read and change by key: credentials, the audit log; and the token that a
ceremony ends with.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from broker.model import ANYONE, Names, Policy
from tests.conftest import SKEW, OpenApp, Started, Starter
from tests.support.authenticator import Authenticator, b64, unb64
from tests.support.hanko import (
    LOGIN,
    REGISTRATION,
    SECOND_LOGIN,
    SECOND_REGISTRATION,
    TRANSACTION,
    Hanko,
)
from tests.support.signals import lines, refused
from tests.support.verbs import keyed
from tests.support.wire import ORIGIN, Wire

QUICK = Policy(declared={"hanko_algorithm": "ES256"})  # keys that are made at once


@pytest.fixture
async def hanko(open_app: OpenApp) -> Hanko:
    return Hanko(await open_app(QUICK))


# -- credentials -----------------------------------------------------------------------------------


async def test_credentials_in_pages(start_broker: Starter, session: Any) -> None:
    """Newest first, 20 a page; the links are made from the public address, and never from the Host
    header.
    """
    started = await start_broker(public_url="https://passkeys.example.org/at")
    hanko = Hanko(await Wire.open(started.service, session, policy=QUICK))
    made = [(await hanko.register(f"u{n % 3}", Authenticator()))["cred"] for n in range(22)]
    answer = await hanko.send("GET", "/credentials", headers={"Host": "evil.example"})
    assert [c["id"] for c in answer.json] == made[:1:-1]
    assert answer.headers["X-Total-Count"] == "22"
    url = f"https://passkeys.example.org/at/hanko/{hanko.wire.app_id}/credentials?"
    assert answer.headers["Link"] == (
        f'<{url}page=1&per_page=20>; rel="first",'
        f'<{url}page=2&per_page=20>; rel="last",<{url}page=2&per_page=20>; rel="next"'
    )
    seen = []
    for page in (1, 2, 3, 4):
        answer = await hanko.send(
            "GET", f"/credentials?user_id=u1&per_page=3&page={page}&order=asc"
        )
        seen += [c["id"] for c in answer.json]
        rels = {link.partition("rel=")[2].strip('"') for link in answer.headers["Link"].split(",")}
        assert rels == {"first", "last"} | ({"next"} if page < 3 else set()) | (
            {"prev"} if page > 1 else set()
        )
        assert answer.headers["X-Total-Count"] == "7"
    assert seen == made[1::3]
    assert {c["user_id"] for c in await hanko.get("/credentials?per_page=1000")} == {
        "u0",
        "u1",
        "u2",
    }
    assert (
        await hanko.get("/credentials?user_id=") == await hanko.get("/credentials?user_id=U1") == []
    )
    assert len(await hanko.get("/credentials?order=&page=&per_page=")) == 20


@pytest.mark.parametrize("path", ["/credentials", "/audit_logs"])
async def test_a_list_that_can_not_be_given(broker: Started, hanko: Hanko, path: str) -> None:
    for query in (
        "page=0", "page=-1", "page=x", "page=1.5", "page=1000001", "per_page=0", "per_page=1001",
        "page=1&page=2", "user_id=a&user_id=b&page=x", "page=%00", "%ff=1", "page=" + "9" * 30,
        "page=٣", "&".join(["a=1"] * 40),
    ):  # fmt: skip
        answer = await hanko.send("GET", f"{path}?{query}")
        assert answer.status == 400, query
    for query in ("order=up", "order=ASC", "user_id=%00", "user_id=a&user_id=b"):
        assert (await hanko.send("GET", f"/credentials?{query}")).status == 400
    assert not lines(broker, status=500)


async def test_one_credential(broker: Started, hanko: Hanko, open_app: OpenApp) -> None:
    """Named after its make, else after its id, until it is renamed; every field has its value."""
    known = Authenticator(
        aaguid=bytes.fromhex("fbfc3007154e4ecc8c0b6e020557d7bd"), transports=("internal",)
    )
    cred = (await hanko.register("ann", known))["cred"]
    one = await hanko.get(f"/credentials/{cred}")
    assert (one["name"], one["aaguid"]) == (
        "iCloud Keychain",
        "fbfc3007-154e-4ecc-8c0b-6e020557d7bd",
    )
    assert (one["id"], one["user_id"], one["transports"]) == (cred, "ann", ["internal"])
    assert (one["backup_eligible"], one["backup_state"], one["attestation_type"]) == (
        True,
        True,
        "none",
    )
    assert one["last_used_at"] == one["created_at"]
    broker.clock.ahead += 5
    await hanko.login(known, bs=False)
    one = await hanko.get(f"/credentials/{cred}")
    assert one["last_used_at"] > one["created_at"]
    assert one["backup_state"] is False
    assert (await hanko.get("/credentials?user_id=ann")) == [one]
    encoded = "".join(f"%{ord(c):02x}" for c in cred)
    assert await hanko.get(f"/credentials/{encoded}") == one
    for name, status in (("x" * 256, 204), ("x" * 257, 400), (" ", 204), ("Ann's 📱", 204)):
        assert (await hanko.send("PATCH", f"/credentials/{cred}", {"name": name})).status == status
    assert (await hanko.get(f"/credentials/{cred}"))["name"] == "Ann's 📱"
    other = Hanko(await open_app())
    for method, body in (("GET", None), ("PATCH", {"name": "x"}), ("DELETE", None)):
        title = f"credential with id '{cred}' not found"
        await other.refused(404, title, f"/credentials/{cred}", body, method=method)
    for method, body in (("GET", None), ("PATCH", {"name": "x"}), ("DELETE", None)):
        for user in ("bob", ""):
            path = f"/credentials/{cred}?user_id={user}"
            await hanko.refused(
                404, f"credential with id '{cred}' not found", path, body, method=method
            )
    assert (await hanko.get(f"/credentials/{cred}?user_id=ann"))["name"] == "Ann's 📱"
    for bad in (cred + "=", cred[:-1], "%00", "é", "%ff", "a b", "x" * 2000, "..%2f"):
        missing = await hanko.send("GET", f"/credentials/{bad}")
        assert missing.status == 404
        assert missing.json["title"].startswith("credential with id '")
    assert (await hanko.send("DELETE", f"/credentials/{cred}?user_id=ann")).status == 204
    answer = known.authenticate(await hanko.begin(), ORIGIN)
    with refused(broker, "discoverable_login_failed", "unknown_credential"):
        await hanko.refused(401, "failed to validate assertion", LOGIN + "/finalize", answer)


async def test_a_passkey_that_nobody_owns_yet(
    broker: Started, hanko: Hanko, device: Authenticator
) -> None:
    """Is listed without a user, and signs in nowhere."""
    app = await broker.parts.directory.app(hanko.wire.app_id)
    await hanko.wire.register(
        await broker.parts.broker.open_registration(
            keyed(app), ANYONE, Names("Somebody", "Somebody", "Somebody")
        ),
        device,
    )
    [listed] = await hanko.get("/credentials")
    assert "user_id" not in listed
    assert await hanko.get("/credentials?user_id=") == []
    answer = device.authenticate(await hanko.begin(), ORIGIN)
    with refused(broker, "discoverable_login_failed", "ownerless"):
        await hanko.refused(401, "failed to validate assertion", LOGIN + "/finalize", answer)


async def test_a_passkey_signs_in_through_hanko_and_flex(
    hanko: Hanko, device: Authenticator
) -> None:
    other = Authenticator()
    await hanko.wire.user("ann", device)
    assert (
        (await hanko.login(device))["sub"]
        == (await hanko.login(device, user="ann"))["sub"]
        == "ann"
    )
    assert (await hanko.credentials("ann"))[0]["name"] == "Ann's passkey"
    await hanko.register("bob", other)
    nonce = await hanko.wire.authenticate(await hanko.wire.open_authentication("bob"), other)
    assert (await hanko.wire.redeem(nonce)).json["external_id"] == "bob"


# -- audit log -------------------------------------------------------------------------------------


async def test_failures_stay_in_the_audit_log(
    broker: Started, hanko: Hanko, device: Authenticator
) -> None:
    """The vendor loses them. Newest first, with the caller's request id, filtered by type, time and
    user.
    """
    await hanko.register("ann", device)
    broker.clock.ahead += 10
    answer = device.authenticate(await hanko.begin(user_id="ann"), ORIGIN, signature=b"x")
    await hanko.send("POST", LOGIN + "/finalize", answer, headers={"X-Request-Id": "request-0001"})
    made = Authenticator().register(
        await hanko.begin_registration("bob"), ORIGIN, rp_id="evil.example"
    )
    await hanko.send("POST", REGISTRATION + "/finalize", made)
    logs = await hanko.get("/audit_logs")
    assert [(log["type"], log.get("error"), log["actor_user_id"]) for log in logs] == [
        ("webauthn_registration_final_failed", "rp_id", "bob"),
        ("webauthn_authentication_final_failed", "signature", "ann"),
        ("webauthn_registration_final_succeeded", None, "ann"),
    ]
    assert logs[1]["meta_http_request_id"] == "request-0001"
    start = logs[1]["created_at"]
    for query, rows in (
        ("type=webauthn_authentication_final_failed", [1]),
        (
            "type=webauthn_authentication_final_failed&type=webauthn_registration_final_succeeded",
            [1, 2],
        ),
        ("type=webauthn_registration_init_succeeded", []),
        ("type=x'%20OR%20true--", []),
        ("actor_user_id=an", [1, 2]),
        ("q=bo", [0]),
        ("q=%25", []),
        ("q=", [0, 1, 2]),
        ("meta_source_ip=127", [0, 1, 2]),
        ("meta_source_ip=127&actor_user_id=an", [1, 2]),
        ("q=127.0.0.1", [0, 1, 2]),
        ("meta_source_ip=192", []),
        (f"start_time={start}", [0]),
        (f"end_time={start}", [2]),
        (f"start_time={logs[2]['created_at']}&end_time={logs[0]['created_at']}", [1]),
        ("per_page=1&page=2", [1]),
        ("page=9", []),
    ):
        assert await hanko.get(f"/audit_logs?{query}") == [logs[n] for n in rows], query
    counted = await hanko.send(
        "GET", "/audit_logs?per_page=2&type=webauthn_registration_final_failed"
    )
    assert counted.headers["X-Total-Count"] == "1"
    for query in (
        "start_time=now",
        "end_time=2026-01-01T00:00:00",
        "start_time=0001-01-01T00:00:00%2B14:00",
    ):
        await hanko.refused(400, "unable to validate request", f"/audit_logs?{query}", method="GET")


async def test_second_factors_and_transactions_have_audit_types(
    hanko: Hanko, device: Authenticator
) -> None:
    key = Authenticator()
    await hanko.register("ann", device)
    await hanko.register("ann", key, at=SECOND_REGISTRATION)
    await hanko.login(key, at=SECOND_LOGIN, user="ann")
    for origin in (ORIGIN, "https://elsewhere.example"):
        payment = {"user_id": "ann", "transaction_id": origin, "transaction_data": {"euros": 5}}
        options = (await hanko.ok(TRANSACTION + "/initialize", payment))["publicKey"]
        await hanko.send("POST", TRANSACTION + "/finalize", device.authenticate(options, origin))
    assert [log["type"] for log in reversed(await hanko.get("/audit_logs"))] == [
        "webauthn_registration_final_succeeded",
        "mfa_registration_final_succeeded",
        "mfa_authentication_final_succeeded",
        "webauthn_transaction_final_succeeded",
        "webauthn_transaction_final_failed",
    ]
    [failed] = await hanko.get("/audit_logs?type=webauthn_transaction_final_failed")
    assert failed["error"] == "origin"


async def test_the_audit_log_is_its_tenants(
    hanko: Hanko, open_app: OpenApp, device: Authenticator
) -> None:
    await hanko.register("ann", device)
    assert await Hanko(await open_app()).get("/audit_logs") == []
    assert len(await hanko.get("/audit_logs")) == 1


# -- token -----------------------------------------------------------------------------------------


async def test_the_claims_of_a_token(
    hanko: Hanko, start_broker: Starter, session: Any, device: Authenticator
) -> None:
    claims = await hanko.register("ann", device)
    assert claims["exp"] - claims["iat"] == 300
    assert claims["cred"] == b64(device.credentials("example.org")[0].id)
    assert set(claims) == {"sub", "cred", "aud", "iat", "exp", "jti", "purpose"}
    assert (claims["aud"], claims["sub"]) == (["example.org"], "ann")
    second = await start_broker(hanko_token_life=60)
    claims = await Hanko(Wire(session, second.url, hanko.wire.app_id, hanko.wire.key)).login(device)
    assert claims["exp"] - claims["iat"] == 60


@pytest.mark.parametrize("algorithm", ["RS256", "PS256", "ES256", "EdDSA"])
async def test_the_algorithm_is_the_policys(
    open_app: OpenApp, device: Authenticator, algorithm: Any
) -> None:
    hanko = Hanko(await open_app(Policy(declared={"hanko_algorithm": algorithm})))
    [key] = (await hanko.get("/.well-known/jwks.json"))["keys"]  # there before anything was signed
    assert (key["alg"], key["use"]) == (algorithm, "sig")
    assert not set(key) & {"d", "p", "q", "dp", "dq", "qi", "k"}
    made = device.register(await hanko.begin_registration("ann"), ORIGIN)
    token = (await hanko.ok(REGISTRATION + "/finalize", made))["token"]
    head = json.loads(unb64(token.partition(".")[0]))
    assert head == {"alg": algorithm, "kid": key["kid"], "typ": "JWT"}
    assert (await hanko.claims(token))["sub"] == "ann"


async def test_a_token_can_be_redeemed_once(
    broker: Started, hanko: Hanko, open_app: OpenApp, device: Authenticator
) -> None:
    """Its `jti` is a nonce of the Flex API, for as long as the token lives."""
    made = await hanko.register("ann", device)
    answer = await hanko.wire.redeem(made["jti"], purpose="register", external_id="ann")
    assert (answer.status, answer.json["credential_id"]) == (200, made["cred"])
    for backend in (hanko.wire, await open_app()):
        assert (await backend.redeem(made["jti"])).status == 401
    claims = await hanko.login(device)
    assert (await hanko.wire.redeem(claims["jti"], external_id="bob")).status == 401
    early, late = await hanko.login(device), await hanko.login(device)
    broker.clock.ahead += 299
    assert (await hanko.wire.redeem(early["jti"], purpose="authenticate")).status == 200
    broker.clock.ahead += 2 + SKEW
    assert (await hanko.wire.redeem(late["jti"])).status == 401


async def test_of_50_redemptions_of_a_token_one_succeeds(
    hanko: Hanko, device: Authenticator
) -> None:
    jti = (await hanko.register("ann", device))["jti"]
    answers = await asyncio.gather(*(hanko.wire.redeem(jti) for _ in range(50)))
    assert sorted(answer.status for answer in answers) == [200] + [401] * 49


async def test_live_at_redemption_of_a_token(open_app: OpenApp, device: Authenticator) -> None:
    """Where the policy says so, a passkey signs in once the token of its registration was redeemed;
    a keyed finalize redeems.
    """
    hanko = Hanko(
        await open_app(Policy(live_at="redemption", declared={"hanko_algorithm": "ES256"}))
    )
    jti = (await hanko.register("ann", device))["jti"]
    title = "user has no suitable credentials for this operation"
    await hanko.refused(400, title, LOGIN + "/initialize", {"user_id": "ann"})
    assert (await hanko.wire.redeem(jti, purpose="register")).status == 200
    assert (await hanko.login(device, user="ann"))["sub"] == "ann"
    key = Authenticator()
    await hanko.register("bob", key, at=SECOND_REGISTRATION)
    assert (await hanko.login(key, at=SECOND_LOGIN, user="bob"))["sub"] == "bob"
