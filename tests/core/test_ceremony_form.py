"""The wire form of both ceremonies: what is read and what is a fault of form, and the options that
a page is given.

A fault of form is found before anything is spent, so it is an `InvalidRequest` and its sentence
names the field.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from broker.ceremony import (
    authenticator_name,
    begin_authentication,
    begin_registration,
    parse_authentication,
    parse_registration,
)
from broker.errors import InvalidRequest
from tests.support.authenticator import EDDSA, ES256, RS256, Authenticator, b64, unb64
from tests.support.ceremonies import (
    CHALLENGE,
    HANDLE,
    ORIGIN,
    creation_options,
    registered,
    relying_party,
    request_options,
)


def registration_answer() -> dict[str, Any]:
    rp = relying_party()
    return Authenticator().register(creation_options(rp), ORIGIN)


def authentication_answer() -> dict[str, Any]:
    rp = relying_party()
    made, device = registered(rp)
    return device.authenticate(request_options(rp, made), ORIGIN)


BAD_TEXT: list[Any] = [None, 1, True, [], {}, b"AA", "", "A", "AA=", "AA===", "AAA==", "A A", "AA\n", " AA", "AB", "+/AA", "AA.", "ÄÄÄÄ", "=", "==", "AA==AA==", "AA==AAAA", "\ud800AAA"]  # fmt: skip


@pytest.mark.parametrize("text", BAD_TEXT, ids=repr)
@pytest.mark.parametrize("field", ["id", "rawId", "clientDataJSON", "attestationObject"])
def test_form_of_a_registration_field(field: str, text: object) -> None:
    answer = registration_answer()
    (answer if field in answer else answer["response"])[field] = text
    with pytest.raises(InvalidRequest) as refused:
        parse_registration(answer)
    assert refused.value.sentence.startswith((field, "id"))


@pytest.mark.parametrize("text", BAD_TEXT, ids=repr)
@pytest.mark.parametrize(
    "field", ["id", "rawId", "clientDataJSON", "authenticatorData", "signature"]
)
def test_form_of_an_authentication_field(field: str, text: object) -> None:
    answer = authentication_answer()
    (answer if field in answer else answer["response"])[field] = text
    with pytest.raises(InvalidRequest) as refused:
        parse_authentication(answer)
    assert refused.value.sentence.startswith((field, "id"))


PARSERS: list[tuple[Callable[[object], object], Callable[[], dict[str, Any]]]] = [
    (parse_registration, registration_answer),
    (parse_authentication, authentication_answer),
]


@pytest.mark.parametrize(("parse", "make"), PARSERS, ids=["registration", "authentication"])
def test_form_of_the_whole(
    parse: Callable[[object], object], make: Callable[[], dict[str, Any]]
) -> None:
    wholes: list[object] = [None, 1, "x", [], [make()], {}, {"response": {}}]
    for whole in wholes:
        with pytest.raises(InvalidRequest):
            parse(whole)
    kinds: list[object] = [None, "password", 1, []]
    responses: list[object] = [None, [], "x"]
    changes = [{"type": kind} for kind in kinds] + [
        {"response": response} for response in responses
    ]
    for change in changes:
        with pytest.raises(InvalidRequest):
            parse({**make(), **change})
    for missing in ("id", "rawId", "type", "response"):
        answer = make()
        del answer[missing]
        with pytest.raises(InvalidRequest):
            parse(answer)
    for missing in make()["response"].keys() - {"transports", "userHandle"}:
        answer = make()
        del answer["response"][missing]
        with pytest.raises(InvalidRequest) as refused:
            parse(answer)
        assert refused.value.sentence == f"{missing} is missing or not text."
    with pytest.raises(InvalidRequest, match="differ"):
        parse({**make(), "rawId": b64(b"other")})


@pytest.mark.parametrize(("parse", "make"), PARSERS, ids=["registration", "authentication"])
def test_form_that_is_tolerated(
    parse: Callable[[object], object], make: Callable[[], dict[str, Any]]
) -> None:
    answer = make()
    plain = parse(answer)
    reordered = {**dict(reversed(answer.items())), "unknown": 1, "clientExtensionResults": "?"}
    assert parse(reordered) == plain
    padded = {
        **answer,
        "id": _pad(answer["id"]),
        "rawId": _pad(answer["rawId"]),
        "response": {
            k: _pad(v) if isinstance(v, str) and k != "userHandle" else v
            for k, v in answer["response"].items()
        },
    }
    assert padded["id"].endswith("=")
    assert parse(padded) == plain


def _pad(text: str) -> str:
    return text + "=" * (-len(text) % 4)


@pytest.mark.parametrize("size", [1023, 1024, 2000])
def test_form_of_a_long_credential_id(size: int) -> None:
    text = b64(bytes(size))
    answer = {**registration_answer(), "id": text, "rawId": text}
    if size == 1023:
        assert len(parse_registration(answer).credential_id) == 1023
        return
    with pytest.raises(InvalidRequest, match="1023"):
        parse_registration(answer)


@pytest.mark.parametrize(
    ("field", "size"),
    [("clientDataJSON", 16_385), ("attestationObject", 49_153), ("clientDataJSON", 40_000)],
)
def test_form_of_long_fields(field: str, size: int) -> None:
    answer = registration_answer()
    answer["response"][field] = b64(bytes(size))
    with pytest.raises(InvalidRequest, match="longer than"):
        parse_registration(answer)


@pytest.mark.parametrize("handle", [1, [], {}, True, "x" * 257])
def test_form_of_the_user_handle(handle: object) -> None:
    answer = authentication_answer()
    answer["response"]["userHandle"] = handle
    with pytest.raises(InvalidRequest, match="userHandle"):
        parse_authentication(answer)


@pytest.mark.parametrize("handle", [None, "", "absent"])
def test_no_user_handle(handle: str | None) -> None:
    answer = authentication_answer()
    answer["response"]["userHandle"] = handle
    if handle == "absent":
        del answer["response"]["userHandle"]
    assert parse_authentication(answer).user_handle is None


@pytest.mark.parametrize(
    ("inside", "beside", "read"),
    [
        (["usb", "nfc"], None, ("usb", "nfc")),
        (None, ["internal"], ("internal",)),
        ([], ["internal"], ("internal",)),
        (["usb"], ["internal"], ("usb",)),
        (["usb", "usb", "carrier-pigeon", ""], None, ("usb",)),
        (["x" * 10_000], ["hybrid"], ("hybrid",)),
        (None, None, ()),
    ],
)
def test_transports(inside: Any, beside: Any, read: tuple[str, ...]) -> None:
    answer = registration_answer()
    answer["response"]["transports"], answer["transports"] = inside, beside
    assert parse_registration(answer).transports == read


@pytest.mark.parametrize("transports", ["usb", {"usb": 1}, 1, [1], [None], [["usb"]], ["usb"] * 33])
def test_transports_of_bad_form(transports: object) -> None:
    for holder in ("response", None):
        answer = registration_answer()
        answer["response"]["transports"] = []
        (answer["response"] if holder else answer)["transports"] = transports
        with pytest.raises(InvalidRequest, match="transports"):
            parse_registration(answer)


@pytest.mark.parametrize(
    ("given", "read"),
    [("platform", "platform"), ("cross-platform", "cross-platform"), ("embedded", None), (1, None), (None, None), ([], None)],
)  # fmt: skip
def test_attachment(given: object, read: str | None) -> None:
    assert (
        parse_registration({**registration_answer(), "authenticatorAttachment": given}).attachment
        == read
    )


# Options.


def test_creation_options() -> None:
    rp = relying_party(
        algorithms=(EDDSA, ES256),
        hints=("security-key",),
        attestation="direct",
        user_verification="preferred",
    )
    options = begin_registration(
        rp,
        challenge=CHALLENGE,
        user_handle=HANDLE,
        user_name="alice",
        user_display_name="Alice",
        exclude=[(b"\x01", ("usb", "nfc")), (b"\x02", ())],
        life=12.3456,
        attachment="cross-platform",
        user_verification=rp.policy.user_verification,
    )
    assert options == {
        "rp": {"id": "example.com", "name": "Example"},
        "user": {"id": b64(HANDLE.encode()), "name": "alice", "displayName": "Alice"},
        "challenge": b64(CHALLENGE),
        "pubKeyCredParams": [{"type": "public-key", "alg": -8}, {"type": "public-key", "alg": -7}],
        "timeout": 12345,
        "excludeCredentials": [
            {"type": "public-key", "id": "AQ", "transports": ["usb", "nfc"]},
            {"type": "public-key", "id": "Ag"},
        ],
        "authenticatorSelection": {
            "residentKey": "required",
            "requireResidentKey": True,
            "userVerification": "preferred",
            "authenticatorAttachment": "cross-platform",
        },
        "attestation": "direct",
        "extensions": {},
        "hints": ["security-key"],
    }
    plain = creation_options(relying_party())
    assert unb64(plain["user"]["id"]).decode() == HANDLE
    assert [p["alg"] for p in plain["pubKeyCredParams"]] == [ES256, EDDSA, RS256]
    assert "authenticatorAttachment" not in plain["authenticatorSelection"]
    assert plain.keys() == options.keys() - {"hints"}
    assert (plain["timeout"], plain["excludeCredentials"], plain["attestation"]) == (
        300_000,
        [],
        "none",
    )
    json.dumps(options)


def test_request_options() -> None:
    rp = relying_party(hints=("hybrid", "client-device"))
    allow = [(b"\x01", ("internal",)), (b"\x02", ())]
    assert begin_authentication(
        rp, challenge=CHALLENGE, allow=allow, life=60, user_verification="required"
    ) == {
        "challenge": b64(CHALLENGE),
        "rpId": "example.com",
        "timeout": 60_000,
        "userVerification": "required",
        "extensions": {},
        "allowCredentials": [
            {"type": "public-key", "id": "AQ", "transports": ["internal"]},
            {"type": "public-key", "id": "Ag"},
        ],
        "hints": ["hybrid", "client-device"],
    }
    plain = begin_authentication(
        relying_party(), challenge=CHALLENGE, allow=(), life=0.0001, user_verification="required"
    )
    assert plain.keys() == {"challenge", "rpId", "timeout", "userVerification", "extensions"}
    assert plain["timeout"] == 1


@pytest.mark.parametrize(
    ("aaguid", "name"),
    [
        ("fbfc3007-154e-4ecc-8c0b-6e020557d7bd", "iCloud Keychain"),
        ("FBFC3007-154E-4ECC-8C0B-6E020557D7BD", "iCloud Keychain"),
        ("ea9b8d66-4d01-1d21-3ce4-b6b48cb575d4", "Google Password Manager"),
        ("00000000-0000-0000-0000-000000000000", None),
        ("", None),
    ],
)
def test_authenticator_name(aaguid: str, name: str | None) -> None:
    assert authenticator_name(aaguid) == name
