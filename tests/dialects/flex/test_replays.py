"""Replay alarm: a second redemption of a nonce is an event, a metric and a warning that name the
first; the answer to the caller is that to any unknown nonce.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from broker.broker import limited_events
from tests.conftest import OpenApp, Started
from tests.support.authenticator import Authenticator
from tests.support.signals import counted, refused, same_answer
from tests.support.wire import Wire

UNKNOWN = "pbn_" + "a" * 43


async def events_of(wire: Wire, action: str) -> list[dict[str, Any]]:
    """The app's events of one action, as a backend reads them."""
    found = (await wire.keyed("GET", "/events?cursor=0&limit=500")).json["events"]
    return [event for event in found if event["action"] == action]


async def test_a_second_redemption_names_the_first(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    passkey = await wire.user("ann", device)
    nonce = await wire.authenticate(await wire.open_authentication("ann"), device)
    first = await wire.redeem(nonce)
    assert await events_of(wire, "nonce.replayed") == []
    with (
        refused(broker, "invalid_nonce", "nonce_replayed"),
        counted(broker, "broker_redemptions_total", result="replayed"),
    ):
        second = await wire.redeem(nonce)
    same_answer(second, await wire.redeem(UNKNOWN))

    (event,) = await events_of(wire, "nonce.replayed")
    payload, request_id = event["payload"], first.headers["X-Request-ID"]
    assert (event["external_id"], event["passkey_id"]) == ("ann", passkey)
    assert (event["result"], event["reason"]) == ("refused", "nonce_replayed")
    assert event["request_id"] == second.headers["X-Request-ID"]
    assert payload == {
        "first_at": payload["first_at"],
        "first_request_id": request_id,
        "first_actor": event["actor"],
    }
    first_at, again_at = (datetime.fromisoformat(at) for at in (payload["first_at"], event["at"]))
    assert first_at < again_at

    (line,) = [line for line in broker.log if line["event"] == "nonce_replayed"]
    assert (line["level"], line["app"], line["user_id"]) == (
        "warning",
        wire.app_id,
        event["user_id"],
    )
    assert payload.items() <= line.items()
    assert nonce not in broker.stream.getvalue()


async def test_each_refused_redemption_is_an_event_with_its_reason(
    broker: Started, wire: Wire, open_app: OpenApp, device: Authenticator
) -> None:
    passkey = await wire.user("ann", device)
    other = await open_app()
    await wire.redeem("nothing")
    await wire.redeem(UNKNOWN)
    await other.redeem(await wire.authenticate(None, device))
    await wire.redeem(await wire.authenticate(None, device), external_id="bob")
    expired = await wire.authenticate(None, device)
    broker.clock.ahead += 66
    await wire.redeem(expired)
    told = [(e["reason"], e["external_id"]) for e in await events_of(wire, "nonce.refused")]
    assert told == [
        ("nonce_malformed", None),
        ("nonce_unknown", None),
        ("nonce_mismatch", "ann"),
        ("nonce_expired", None),
    ]
    assert [e["reason"] for e in await events_of(other, "nonce.refused")] == ["nonce_foreign"]
    mismatch = (await events_of(wire, "nonce.refused"))[2]
    assert (mismatch["passkey_id"], mismatch["payload"]) == (passkey, None)


async def test_events_beyond_the_limit_are_one_event_with_their_number(
    broker: Started, wire: Wire, open_app: OpenApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is of one app, action and reason, so that a flood of one reason hides no other. A
    window ends with the process.
    """
    monkeypatch.setattr(limited_events, "LIMIT", 3)
    other = await open_app()
    for _ in range(8):
        assert (await wire.redeem("nothing")).status == 401
    await wire.redeem(UNKNOWN)
    await other.redeem("nothing")
    told = [e["reason"] for e in await events_of(wire, "nonce.refused")]
    assert told == ["nonce_malformed"] * 3 + ["nonce_unknown"]
    assert len(await events_of(other, "nonce.refused")) == 1
    await broker.parts.broker.close()
    *_, rest = await events_of(wire, "nonce.refused")
    assert (rest["reason"], rest["actor"]) == ("limited", "broker")
    assert rest["payload"] == {"limited": 5, "reason": "nonce_malformed"}
    assert len(await events_of(other, "nonce.refused")) == 1

    await wire.redeem("nothing")
    assert (await events_of(wire, "nonce.refused"))[-1]["reason"] == "nonce_malformed"
