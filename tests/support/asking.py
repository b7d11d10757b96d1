"""Every route of every dialect, asked at least once as its callers ask, with success; and what else
makes statements of its own.

For tests that look at all of the broker's work at once. What each answer says is looked at by the
dialects' own tests.
"""

from __future__ import annotations

import time
from itertools import product
from typing import Any
from urllib.parse import quote

import aiohttp

from broker.app import Service
from broker.durable import instant
from broker.durable.housekeeping import Housekeeping
from broker.model import Policy
from tests.support.authenticator import Authenticator
from tests.support.byo import Byo
from tests.support.hanko import LOGIN, SECOND_LOGIN, SECOND_REGISTRATION, TRANSACTION, Hanko
from tests.support.passlock import Passlock
from tests.support.wire import ORIGIN, Answer, Wire

POLICY = Policy(passlock_open_registration=True, declared={"hanko_algorithm": "ES256"})
_LONG_AGO, _FAR = "2020-01-01T00:00:00Z", "2100-01-01T00:00:00Z"


async def ask_everything(service: Service, session: aiohttp.ClientSession) -> None:
    """One app and its users, through all dialects; then what operators do with them by the same
    statements.
    """
    wire = await Wire.open(service, session, policy=POLICY)
    ok(await wire.send("GET", f"{wire.url}/health/ready"))
    await _flex(wire)
    await _flex_management(wire)
    await _hanko(wire)
    await _passlock(wire)
    await _propelauth(wire)
    await _operators(service, wire)
    await _in_two_days(
        service, await Wire.open(service, session, policy=Policy(live_at="redemption"))
    )


def ok(answer: Answer) -> Any:
    """The JSON of a success."""
    assert answer.status < 400, answer.body
    return answer.json


async def _flex(wire: Wire) -> None:
    """Ceremonies, by every way to join their two halves."""
    device, stranger = Authenticator(), Authenticator()
    first = await wire.user("ann", device)
    wishes = {"external_id": "ann", "passkey_display_name": "Ann", "exclude_passkeys": [first]}
    transaction = ok(await wire.keyed("POST", "/transactions/register", wishes))["transaction_id"]
    await wire.redeem(await wire.register(transaction, Authenticator()))
    whoms: list[dict[str, object]] = [
        {"external_id": "ann"},
        {"passkeys": [first]},
        {"discoverable": True},
    ]
    for whom in (*whoms, {"external_id": "ann", "passkeys": [first]}):
        transaction = ok(await wire.keyed("POST", "/transactions/authenticate", whom))[
            "transaction_id"
        ]
        ok(await wire.redeem(await wire.authenticate(transaction, device)))
    ok(await wire.redeem(await wire.authenticate(None, device)))
    cancelled = {"transaction_id": await wire.open_authentication("ann")}
    assert (await wire.keyed("POST", "/transactions/cancel", cancelled)).status == 200
    for path in ("", "/", "/.well-known/jwks.json"):
        ok(await wire.send("GET", wire.base + path))

    for base in ("", "/ceremonies"):
        whose: dict[str, object] = {} if base else {"external_id": "bob"}
        bob, body = Authenticator(), {"external_id": "bob", "user_name": "bob"}
        options = ok(await wire.keyed("POST", f"{base}/register/start", body))["options"]
        made: dict[str, object] = {"credential": bob.register(options, ORIGIN), **whose}
        ok(await wire.keyed("POST", f"{base}/register/finish", made))
        body = {"external_id": "bob"}
        options = ok(await wire.keyed("POST", f"{base}/authenticate/start", body))["options"]
        made = {"credential": bob.authenticate(options, ORIGIN), **whose}
        ok(await wire.keyed("POST", f"{base}/authenticate/finish", made))
    approval: dict[str, object] = {
        "external_id": "ann",
        "approval": {"id": "payment-1", "data": {"to": "Bob"}},
    }
    options = ok(await wire.keyed("POST", "/ceremonies/authenticate/start", approval))["options"]
    made = {"credential": device.authenticate(options, ORIGIN), "approval": True}
    ok(await wire.keyed("POST", "/ceremonies/authenticate/finish", made))

    # Refusals that look somebody up, or are told in the app's events.
    await wire.user("eve", stranger)
    [gone] = ok(await wire.keyed("GET", "/passkeys?external_id=eve"))["passkeys"]
    ok(await wire.keyed("DELETE", f"/passkeys/{gone['id']}"))
    handle, options = await wire.begin("authenticate", None)
    unknown = await wire.finish("authenticate", handle, stranger.authenticate(options, ORIGIN))
    handle, options = await wire.begin("authenticate", await wire.open_authentication("ann"))
    unverified = await wire.finish(
        "authenticate", handle, device.authenticate(options, ORIGIN, uv=False)
    )
    assert [a.status // 100 for a in (unknown, unverified)] == [4, 4]


async def _flex_management(wire: Wire) -> None:
    device = Authenticator()
    passkey, other = await wire.user("mia", device), await wire.user("mia", Authenticator())
    [user] = ok(await wire.keyed("GET", "/users?identifier=mia"))["users"]
    for order, way in product(("created_at", "updated_at", "id"), ("ASC", "DESC")):
        ok(await wire.keyed("GET", f"/users?order_by={order}:{way}&limit=2&page=2"))
    ok(await wire.keyed("GET", f"/users?id={user['id']}&status=active&created_before=4102444800"))
    for path in ("", "/devices", "/approvals"):
        ok(await wire.keyed("GET", f"/users/{user['id']}{path}"))
    ok(await wire.keyed("PATCH", f"/users/{user['id']}", {"user_name": "mia@example.org"}))
    for verb in ("disable", "enable"):
        await wire.keyed("POST", f"/users/{user['id']}/{verb}")
    for query in ("", "?external_id=mia", "?order_by=created_at:DESC&page=2"):
        ok(await wire.keyed("GET", f"/passkeys{query}"))
    ok(await wire.keyed("GET", f"/passkeys/{passkey}"))
    ok(await wire.keyed("PATCH", f"/passkeys/{passkey}", {"nickname": "Work"}))
    for query in (
        "",
        f"?after={_LONG_AGO}&before={_FAR}",
        "?user=mia",
        "?action=passkey.used",
        "?cursor=0",
    ):
        ok(await wire.keyed("GET", f"/events{query}"))
    for kind, body in (
        ("update", {"external_id": "mia", "user_name": "mia"}),
        ("prune", {"external_id": "mia"}),
        ("delete", {"passkeys": [other]}),
        ("delete", {"external_id": "nobody"}),
    ):
        ticket = ok(await wire.keyed("POST", f"/signals/{kind}", body))["ticket"]
        ok(await wire.page("/signals/exchange", {"kind": kind, "ticket": ticket}))
    ok(await wire.keyed("DELETE", f"/users/{user['id']}/devices/{passkey}"))
    for name in ("ann@example.org", "bob@example.org"):
        body = {"email": name, "purpose": "sign-in", "external_id": "ann"}
        code = ok(await wire.keyed("POST", "/mail_codes", body))["mail_code"]
        ok(await wire.keyed("GET", f"/mail_codes/{code['id']}"))
        if name.startswith("ann"):
            given = {field: code[field] for field in ("id", "secret", "code")}
            ok(await wire.keyed("POST", "/mail_codes/verify", given))
        else:
            ok(await wire.keyed("DELETE", f"/mail_codes/{code['id']}"))


async def _hanko(wire: Wire) -> None:
    hanko, device, key = Hanko(wire), Authenticator(), Authenticator()
    cred = (await hanko.register("hans", device))["cred"]
    await hanko.login(device)
    await hanko.login(device, user="hans")
    await hanko.register("hans", key, at=SECOND_REGISTRATION)
    await hanko.login(key, at=SECOND_LOGIN, user="hans")
    payment = {"user_id": "hans", "transaction_id": "payment-2", "transaction_data": {"to": "Bob"}}
    options = await hanko.begin(TRANSACTION, **payment)
    await hanko.finish(TRANSACTION, device.authenticate(options, ORIGIN))
    [user] = ok(await wire.keyed("GET", "/users?identifier=hans"))["users"]
    await hanko.get(f"{TRANSACTION}/{user['id']}")
    for query in ("", "?user_id=hans", "?order=asc&page=2"):
        await hanko.get(f"/credentials{query}")
    await hanko.get(f"/credentials/{cred}")
    ok(await hanko.send("PATCH", f"/credentials/{cred}", {"name": "Phone"}))
    types = "&type=webauthn_authentication_final_succeeded"
    for query in (
        "",
        f"?start_time={_LONG_AGO}&end_time={_FAR}",
        "?actor_user_id=hans",
        "?q=han",
        f"?page=1{types}",
    ):
        await hanko.get(f"/audit_logs{query}")
    ok(await hanko.send("DELETE", f"/credentials/{cred}"))
    answer = device.authenticate(await hanko.begin(LOGIN), ORIGIN)
    assert (await hanko.page(LOGIN + "/finalize", answer)).status == 401


async def _passlock(wire: Wire) -> None:
    """By both of its generations of paths."""
    await Passlock(wire).register("pia", Authenticator())
    for prefix in ("/v2", ""):
        passlock, new, device = Passlock(wire, prefix), Passlock(wire), Authenticator()
        kinds = ("registration", "authentication")
        user = f"pat{prefix.replace('/', '-')}"
        passkey = (await _passlock_page(wire, passlock, user, device))["principal"][
            "authenticatorId"
        ]
        ok(await wire.send("GET", f"{wire.url}{prefix}/.well-known/jwks.json"))
        codes = []
        for _ in range(2):
            token = {"authenticationToken": await new.authorize_authentication(user)}
            codes.append((await passlock.run("authentication", token, device))["code"])
        await passlock.exchange(codes[0])
        await passlock.ok("POST", f"/principal/{codes[1]}", {"userId": user})
        await passlock.ok("GET", "/passkeys/")
        await passlock.passkey(passkey)
        await passlock.ok("PATCH", f"/passkeys/{passkey}", {"username": "new"})
        await passlock.ok("PATCH", f"/users/{user}/passkeys/", {"username": "newer"})
        await _passlock_open(wire, passlock)
        await _passlock_mail(wire, prefix)
        if prefix:
            for kind in kinds:
                body = {
                    "rpId": "example.org",
                    "rpName": "Example",
                    "userId": user,
                    "username": user,
                }
                await passlock.ok("POST", f"/passkey/{kind}/prepare", body)
            for kind, body in (
                ("update", {"userId": user, "username": "x"}),
                ("prune", {"userId": user}),
            ):
                field = f"{kind}PasskeysToken"
                token = (await passlock.ok("POST", f"/passkeys/{kind}", body))[field]
                await passlock.page_ok(f"/passkeys/{kind}/exchange", {field: token})
            doomed = await passlock.user(user, Authenticator())
            token = (await passlock.ok("POST", "/passkeys/delete", {"passkeyIds": [doomed]}))[
                "deletePasskeysToken"
            ]
            await passlock.page_ok("/passkeys/delete/exchange", {"deletePasskeysToken": token})
        else:
            for path in (f"/credential/{passkey}", f"/credentials/{passkey}"):
                ok(await wire.send("GET", passlock.base + path, headers={"Origin": ORIGIN}))
        await passlock.ok("DELETE", f"/passkeys/{passkey}")
        await passlock.ok("DELETE", f"/users/{user}/passkeys/", {"userId": user})


async def _passlock_page(wire: Wire, passlock: Passlock, user: str, device: Authenticator) -> Any:
    """A registration whose page is of this generation."""
    token = {"registrationToken": await Passlock(wire).authorize_registration(user)}
    return await passlock.run("registration", token, device)


async def _passlock_open(wire: Wire, passlock: Passlock) -> None:
    """Passkeys that a page registers before anybody says whose they are; given an owner by both
    dialects that can.
    """
    page, prefix = Passlock(wire, ""), passlock.prefix.replace("/", "-")
    for owner in (f"new{prefix}", "ann"):
        made = await page.run("registration", {"username": "somebody"}, Authenticator())
        passkey = made["principal"]["authenticatorId"]
        if owner == "ann":
            ok(await wire.keyed("POST", f"/passkeys/{passkey}/owner", {"external_id": owner}))
        else:
            await passlock.ok("PATCH", f"/passkeys/{passkey}", {"userId": owner})
    device = Authenticator()
    await page.run("registration", {"username": "somebody"}, device)
    await page.run("authentication", {}, device)


async def _passlock_mail(wire: Wire, prefix: str) -> None:
    url = f"{wire.url}{prefix}/{wire.app_id}/challenges"
    for number in range(2):
        body = {"email": f"m{number}{quote(prefix, safe='')}@example.org", "purpose": "login"}
        made = ok(await wire.keyed("POST", url, body))["challenge"]
        ok(await wire.keyed("GET", f"{url}/{made['challengeId']}"))
        if number:
            ok(await wire.keyed("DELETE", f"{url}/{made['challengeId']}"))
        else:
            given = {field: made[field] for field in ("challengeId", "secret", "code")}
            ok(await wire.keyed("POST", f"{url}/verify", given))


async def _propelauth(wire: Wire) -> None:
    byo, device = Byo(wire), Authenticator()
    await byo.ok("Ping")
    cred = await byo.register("pam", device)
    await byo.authenticate("pam", device)
    await byo.passkeys("pam")
    await byo.ok("DeregisterPasskey", userId="pam", credentialId=cred)
    await byo.register("pam", Authenticator())
    await byo.ok("DeregisterAllPasskeysForUser", userId="pam")


async def _operators(service: Service, wire: Wire) -> None:
    """What the command line does by the verbs that requests use, too, on tables that grow."""
    directory, signing = service.parts.directory, service.parts.signing
    app = await directory.app(wire.app_id)
    await directory.update_app(app)
    key, _ = await directory.create_key(app.id, "second")
    await directory.keys(app.id)
    await directory.revoke_key(app.id, key.id)
    await directory.events(app.id, limit=10)
    await directory.events_after(app.id, 0, limit=10)
    await service.parts.durable.events.cursor_before(app.id, instant(time.time()))
    await signing.rotate(app, "ES256")
    await directory.delete_user(app, "bob")
    doomed, _ = await directory.create_app("Doomed", "example.org", (ORIGIN,))
    await directory.delete_app(doomed.id)


async def _in_two_days(service: Service, wire: Wire) -> None:
    """What the periodic clean-up does with a passkey that nobody confirmed and a user who never got
    one.
    """
    await wire.register(await wire.open_registration("late"), Authenticator())
    await wire.open_registration("never")
    parts = service.parts
    clean_up = Housekeeping(
        parts.postgres,
        retention_days=90,
        metrics=parts.metrics,
        log=parts.log,
        clock=lambda: time.time() + 2 * 86_400,
    )
    done = await clean_up.clean()
    uncounted = {"spent_values", "event_months", "old_event_months", "events"}
    assert done.keys() == clean_up._chores.keys() - uncounted, (
        "each had something to do, but that events stay and nothing is counted of partitions"
    )
