"""Passlock's mailbox challenges on the wire: golden files, both path generations, and answers read
as the vendor's SDK reads them.

`judge` decodes as that SDK does, by the shapes of the contract: a missing field, or a null where a
field is merely optional, is a failure; an error's tag must be one that the call declares. What a
code is worth is tested with the Flex API's routes; here is what is translated.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from broker.dialects.passlock import mailbox
from broker.mailbox import ATTEMPTS, LIFE, PER_MAILBOX, WINDOW
from tests.conftest import SKEW, OpenApp, Started, Starter
from tests.dialects.passlock.contract import ANSWERS, FORBIDDEN
from tests.support.golden import golden
from tests.support.shapes import fits
from tests.support.signals import counted, lines, quiet, refused
from tests.support.wire import Answer, Wire

CALLS = {
    "create": "POST /{t}/challenges",
    "get": "GET /{t}/challenges/{id}",
    "verify": "POST /{t}/challenges/verify",
    "delete": "DELETE /{t}/challenges/{id}",
}
FIELDS: dict[str, Any] = {"email": "ann@example.org", "purpose": "sign-up"}
PLACES = ("/v2", "")


def judge(answer: Answer, call: str) -> None:
    """Fail unless the vendor's SDK makes a result of it, and not an exception."""
    assert answer.headers["Content-Type"] == "application/json"
    fits(answer.json, (ANSWERS[CALLS[call]] | {403: FORBIDDEN})[answer.status])
    if answer.status == 429:
        assert answer.headers["Retry-After"] == str(answer.json["retryAfterSeconds"])


async def send(
    wire: Wire,
    call: str,
    path: str = "",
    body: object = None,
    *,
    place: str = "/v2",
    key: str | None = None,
) -> Answer:
    method = {"get": "GET", "delete": "DELETE"}.get(call, "POST")
    url = f"{wire.url}{place}/{wire.app_id}/challenges{path}"
    return await wire.keyed(method, url, body, key=key)


async def create(wire: Wire, *, place: str = "/v2", **fields: object) -> dict[str, Any]:
    answer = await send(wire, "create", body=FIELDS | fields, place=place)
    assert answer.status == 201, answer.body
    judge(answer, "create")
    made: dict[str, Any] = answer.json["challenge"]
    return made


def redeeming(made: dict[str, Any]) -> dict[str, Any]:
    return {name: made[name] for name in ("challengeId", "secret", "code")}


def other(digits: str) -> str:
    """Another code."""
    return f"{(int(digits) + 1) % 1_000_000:06d}"


async def test_golden_files(broker: Started, wire: Wire) -> None:
    clock = broker.clock() + 1
    broker.parts.mailbox._clock = lambda: (
        clock
    )  # stands still, so that Retry-After is the same every time

    async def on_the_wire(
        name: str, status: int, call: str, path: str = "", body: object = None
    ) -> Answer:
        method = {"get": "GET", "delete": "DELETE"}.get(call, "POST")
        headers = {"Authorization": f"Bearer {wire.key}"}
        below = "/v2/{app_id}/challenges"
        answer = await golden(wire, name, method, path, body, headers=headers, below=below)
        assert answer.status == status
        judge(answer, call)
        return answer

    whole = FIELDS | {
        "userId": "ann",
        "metadata": {"plan": "pro"},
        "invalidateOthers": True,
        "skipRateLimit": True,
        "name": "Ann",
        "sendEmail": False,
    }
    made = (await on_the_wire("passlock/mail-create", 201, "create", body=whole)).json["challenge"]
    few = (await on_the_wire("passlock/mail-create-few", 201, "create", body=FIELDS)).json[
        "challenge"
    ]
    assert few["expiresAt"] - few["createdAt"] == LIFE * 1000
    for _ in range(PER_MAILBOX - 1):
        await create(wire)
    with refused(broker, "mail_code_rate_limited", "mail_code_rate_limited"):
        answer = await on_the_wire("passlock/mail-rate", 429, "create", body=FIELDS)
    assert answer.json["retryAfterSeconds"] == WINDOW
    with refused(broker, "invalid_request", "purpose"):
        body: dict[str, Any] = FIELDS | {"purpose": "sign up"}
        await on_the_wire("passlock/mail-create-invalid", 400, "create", body=body)

    await on_the_wire("passlock/mail-get", 200, "get", f"/{made['challengeId']}")
    await on_the_wire("passlock/mail-get-few", 200, "get", f"/{few['challengeId']}")
    with refused(broker, "not_found", "mail_code_not_found"):
        await on_the_wire("passlock/mail-get-unknown", 404, "get", "/" + "x" * 24)

    body = redeeming(made)
    with refused(broker, "mail_code_wrong", "mail_code_wrong"):
        wrong = body | {"code": other(made["code"])}
        await on_the_wire("passlock/mail-verify-wrong", 400, "verify", "/verify", wrong)
    with counted(broker, "broker_mail_codes_total", result="verified"):
        await on_the_wire("passlock/mail-verify", 200, "verify", "/verify", body)
    with refused(broker, "mail_code_not_found", "mail_code_not_found"):
        await on_the_wire("passlock/mail-verify-again", 404, "verify", "/verify", body)

    body = redeeming(few) | {"code": other(few["code"])}
    for _ in range(ATTEMPTS - 1):
        assert (await send(wire, "verify", "/verify", body)).json[
            "_tag"
        ] == "@error/InvalidChallengeCode"
    with refused(broker, "mail_code_attempts_exceeded", "mail_code_attempts_exceeded"):
        await on_the_wire("passlock/mail-verify-exhausted", 410, "verify", "/verify", body)
    await on_the_wire("passlock/mail-delete", 200, "delete", f"/{few['challengeId']}")
    await on_the_wire("passlock/mail-delete-again", 200, "delete", f"/{few['challengeId']}")

    late = await create(wire, email="late@example.org")
    broker.clock.ahead += LIFE + SKEW + 1
    with refused(broker, "mail_code_expired", "mail_code_expired"):
        await on_the_wire("passlock/mail-verify-expired", 410, "verify", "/verify", redeeming(late))
    assert lines(broker, route="/v2/{app_id}/challenges/verify", status=200, app=wire.app_id)


@pytest.mark.parametrize("place", PLACES)
async def test_both_generations_of_paths(wire: Wire, place: str) -> None:
    """The whole life of a challenge; what one generation makes, the other redeems."""
    made = await create(wire, place=place, userId="ann")
    found = await send(wire, "get", f"/{made['challengeId']}", place=place)
    judge(found, "get")
    unseen = {"secret", "code", "message"}
    facts = {"_tag": "Challenge"} | {
        name: value for name, value in made.items() if name not in unseen
    }
    assert found.json == facts
    elsewhere = PLACES[1 - PLACES.index(place)]
    answer = await send(wire, "verify", "/verify", redeeming(made), place=elsewhere)
    judge(answer, "verify")
    assert (answer.status, answer.json["challenge"]) == (200, facts)
    made = await create(wire, place=place)
    gone = await send(wire, "delete", f"/{made['challengeId']}", place=place)
    judge(gone, "delete")
    answer = await send(wire, "verify", "/verify", redeeming(made), place=place)
    judge(answer, "verify")
    assert (answer.status, answer.json["_tag"]) == (404, "@error/InvalidChallenge")


async def test_a_code_of_one_dialect_is_one_of_the_other(wire: Wire) -> None:
    made = await create(wire, userId="ann", metadata={"a": 1})
    body = {"id": made["challengeId"], "secret": made["secret"], "code": made["code"]}
    answer = await wire.keyed("POST", "/mail_codes/verify", body)
    assert answer.json["mail_code"]["external_id"] == "ann"
    mail_code = (await wire.keyed("POST", "/mail_codes", FIELDS)).json["mail_code"]
    body = {
        "challengeId": mail_code["id"],
        "secret": mail_code["secret"],
        "code": mail_code["code"],
    }
    assert (await send(wire, "verify", "/verify", body)).status == 200


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("call", "path"), [("create", ""), ("get", "/x"), ("verify", "/verify"), ("delete", "/x")]
)
async def test_a_wrong_key_is_forbidden(
    broker: Started, wire: Wire, open_app: OpenApp, call: str, path: str, place: str
) -> None:
    """The one word that every call declares for it."""
    stranger = await open_app()
    for key, reason in (("pbk_x", "key_malformed"), (stranger.key, "key_of_another_app")):
        with refused(broker, "invalid_access_token", reason):
            answer = await send(wire, call, path, FIELDS, place=place, key=key)
        judge(answer, call)
        assert (answer.status, answer.json["_tag"]) == (403, "@error/Forbidden")


@pytest.mark.parametrize("typed", ["", "12345", "abcdef", "123 456", "1234567", "\u0661" * 6])
async def test_whatever_a_person_types_is_an_error_that_the_client_knows(
    broker: Started, wire: Wire, typed: str
) -> None:
    made = await create(wire)
    with refused(broker, "mail_code_wrong", "mail_code_form"):
        answer = await send(wire, "verify", "/verify", redeeming(made) | {"code": typed})
    judge(answer, "verify")
    assert (answer.status, answer.json["_tag"]) == (400, "@error/InvalidChallengeCode")


@pytest.mark.parametrize(
    "changes", [{"secret": ""}, {"challengeId": ""}, {"secret": "x"}, {"challengeId": "é/.."}]
)
async def test_a_wrong_half_is_an_invalid_challenge(
    broker: Started, wire: Wire, changes: dict[str, str]
) -> None:
    made = await create(wire)
    with refused(broker, "mail_code_not_found", "mail_code_not_found"):
        answer = await send(wire, "verify", "/verify", redeeming(made) | changes)
    judge(answer, "verify")
    assert (answer.status, answer.json["_tag"]) == (404, "@error/InvalidChallenge")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"email": "ann"}, "email"),
    ({"email": None}, "field_type"),
    ({"email": ""}, "empty_field"),
    ({"purpose": "x" * 65}, "purpose"),
    ({"purpose": 1}, "field_type"),
    ({"userId": "x" * 257}, "external_id"),
    ({"userId": 1}, "field_type"),
    ({"metadata": []}, "field_type"),
    ({"metadata": "x"}, "field_type"),
    ({"metadata": {"a": "x" * 5000}}, "metadata"),
    ({"invalidateOthers": "true"}, "field_type"),
    ({"skipRateLimit": 1}, "field_type"),
    ({"sendEmail": True}, "send_email"),
    ({"sendEmail": 1}, "field_type"),
]


async def test_bad_input(broker: Started, wire: Wire) -> None:
    with quiet(broker, "broker_mail_codes_total", result="created"):
        for fields, reason in BAD:
            with refused(broker, "invalid_request", reason):
                answer = await send(wire, "create", body=FIELDS | fields)
            judge(answer, "create")
            assert (answer.status, answer.json["_tag"]) == (400, "@error/BadRequest"), fields
    for field in ("challengeId", "secret", "code"):
        body = {name: "x" for name in ("challengeId", "secret", "code") if name != field}
        for given, reason in ((body, "missing_field"), (body | {field: 1}, "field_type")):
            with refused(broker, "invalid_request", reason):
                answer = await send(wire, "verify", "/verify", given)
            assert (answer.status, answer.json["_tag"]) == (400, "@error/BadRequest")
    await create(wire, userId=None, metadata=None, invalidateOthers=None, skipRateLimit=None)


async def test_a_store_that_is_down(start_broker: Starter, wire: Wire) -> None:
    nowhere = await start_broker(redis_url="redis://127.0.0.1:1")
    cut_off = replace(wire, url=nowhere.url)
    body = {"challengeId": "x" * 24, "secret": "x", "code": "123456"}
    with refused(nowhere, "service_unavailable", "redis", times=4):
        for call, path, given in (
            ("create", "", FIELDS),
            ("get", "/" + "x" * 24, None),
            ("verify", "/verify", body),
            ("delete", "/" + "x" * 24, None),
        ):
            answer = await send(cut_off, call, path, given)
            assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
            assert set(answer.json) == {"_tag", "message"}


def test_every_refusal_of_this_part_has_a_word_of_its_own() -> None:
    part = mailbox
    assert set(part.TAGS) == set(part.STATUS)
    assert len(set(part.TAGS.values())) == len(part.TAGS)
    for tag in part.TAGS.values():
        assert any(f"'{tag}'" in str(ANSWERS[call]) for call in CALLS.values()), tag
