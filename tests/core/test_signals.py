"""Tickets for what authenticators should hear: prepared by the backend, exchanged by the page once,
bound to app and kind.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis

from broker.model import ANYONE, Names, base64url
from broker.signals import TICKET_LIFE
from tests.conftest import SKEW, OpenApp, Started, Starter
from tests.support.authenticator import Authenticator, b64
from tests.support.golden import golden
from tests.support.signals import refused, same_answer
from tests.support.stall import stalled
from tests.support.verbs import keyed
from tests.support.wire import ORIGIN, RP_ID, Answer, Wire

KINDS = ["update", "delete", "prune"]
BODIES: dict[str, dict[str, str]] = {
    "update": {"external_id": "ann", "user_name": "ann@example.com"},
    "delete": {"external_id": "ann"},
    "prune": {"external_id": "ann"},
}
FILES = {
    "update": ("flex/signals-update", "flex/signals-update-exchange"),
    "delete": ("flex/signals-delete", "flex/signals-delete-exchange"),
    "prune": ("flex/signals-prune", "flex/signals-prune-exchange"),
}


def key(wire: Wire) -> dict[str, str]:
    return {"Authorization": f"Bearer {wire.key}"}


async def prepare(wire: Wire, kind: str, **body: object) -> dict[str, Any]:
    answer = await wire.keyed("POST", f"/signals/{kind}", body or BODIES[kind])
    assert answer.status == 201, answer.body
    prepared: dict[str, Any] = answer.json
    return prepared


async def exchange(wire: Wire, kind: str, ticket: str) -> Answer:
    return await wire.page("/signals/exchange", {"kind": kind, "ticket": ticket})


async def calls(wire: Wire, kind: str, ticket: str) -> list[dict[str, Any]]:
    answer = await exchange(wire, kind, ticket)
    assert answer.status == 200, answer.body
    found: list[dict[str, Any]] = answer.json["calls"]
    return found


@pytest.mark.parametrize("kind", KINDS)
async def test_golden(broker: Started, wire: Wire, device: Authenticator, kind: str) -> None:
    await wire.user("ann", device)
    path = f"/signals/{kind}"
    first, second = FILES[kind]
    prepared = await golden(wire, first, "POST", path, BODIES[kind], headers=key(wire))
    body, page = {"kind": kind, "ticket": prepared.json["ticket"]}, {"Origin": ORIGIN}
    await golden(wire, second, "POST", "/signals/exchange", body, headers=page)
    with refused(broker, "ticket_not_found", "ticket_not_found"):
        again = await exchange(wire, kind, body["ticket"])
    assert (again.status, again.code) == (404, "ticket_not_found")


async def test_a_new_name_is_stored_and_told(wire: Wire, device: Authenticator) -> None:
    """The display name is the name where none is given, and is told only."""
    await wire.user("ann", device)
    handle = b64(device.credentials(RP_ID)[0].user_handle)
    for more, shown in (({}, "ann@example.com"), ({"user_display_name": "Ann B."}, "Ann B.")):
        prepared = await prepare(wire, "update", **BODIES["update"], **more)
        told = await calls(wire, "update", prepared["ticket"])
        assert told == [
            {"rpId": RP_ID, "userId": handle, "name": "ann@example.com", "displayName": shown}
        ]
    [listed] = (await wire.keyed("GET", "/passkeys")).json["passkeys"]
    assert (listed["user_name"], listed["user_display_name"]) == (
        "ann@example.com",
        "Ann's passkey",
    )


async def test_deleted_passkeys_are_gone_at_once(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    """By their ids, whoever owns them, or all of a user; ids that are nobody's are told back."""
    ids = [
        await wire.user(name, d)
        for name, d in (("ann", device), ("ann", Authenticator()), ("bob", Authenticator()))
    ]
    credential = b64(device.credentials(RP_ID)[0].id)
    prepared = await prepare(wire, "delete", passkeys=[ids[0], ids[2], "x" * 24, ids[0]])
    assert (prepared["missing"], prepared["empty"]) == (["x" * 24], False)
    handle, options = await wire.begin("authenticate", None)
    with refused(broker, "discoverable_login_failed", "unknown_credential"):
        await wire.finish("authenticate", handle, device.authenticate(options, ORIGIN))
    told = await calls(wire, "delete", prepared["ticket"])
    assert {"rpId": RP_ID, "credentialId": credential} in told
    assert [set(call) for call in told] == [{"rpId", "credentialId"}] * 2
    assert [p["id"] for p in (await wire.keyed("GET", "/passkeys")).json["passkeys"]] == [ids[1]]
    prepared = await prepare(wire, "delete", external_id="ann")
    assert len(await calls(wire, "delete", prepared["ticket"])) == 1
    assert (await wire.keyed("GET", "/passkeys")).json["total"] == 0


async def test_a_passkey_that_gets_its_owner_meanwhile_is_deleted(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    """The backend was told that it is gone, so it is: also where another request gave it its owner
    between the look and the deletion.
    """
    app = await broker.parts.directory.app(wire.app_id)
    transaction = await broker.parts.broker.open_registration(
        keyed(app), ANYONE, Names("Somebody", "Somebody", "Somebody")
    )
    await wire.register(transaction, device)
    await wire.open_registration("bob")
    [passkey] = (await wire.keyed("GET", "/passkeys")).json["passkeys"]
    async with stalled(broker, "credentials", mode="SHARE") as stall:
        deleting = asyncio.create_task(prepare(wire, "delete", passkeys=[passkey["id"]]))
        await stall.waiting(1)
        await stall.connection.execute(
            "UPDATE credentials SET user_id = (SELECT id FROM users"
            " WHERE app_id = $1 AND external_id = 'bob') WHERE id = $2",
            wire.app_id,
            passkey["id"],
        )
    assert (await deleting)["missing"] == []
    assert (await wire.keyed("GET", "/passkeys")).json["total"] == 0
    handle, options = await wire.begin("authenticate", None)
    with refused(broker, "discoverable_login_failed", "unknown_credential"):
        await wire.finish("authenticate", handle, device.authenticate(options, ORIGIN))


async def test_what_is_left_is_told(wire: Wire, device: Authenticator) -> None:
    """Of one user; nothing is changed."""
    ids = [await wire.user("ann", device), await wire.user("ann", Authenticator())]
    await wire.user("bob", Authenticator())
    await wire.keyed("DELETE", f"/passkeys/{ids[1]}")
    told = await calls(wire, "prune", (await prepare(wire, "prune"))["ticket"])
    held = device.credentials(RP_ID)[0]
    assert told == [
        {"rpId": RP_ID, "userId": b64(held.user_handle), "allAcceptedCredentialIds": [b64(held.id)]}
    ]
    assert (await wire.keyed("GET", "/passkeys")).json["total"] == 2


@pytest.mark.parametrize("kind", KINDS)
async def test_nothing_to_tell_of_a_user_without_passkeys(wire: Wire, kind: str) -> None:
    """Whether the app knows the user or not: a ticket for no calls, and nobody is made."""
    prepared = await prepare(wire, kind)
    assert (prepared["missing"], prepared["empty"]) == ([], True)
    assert await calls(wire, kind, prepared["ticket"]) == []
    assert (await wire.keyed("GET", "/users")).json["total_users"] == 0


async def test_of_50_exchanges_one_succeeds(
    broker: Started, start_broker: Starter, wire: Wire, device: Authenticator
) -> None:
    """On two instances."""
    await wire.user("ann", device)
    other = await start_broker()
    ways = [wire, Wire(wire.session, other.url, wire.app_id, wire.key)]
    ticket = (await prepare(wire, "prune"))["ticket"]
    answers = await asyncio.gather(*(exchange(ways[n % 2], "prune", ticket) for n in range(50)))
    assert sorted(a.status for a in answers) == [200] + [404] * 49
    seen = sum(
        one.metric("broker_refusals_total", code="ticket_not_found", reason="ticket_not_found")
        for one in (broker, other)
    )
    assert seen == 49


async def test_all_bad_tickets_are_alike(
    broker: Started, wire: Wire, open_app: OpenApp, device: Authenticator
) -> None:
    """Made up, malformed, of another app, of another kind (which spends it), expired, used."""
    await wire.user("ann", device)
    other = await open_app()
    tickets = [(await prepare(wire, "prune"))["ticket"] for _ in range(3)]
    answers = [
        await exchange(wire, "prune", bad) for bad in ("x", "pbs_" + "a" * 43, "pbn_" + "a" * 43)
    ]
    answers.append(await exchange(other, "prune", tickets[0]))
    answers.append(await exchange(wire, "delete", tickets[1]))
    answers.append(await exchange(wire, "prune", tickets[1]))
    assert len(await calls(wire, "prune", tickets[0])) == 1, "another app's page spends nothing"
    answers.append(await exchange(wire, "prune", tickets[0]))
    broker.clock.ahead += TICKET_LIFE + SKEW
    answers.append(await exchange(wire, "prune", tickets[2]))
    for answer in answers:
        assert (answer.status, answer.code) == (404, "ticket_not_found")
        same_answer(answers[0], answer)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"kind": "prune"},
        {"ticket": "pbs_"},
        {"kind": "all", "ticket": "pbs_"},
        {"kind": 1, "ticket": "x"},
    ],
)
async def test_a_fault_of_form(wire: Wire, body: dict[str, object]) -> None:
    answer = await wire.page("/signals/exchange", body)
    assert (answer.status, answer.code) == (400, "invalid_request")


async def test_a_page_of_another_origin_spends_nothing(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    await wire.user("ann", device)
    body = {"kind": "prune", "ticket": (await prepare(wire, "prune"))["ticket"]}
    with refused(broker, "operation_not_allowed", "origin"):
        answer = await wire.page("/signals/exchange", body, origin="https://evil.example")
    assert answer.status == 403
    assert len(await calls(wire, "prune", body["ticket"])) == 1


async def test_a_dump_of_redis_exchanges_nothing(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    """The ticket is in no key and in no value, and no text of the dump is taken for one."""
    await wire.user("ann", device)
    ticket = (await prepare(wire, "prune"))["ticket"]
    async with Redis.from_url(broker.parts.settings.redis_url) as redis:
        names: list[bytes] = [name async for name in redis.scan_iter(match=b"s:*")]
        values = [str(await redis.get(name)).encode() for name in names]
    dump = b"\n".join(names + values)
    assert names
    assert ticket.encode() not in dump
    assert ticket.removeprefix("pbs_").encode() not in dump
    for name in names:
        digest = base64url(name.removeprefix(b"s:"))
        for guess in (digest, "pbs_" + digest):
            assert (await exchange(wire, "prune", guess)).status == 404
    assert len(await calls(wire, "prune", ticket)) == 1
