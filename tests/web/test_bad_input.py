"""Bodies and fields that can't be used: every endpoint refuses each of them clearly, and a fault of
form spends nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import orjson
import pytest

from tests.conftest import OpenApp, Started
from tests.support.authenticator import Authenticator, b64, flex_wire_form
from tests.support.signals import counted, lines, quiet, refused, same_answer
from tests.support.wire import ORIGIN, Answer, Wire

MANAGEMENT: dict[str, dict[str, Any]] = {
    "/transactions/register": {"external_id": "ann", "passkey_display_name": "Ann"},
    "/transactions/authenticate": {"external_id": "ann"},
    "/authenticate/verify": {"nonce": "pbn_" + "a" * 43},
}
BROWSER: dict[str, dict[str, Any]] = {
    "/register/transactions/webauthn/start": {"transaction_id": "pbt_" + "a" * 43},
    "/register/transactions/webauthn/finish": {
        "handshake_id": "pbh_" + "a" * 43,
        "handshake_response": {},
    },
    "/authenticate/transactions/webauthn/start": {"transaction_id": "pbt_" + "a" * 43},
    "/authenticate/transactions/webauthn/finish": {
        "handshake_id": "pbh_" + "a" * 43,
        "handshake_response": {},
    },
}
ENDPOINTS = [*MANAGEMENT, *BROWSER]
START = "/authenticate/transactions/webauthn/start"
FINISH = "/register/transactions/webauthn/finish", "/authenticate/transactions/webauthn/finish"


async def post(wire: Wire, path: str, data: bytes) -> Answer:
    if path in MANAGEMENT:
        return await wire.keyed("POST", path, data=data)
    return await wire.page(path, data=data)


BODIES: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"external_id=ann", "not_json"),
    "cut off": (b'{"external_id": "ann"', "not_json"),
    "two values": (b"{}{}", "not_json"),
    "a comment": (b"{}//", "not_json"),
    "single quotes": (b"{'a': 1}", "not_json"),
    "a trailing comma": (b'{"a": 1,}', "not_json"),
    "a list": (b"[]", "not_an_object"),
    "text": (b'"ann"', "not_an_object"),
    "a number": (b"1", "not_an_object"),
    "null": (b"null", "not_an_object"),
    "nested deeply": (b'{"a":' * 40 + b"1" + b"}" * 40, "nesting"),
    "nested deeply, spaced": (b'{"a": ' * 40 + b"1" + b"}" * 40, "nesting"),
    "nested very deeply": (b"[" * 30_000, "not_json"),
    "nested very deeply and closed": (b'{"a":' * 9_000 + b"1" + b"}" * 9_000, "not_json"),
    "a key twice": (b'{"a":1,"a":2}', "duplicate_key"),
    "a key twice, spaced": (b'{"a": 1, "a": 1}', "duplicate_key"),
    "a key twice, escaped": (b'{"a":1,"\\u0061":2}', "duplicate_key"),
    "a key twice, deep": (b'{"b":[{"a":1,"a":2}]}', "duplicate_key"),
    "NaN": (b'{"a":NaN}', "not_json"),
    "Infinity": (b'{"a":-Infinity}', "not_json"),
    "a lone surrogate": (b'{"a":"\\ud800"}', "not_json"),
    "a lone low surrogate": (b'{"a":"\\udc00\\ud800"}', "not_json"),
    "a surrogate as UTF-8": (b'{"a":"\xed\xa0\x80"}', "not_json"),
    "not UTF-8": (b'{"a":"\xff"}', "not_json"),
    "over-long UTF-8": (b'{"a":"\xc0\xaf"}', "not_json"),
    "NUL": (b'{"a":"\\u0000"}', "nul"),
    "NUL in a key": (b'{"a\\u0000b":1}', "nul"),
    "NUL, deep": (b'{"a":[{"b": ["\\u0000"]}]}', "nul"),
    "a raw NUL": (b'{"a":"\x00"}', "not_json"),
    "a raw control character": (b'{"a":"\n"}', "not_json"),
    "a huge number": (b'{"a":1e999}', "not_json"),
    "a huge integer": (b'{"a":123456789012345678901234567890}', "number"),
    "an integer of 5,000 digits": (b'{"a":' + b"9" * 5000 + b"}", "not_json"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "not_json"),
    "UTF-16": ('{"a":1}'.encode("utf-16"), "not_json"),
}


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_a_body_that_is_no_object(broker: Started, wire: Wire, path: str) -> None:
    for name, (body, reason) in BODIES.items():
        with refused(broker, "invalid_request", reason):
            answer = await post(wire, path, body)
        assert (answer.status, answer.code) == (400, "invalid_request"), name


@pytest.mark.parametrize("path", [p for p in ENDPOINTS if p != START])
@pytest.mark.parametrize("body", [b"", b" \r\n\t"])
async def test_an_empty_body(broker: Started, wire: Wire, path: str, body: bytes) -> None:
    with refused(broker, "invalid_request", "not_json"):
        answer = await post(wire, path, body)
    assert (answer.status, answer.code) == (400, "invalid_request")


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_a_body_over_64_kib(broker: Started, wire: Wire, path: str) -> None:
    fields = MANAGEMENT.get(path) or BROWSER[path]
    whole = orjson.dumps(fields)
    with refused(broker, "request_too_large", "request_too_large"):
        answer = await post(wire, path, whole + b" " * (65_537 - len(whole)))
    assert (answer.status, answer.code) == (413, "request_too_large")
    with quiet(
        broker, "broker_refusals_total", code="request_too_large", reason="request_too_large"
    ):
        assert (await post(wire, path, whole + b" " * (65_536 - len(whole)))).status != 413


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize(("size", "large"), [(65_536, False), (65_537, True), (200_000, True)])
async def test_a_body_over_64_kib_without_a_length(
    broker: Started, wire: Wire, path: str, size: int, large: bool
) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"{}"
        for begin in range(2, size, 4096):
            yield b" " * min(4096, size - begin)

    headers = {"Authorization": f"Bearer {wire.key}"} if path in MANAGEMENT else {}
    with counted(
        broker,
        "broker_refusals_total",
        1 if large else 0,
        code="request_too_large",
        reason="request_too_large",
    ):
        async with wire.session.post(wire.base + path, data=pieces(), headers=headers) as response:
            status, body = response.status, orjson.loads(await response.read())
    assert (status == 413) == large
    assert (body.get("code") == "request_too_large") == large


FIELDS = [
    ("/transactions/register", "external_id"),
    ("/transactions/register", "passkey_display_name"),
    ("/transactions/authenticate", "external_id"),
    ("/authenticate/verify", "nonce"),
    ("/register/transactions/webauthn/start", "transaction_id"),
    ("/register/transactions/webauthn/finish", "handshake_id"),
    ("/authenticate/transactions/webauthn/finish", "handshake_id"),
]
WRONG: list[object] = [0, 1, 1.5, True, False, [], ["ann"], {}, {"ann": "ann"}]


@pytest.mark.parametrize(("path", "field"), FIELDS)
async def test_a_field_missing_null_empty_or_of_another_type(
    broker: Started, wire: Wire, path: str, field: str
) -> None:
    whole = MANAGEMENT.get(path) or BROWSER[path]
    cases: list[tuple[dict[str, Any], str]] = [
        ({k: v for k, v in whole.items() if k != field}, "missing_field"),
        (whole | {field: ""}, "empty_field"),
        (whole | {field: None}, "field_type"),
        *((whole | {field: value}, "field_type") for value in WRONG),
    ]
    for body, reason in cases:
        with refused(broker, "invalid_request", reason):
            answer = await post(wire, path, orjson.dumps(body))
        assert (answer.status, answer.code) == (400, "invalid_request")
        assert field in answer.json["error"]


@pytest.mark.parametrize("path", [START, *FINISH])
async def test_an_optional_transaction_of_another_type(
    broker: Started, wire: Wire, path: str
) -> None:
    for value in WRONG:
        with refused(broker, "invalid_request", "field_type"):
            answer = await wire.page(path, BROWSER[path] | {"transaction_id": value})
        assert (answer.status, answer.code) == (400, "invalid_request")


@pytest.mark.parametrize("field", ["purpose", "transaction_id", "external_id"])
async def test_an_expectation_that_is_none_spends_nothing(
    broker: Started, wire: Wire, device: Authenticator, field: str
) -> None:
    """A check that was meant must not vanish because a variable was unset."""
    nonce = await wire.register(await wire.open_registration("ann"), device)
    for value in (None, "", *WRONG):
        with refused(broker, "invalid_request", "empty_field" if value == "" else "field_type"):
            answer = await wire.keyed(
                "POST", "/authenticate/verify", {"nonce": nonce, field: value}
            )
        assert (answer.status, answer.code) == (400, "invalid_request")
    with refused(broker, "invalid_request", "invalid_request"):
        answer = await wire.redeem(nonce, purpose="login")
    assert answer.status == 400
    assert (await wire.redeem(nonce)).status == 200


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/transactions/register", "external_id"),
        ("/transactions/register", "passkey_display_name"),
        ("/transactions/authenticate", "external_id"),
    ],
)
async def test_text_has_1_to_256_characters(
    broker: Started, wire: Wire, path: str, field: str
) -> None:
    await wire.user("x" * 256, Authenticator())
    await wire.user("😀" * 256, Authenticator())
    for character in ("x", "😀"):
        longest = await wire.keyed("POST", path, MANAGEMENT[path] | {field: character * 256})
        assert longest.status == 201
        for length in (257, 5_000):
            body = MANAGEMENT[path] | {field: character * length}
            with refused(broker, "invalid_request", "invalid_request"):
                answer = await wire.keyed("POST", path, body)
            assert (answer.status, answer.code) == (400, "invalid_request")
            assert answer.json["error"] == f"{field} has {length} characters; 256 are allowed."


@pytest.mark.parametrize("length", [44, 87, 500, 60_000])
async def test_over_long_tokens_are_unknown_ones(broker: Started, wire: Wire, length: int) -> None:
    body = {"nonce": "pbn_" + "a" * length}
    reason = "nonce_unknown" if length < 87 else "nonce_malformed"
    with refused(broker, "invalid_nonce", reason):
        assert (await wire.keyed("POST", "/authenticate/verify", body)).status == 401
    body = {"transaction_id": "pbt_" + "a" * length}
    reason = "transaction_unknown" if length < 87 else "transaction_malformed"
    with refused(broker, "transaction_not_found", reason):
        assert (await wire.page(START, body)).status == 404


# -- keys: who asks --------------------------------------------------------------------------------


async def test_all_wrong_keys_are_alike(broker: Started, wire: Wire, open_app: OpenApp) -> None:
    """No key, a wrong one, another app's, a revoked one, a key for an app that is not there: one
    answer.
    """
    other = await open_app()
    fields = MANAGEMENT["/transactions/register"]
    key, secret = await broker.parts.directory.create_key(wire.app_id, "second")
    assert (await wire.keyed("POST", "/transactions/register", fields, key=secret)).status == 201
    assert await broker.parts.directory.revoke_key(wire.app_id, key.id)
    unknown = Wire(wire.session, wire.url, "x" * 24, wire.key)
    malformed = Wire(wire.session, wire.url, "nobody", wire.key)

    async def bare(value: str | None) -> Answer:
        headers = {} if value is None else {"Authorization": value}
        return await wire.send("POST", "/transactions/register", json=fields, headers=headers)

    cases: list[tuple[str, Callable[[], Awaitable[Answer]]]] = [
        ("key_missing", lambda: bare(None)),
        ("key_missing", lambda: bare("")),
        ("key_missing", lambda: bare("Bearer")),
        ("key_missing", lambda: bare(f"Basic {wire.key}")),
        ("key_missing", lambda: bare(wire.key)),
        ("key_malformed", lambda: bare("Bearer nothing")),
        ("key_malformed", lambda: bare(f"Bearer {wire.key} {wire.key}")),
        ("key_malformed", lambda: bare(f"Bearer {wire.key}é")),
        ("key_malformed", lambda: bare("Bearer " + wire.key.replace("pbk_", "pbn_"))),
        ("key_unknown", lambda: bare("Bearer pbk_" + "a" * 43)),
        (
            "key_of_another_app",
            lambda: wire.keyed("POST", "/transactions/register", fields, key=other.key),
        ),
        ("key_unknown", lambda: wire.keyed("POST", "/transactions/register", fields, key=secret)),
        ("key_of_another_app", lambda: unknown.keyed("POST", "/transactions/register", fields)),
        ("key_malformed", lambda: malformed.keyed("POST", "/transactions/register", fields)),
    ]
    answers = []
    for reason, ask in cases:
        with refused(broker, "invalid_access_token", reason):
            answers.append(await ask())
    assert (answers[0].status, answers[0].code) == (401, "invalid_access_token")
    for answer in answers[1:]:
        same_answer(answers[0], answer)
    assert {line["app"] for line in lines(broker, status=401)} == {None}


@pytest.mark.parametrize("app_id", ["x" * 24, "nobody", "%00", "%FF", "..%2F", "x" * 3_000])
@pytest.mark.parametrize("path", [*BROWSER, ""])
async def test_an_unknown_app_in_the_browser(
    broker: Started, wire: Wire, app_id: str, path: str
) -> None:
    nobody = Wire(wire.session, wire.url, app_id, "")
    with refused(broker, "app_not_found", "app_not_found"):
        answer = await (nobody.page(path, BROWSER[path]) if path else nobody.send("GET", ""))
    assert (answer.status, answer.code) == (404, "app_not_found")


# -- the answer of an authenticator, as JSON -------------------------------------------------------

Change = Callable[[dict[str, Any]], object]


def put(path: str, value: object) -> Change:
    """A change of an answer: `a.b` set to `value`."""

    def change(answer: dict[str, Any]) -> None:
        *holders, name = path.split(".")
        for holder in holders:
            answer = answer[holder]
        answer[name] = value

    return change


def drop(path: str) -> Change:
    def change(answer: dict[str, Any]) -> None:
        *holders, name = path.split(".")
        for holder in holders:
            answer = answer[holder]
        del answer[name]

    return change


NOT_BASE64URL = ["", "=", "a", "+/+/", "ab cd", "YQ=", "YQ===", "YR", "é", "a\nb", 5, None, [], {}]
BOTH: list[Change] = [
    drop("id"),
    drop("rawId"),
    drop("type"),
    drop("response"),
    drop("response.clientDataJSON"),
    put("type", "password"),
    put("type", None),
    put("response", None),
    put("response", []),
    put("response", "x"),
    put("rawId", b64(b"another")),
    put("id", b64(b"x" * 1024)),
    put("response.clientDataJSON", b64(b"x" * 20_000)),
    *(put("id", value) for value in NOT_BASE64URL),
    *(put("rawId", value) for value in NOT_BASE64URL),
    *(put("response.clientDataJSON", value) for value in NOT_BASE64URL),
]
REGISTRATION = [
    *BOTH,
    drop("response.attestationObject"),
    *(put("response.attestationObject", value) for value in NOT_BASE64URL),
    put("transports", "usb"),
    put("transports", [1]),
    put("transports", ["usb"] * 100),
    put("response.transports", {"usb": True}),
]
AUTHENTICATION = [
    *BOTH,
    drop("response.authenticatorData"),
    drop("response.signature"),
    *(put("response.authenticatorData", value) for value in NOT_BASE64URL),
    *(put("response.signature", value) for value in NOT_BASE64URL),
    put("response.signature", b64(b"x" * 3_000)),
    put("response.authenticatorData", b64(b"x" * 10_000)),
    put("response.userHandle", 5),
    put("response.userHandle", ["x"]),
    put("response.userHandle", "x" * 257),
]


@pytest.mark.parametrize("kind", ["register", "authenticate"])
async def test_an_answer_with_a_fault_of_form_spends_nothing(
    broker: Started, wire: Wire, device: Authenticator, kind: str
) -> None:
    """All of them on one handshake, which then takes the answer as it was."""
    if kind == "authenticate":
        await wire.user("ann", device)
        transaction = await wire.open_authentication("ann")
    else:
        transaction = await wire.open_registration("ann")
    handle, options = await wire.begin(kind, transaction)
    made = (
        device.register(options, ORIGIN)
        if kind == "register"
        else device.authenticate(options, ORIGIN)
    )
    whole = orjson.dumps(flex_wire_form(made))
    path = f"/{kind}/transactions/webauthn/finish"
    for change in REGISTRATION if kind == "register" else AUTHENTICATION:
        answer = orjson.loads(whole)
        change(answer)
        with refused(broker, "invalid_request", "invalid_request"):
            got = await wire.finish(kind, handle, answer, transaction)
        assert (got.status, got.code) == (400, "invalid_request"), answer
    others: list[object] = [None, [], "x", 5, {}]
    for response in others:
        with refused(broker, "invalid_request", "invalid_request"):
            got = await wire.page(path, {"handshake_id": handle, "handshake_response": response})
        assert got.status == 400
    with refused(broker, "invalid_request", "invalid_request"):
        assert (await wire.page(path, {"handshake_id": handle})).status == 400
    with quiet(broker, "broker_ceremonies_total", kind=kind, step="finish", result="refused"):
        assert (await wire.finish(kind, handle, orjson.loads(whole), transaction)).status == 200
