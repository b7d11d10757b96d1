"""The Passlock dialect's lists and changes of passkeys, and what pages hear of them."""

from __future__ import annotations

from typing import cast

import pytest

from broker.dialects.passlock import management
from tests.conftest import OpenApp, Started
from tests.support.authenticator import Authenticator, b64
from tests.support.passlock import Passlock
from tests.support.signals import refused, same_answer
from tests.support.wire import ORIGIN, RP_ID, Wire


@pytest.fixture
def passlock(wire: Wire) -> Passlock:
    return Passlock(wire)


# -- lists -----------------------------------------------------------------------------------------


async def test_pages(
    passlock: Passlock, open_app: OpenApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oldest first; a page begins behind the last one's last, whatever was added or deleted
    meanwhile.
    """
    monkeypatch.setattr(management, "PAGE_SIZE", 2)
    ids = [await passlock.user(f"user-{n}", Authenticator()) for n in range(5)]
    await Passlock(await open_app()).user("ann", Authenticator())

    async def page(cursor: str | None) -> tuple[list[str], str | None]:
        found = await passlock.ok("GET", "/passkeys/" + (f"?cursor={cursor}" if cursor else ""))
        assert cast("str", found["cursor"] or "x").replace("-", "").replace("_", "").isalnum()
        return [record["id"] for record in found["records"]], found["cursor"]

    first, cursor = await page(None)
    assert first == ids[:2]
    await passlock.ok("DELETE", f"/passkeys/{ids[1]}")
    await passlock.ok("DELETE", f"/passkeys/{ids[0]}")
    second, cursor = await page(cursor)
    assert second == ids[2:4]
    ids.append(await passlock.user("late", Authenticator()))
    third, cursor = await page(cursor)
    assert (third, cursor) == (ids[4:], None)
    for wrong in ("x", "YQ", b64(b"1.x"), "%00", "%FF", "x" * 500):
        assert (await passlock.keyed("GET", f"/passkeys/?cursor={wrong}")).status == 400, wrong
    assert await page("") == (ids[2:4], (await page(None))[1])


async def test_a_passkey_is_shown_whole(passlock: Passlock) -> None:
    device = Authenticator(backup_eligible=False, backed_up=False)
    passkey_id = await passlock.user("ann", device)
    found = await passlock.passkey(passkey_id)
    held = device.credentials(RP_ID)[0]
    assert "lastUsed" not in found
    credential = found["credential"]
    assert (credential["id"], credential["userId"]) == (b64(held.id), b64(held.user_handle))
    assert (credential["deviceType"], credential["backedUp"]) == ("singleDevice", False)
    assert (found["userId"], credential["username"], credential["rpId"]) == (
        "ann",
        "ann@example.org",
        RP_ID,
    )
    await passlock.authenticate("ann", device)
    assert (await passlock.passkey(passkey_id))["lastUsed"] >= found["createdAt"]


@pytest.mark.parametrize("method", ["GET", "PATCH", "DELETE"])
async def test_a_passkey_of_another_app_is_unknown(
    passlock: Passlock, open_app: OpenApp, method: str
) -> None:
    passkey_id = await Passlock(await open_app()).user("ann", Authenticator())
    first = await passlock.keyed(
        method, f"/passkeys/{'x' * 24}", {"username": "x"} if method == "PATCH" else None
    )
    assert (first.status, first.json["_tag"]) == (404, "@error/NotFound")
    for wrong in (passkey_id, "x", "%00"):
        same_answer(
            first,
            await passlock.keyed(
                method, f"/passkeys/{wrong}", {"username": "x"} if method == "PATCH" else None
            ),
        )


# -- update, delete, prune -------------------------------------------------------------------------


async def test_update_stores_the_name_and_tells_the_page(passlock: Passlock) -> None:
    one, two = Authenticator(), Authenticator()
    ids = [await passlock.user("ann", device) for device in (one, two)]
    await passlock.user("bob", Authenticator())
    for more, shown in (({}, "new"), ({"displayName": "Ann"}, "Ann")):
        body = {"userId": "ann", "username": "new"} | more
        done = await passlock.ok("POST", "/passkeys/update", body)
        told = await passlock.page_ok(
            "/passkeys/update/exchange", {"updatePasskeysToken": done["updatePasskeysToken"]}
        )
        handle = b64(one.credentials(RP_ID)[0].user_handle)
        assert told["instructions"] == [
            {"rpId": RP_ID, "userId": handle, "username": "new", "displayName": shown}
        ]
    for passkey_id in ids:
        assert (await passlock.passkey(passkey_id))["credential"]["username"] == "new"


async def test_delete_revokes_at_once(broker: Started, passlock: Passlock) -> None:
    one, two, other = Authenticator(), Authenticator(), Authenticator()
    first = await passlock.user("ann", one)
    await passlock.user("ann", two)
    await passlock.user("bob", other)
    token = {"authenticationToken": await passlock.authorize_authentication("ann")}
    session, options = await passlock.begin("authentication", token)
    done = await passlock.ok("POST", "/passkeys/delete", {"passkeyIds": [first]})
    assert done["warnings"] == []
    with refused(broker, "webauthn_login_failed", "revoked_or_counter"):
        answer = await passlock.finish("authentication", session, one.authenticate(options, ORIGIN))
    assert answer.json["_tag"] == "@error/PasskeyNotFound"
    told = await passlock.page_ok(
        "/passkeys/delete/exchange", {"deletePasskeysToken": done["deletePasskeysToken"]}
    )
    assert [i["credentialId"] for i in told["instructions"]] == [b64(one.credentials(RP_ID)[0].id)]
    await passlock.ok("POST", "/passkeys/delete", {"userId": "ann"})
    left = (await passlock.ok("GET", "/passkeys/"))["records"]
    assert [record["userId"] for record in left] == ["bob"]


async def test_prune_tells_what_is_left(passlock: Passlock) -> None:
    kept, gone = Authenticator(), Authenticator()
    await passlock.user("ann", kept)
    await passlock.ok("DELETE", f"/passkeys/{await passlock.user('ann', gone)}")
    done = await passlock.ok("POST", "/passkeys/prune", {"userId": "ann"})
    told = await passlock.page_ok(
        "/passkeys/prune/exchange", {"prunePasskeysToken": done["prunePasskeysToken"]}
    )
    held = kept.credentials(RP_ID)[0]
    assert told["instructions"] == [
        {"rpId": RP_ID, "userId": b64(held.user_handle), "allAcceptedCredentialIds": [b64(held.id)]}
    ]


async def test_what_is_not_there_is_a_warning(passlock: Passlock) -> None:
    nobody = [{"code": "NO_PASSKEYS_FOUND", "message": "This user has no passkeys."}]
    for kind, body in (
        ("update", {"userId": "eve", "username": "eve"}),
        ("delete", {"userId": "eve"}),
        ("prune", {"userId": "eve"}),
    ):
        done = await passlock.ok("POST", f"/passkeys/{kind}", body)
        assert done["warnings"] == nobody
        field = f"{kind}PasskeysToken"
        told = await passlock.page_ok(f"/passkeys/{kind}/exchange", {field: done[field]})
        assert (told["instructions"], told["warnings"]) == ([], nobody)
    ids = ["x" * 24, "no id", "x" * 24]
    done = await passlock.ok("POST", "/passkeys/delete", {"passkeyIds": ids})
    assert [(w["code"], w["passkeyId"]) for w in done["warnings"]] == [
        ("PASSKEY_NOT_FOUND", "x" * 24),
        ("PASSKEY_NOT_FOUND", "no id"),
    ]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"passkeyIds": []},
        {"passkeyIds": "x"},
        {"userId": ""},
        {"userId": "ann", "passkeyIds": ["x"]},
        {"userId": 7},
    ],
)
async def test_a_deletion_has_one_selector(
    passlock: Passlock, device: Authenticator, body: object
) -> None:
    await passlock.user("ann", device)
    answer = await passlock.keyed("POST", "/passkeys/delete", body)
    assert (answer.status, answer.json["_tag"]) == (400, "@error/BadRequest")
    await passlock.authenticate("ann", device)


async def test_users_in_a_path_are_taken_as_they_are(wire: Wire) -> None:
    """The vendor's SDK escapes nothing."""
    passlock = Passlock(wire, prefix="")
    for user in ("a/b", "ann@example.org", "a b", "ü"):
        await Passlock(wire).user(user, Authenticator())
        done = await passlock.ok("PATCH", f"/users/{user}/passkeys/", {"username": "new"})
        assert [p["userId"] for p in done["updated"]] == [user]
        body = {"userId": user}
        assert len((await passlock.ok("DELETE", f"/users/{user}/passkeys/", body))["deleted"]) == 1
        assert (await passlock.ok("DELETE", f"/users/{user}/passkeys/"))["deleted"] == []
    assert (await passlock.keyed("DELETE", "/users/ann/passkeys/", {"userId": "bob"})).status == 400
