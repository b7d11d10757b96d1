"""The ceremonies by the rules of WebAuthn L3 §7.1 and §7.2: what passes, and one row for each rule
with the exact reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast, get_args

import pytest

from broker.ceremony import (
    REASONS,
    Reason,
    finish_authentication,
    finish_registration,
    parse_authentication,
    parse_registration,
    user_handle_matches,
)
from broker.errors import CeremonyRefused
from broker.model import ALGORITHMS, Credential
from tests.support.authenticator import (
    ED448,
    EDDSA,
    ES256,
    ES384,
    ES512,
    RS256,
    Attestation,
    Authenticator,
    AuthenticatorRefused,
    Misbehaviour,
    b64,
    flex_wire_form,
    new_key,
    rsa_key,
    unb64,
)
from tests.support.ceremonies import (
    CHALLENGE,
    HANDLE,
    ORIGIN,
    authenticate,
    creation_options,
    credential_of,
    pending_authentication,
    pending_registration,
    register,
    registered,
    relying_party,
    request_options,
)

ALL = tuple(ALGORITHMS)
IFRAME = {"allow_cross_origin": True, "top_origins": ("https://shop.example",)}


def bytes_of(answer: Mapping[str, Any]) -> bytes:
    return unb64(answer["response"]["authenticatorData"])


@pytest.mark.parametrize("form", ["none", "packed-self", "packed"])
@pytest.mark.parametrize("algorithm", ALL)
def test_every_algorithm_registers_and_signs_in(algorithm: int, form: Attestation) -> None:
    rp = relying_party(algorithms=ALL, attestation="direct")
    device = Authenticator(attestation=form, algorithms=(algorithm,))
    made = register(rp, device.register(creation_options(rp), ORIGIN))
    held = device.credentials("example.com")[0]
    assert (made.algorithm, made.credential_id, made.sign_count) == (algorithm, held.id, 1)
    assert made.attestation_trust == ("none" if form == "none" else "claimed")
    assert made.attestation_format == form.split("-")[0]
    assert made.user_present
    assert made.user_verified
    assert (made.transports, made.attachment) == (("internal", "hybrid"), "platform")
    assert made.origin == ORIGIN

    credential = credential_of(made, rp)
    seen = authenticate(
        rp, credential, device.authenticate(request_options(rp, credential), ORIGIN)
    )
    assert (seen.sign_count, seen.counter_regressed, seen.backup_changed) == (2, False, False)
    assert (seen.backup_eligible, seen.backed_up) == (True, True)
    assert seen.user_verified
    assert seen.origin == ORIGIN


@pytest.mark.parametrize("form", ["fido-u2f", "android-key", "apple", "tpm"])
def test_every_format_registers_and_signs_in(form: Attestation) -> None:
    rp = relying_party(attestation="direct")
    made, device = registered(rp, Authenticator(attestation=form))
    assert (made.attestation_format, made.attestation_trust) == (form, "claimed")
    assert (
        authenticate(rp, made, device.authenticate(request_options(rp, made), ORIGIN)).sign_count
        == 2
    )


@pytest.mark.parametrize("number", ["android-key", "apple", "tpm"])
def test_formats_with_an_rsa_key(number: Attestation) -> None:
    rp = relying_party(attestation="direct")
    made, _ = registered(rp, Authenticator(attestation=number, algorithms=(RS256,)))
    assert (made.algorithm, made.attestation_trust) == (RS256, "claimed")


def test_wire_form_of_the_flex_sdks() -> None:
    """`transports` beside `response`, no attachment, and an empty user handle that means none."""
    rp = relying_party()
    device = Authenticator()
    wire = flex_wire_form(device.register(creation_options(rp), ORIGIN))
    assert "transports" not in wire["response"]
    made = credential_of(register(rp, wire), rp)
    assert (made.transports, made.attachment) == (("internal", "hybrid"), None)
    wire = flex_wire_form(device.authenticate(request_options(rp, made), ORIGIN, user_handle=None))
    assert wire["response"]["userHandle"] == ""
    assert authenticate(rp, made, wire).user_present


def test_reasons_are_a_closed_list() -> None:
    assert set(REASONS) == set(get_args(Reason))
    assert all(REASONS.values())


REGISTRATION: list[tuple[str, Misbehaviour, Reason]] = [
    ("type of the other ceremony", {"type": "webauthn.get"}, "type"),
    ("type in other case", {"type": "webauthn.CREATE"}, "type"),
    ("other challenge", {"challenge": b64(b"x" * 32)}, "challenge"),
    ("challenge with padding", {"challenge": b64(CHALLENGE) + "="}, "challenge"),
    ("challenge in the other alphabet", {"challenge": "+" + b64(CHALLENGE)[1:]}, "challenge"),
    ("cross-origin iframe", {"cross_origin": True}, "cross_origin"),
    ("cross-origin iframe with top origin", {"cross_origin": True, "top_origin": ORIGIN}, "cross_origin"),
    ("top origin without cross-origin", {"top_origin": "https://shop.example"}, "top_origin"),
    ("top origin without crossOrigin", {"cross_origin": None, "top_origin": ORIGIN}, "top_origin"),
    ("crossOrigin is text", {"client_data": {"crossOrigin": "false"}}, "malformed"),
    ("crossOrigin is null", {"client_data": {"crossOrigin": None}}, "malformed"),
    ("topOrigin is null", {"client_data": {"topOrigin": None}}, "malformed"),
    ("other RP ID", {"rp_id": "evil.example"}, "rp_id"),
    ("parent RP ID", {"rp_id": "com"}, "rp_id"),
    ("user not present", {"up": False}, "user_presence"),
    ("user not verified", {"uv": False}, "user_verification"),
    ("backed up, not eligible", {"be": False, "bs": True}, "backup_flags"),
    ("algorithm not offered", {"algorithm": ES384}, "algorithm"),
    ("algorithm says otherwise", {"key": {3: -257}}, "public_key"),
    ("algorithm unknown", {"key": {3: -999}}, "algorithm"),
    ("algorithm is missing", {"key": {3: None}}, "algorithm"),
    ("algorithm is a float", {"key": {3: -7.0}}, "algorithm"),
    ("credential id too long", {"credential_id": bytes(1024), "answer": {"id": "AA", "rawId": "AA"}}, "credential_id"),
    ("credential id empty", {"credential_id": b"", "answer": {"id": "AA", "rawId": "AA"}}, "credential_id"),
    ("other credential id answered", {"answer": {"id": "AA", "rawId": "AA"}}, "credential_id"),
    ("no attested credential", {"auth_data": lambda d: d[:32] + b"\x05" + d[33:37]}, "malformed"),
    ("AT without a credential", {"auth_data": lambda d: d[:37]}, "malformed"),
    ("AT with half a credential", {"auth_data": lambda d: d[:60]}, "malformed"),
    ("credential without AT", {"auth_data": lambda d: d[:32] + b"\x05" + d[33:]}, "malformed"),
    ("bytes left over", {"auth_data": lambda d: d + b"\0"}, "malformed"),
    ("ED without extensions", {"auth_data": lambda d: d[:32] + b"\xc5" + d[33:]}, "malformed"),
    ("extensions without ED", {"auth_data": lambda d: d + b"\xa0"}, "malformed"),
    ("extensions are a list", {"auth_data": lambda d: d[:32] + b"\xc5" + d[33:] + b"\x80"}, "malformed"),
    ("fmt unknown", {"attestation_object": lambda o: {**o, "fmt": "unheard-of"}}, "attestation"),
    ("fmt deprecated", {"attestation_object": lambda o: {**o, "fmt": "android-safetynet"}}, "attestation"),
    ("fmt in other case", {"attestation_object": lambda o: {**o, "fmt": "None"}}, "attestation"),
    ("none with a statement", {"statement": lambda s: {"sig": b""}}, "attestation"),
    ("none with an unknown statement", {"statement": lambda s: {"more": 1}}, "attestation"),
    ("attestation object is a list", {"attestation_object": lambda o: [o]}, "malformed"),
    ("attestation object with a tail", {"attestation_object": lambda o: b"\xa0\x00"}, "malformed"),
]  # fmt: skip


@pytest.mark.parametrize(("how", "reason"), [pytest.param(h, r, id=n) for n, h, r in REGISTRATION])
def test_registration_rule(how: Misbehaviour, reason: Reason) -> None:
    rp = relying_party()
    answer = Authenticator().register(creation_options(rp), ORIGIN, **how)
    with pytest.raises(CeremonyRefused) as refused:
        register(rp, answer)
    assert refused.value.reason == reason
    assert refused.value.sentence.endswith(".")


AUTHENTICATION: list[tuple[str, Misbehaviour, Reason]] = [
    ("type of the other ceremony", {"type": "webauthn.create"}, "type"),
    ("other challenge", {"challenge": b64(b"x" * 32)}, "challenge"),
    ("challenge empty", {"challenge": ""}, "challenge"),
    ("cross-origin iframe", {"cross_origin": True}, "cross_origin"),
    ("top origin without cross-origin", {"top_origin": "https://shop.example"}, "top_origin"),
    ("other RP ID", {"rp_id": "evil.example"}, "rp_id"),
    ("user not present", {"up": False}, "user_presence"),
    ("user not verified", {"uv": False}, "user_verification"),
    ("backed up, not eligible", {"be": False, "bs": True}, "backup_flags"),
    ("eligibility changed", {"be": False, "bs": False}, "backup_eligibility"),
    ("other credential id", {"credential_id": b"other"}, "credential_id"),
    ("user handle of another", {"user_handle": b64(b"B" * 43)}, "user_handle"),
    ("user handle as no encoding", {"user_handle": "alice"}, "user_handle"),
    ("counter not raised", {"counter": 1}, "counter"),
    ("counter back to zero", {"counter": 0}, "counter"),
    ("signature empty of meaning", {"signature": b"no"}, "signature"),
    ("signature of other data", {"signature": lambda s: s[:-1] + bytes([s[-1] ^ 1])}, "signature"),
    ("signature with a tail", {"signature": lambda s: s + b"\0"}, "signature"),
    ("attested credential data", {"flags": 0x5D}, "malformed"),
    ("attested credential data, whole", {
        "auth_data": lambda d: d[:32] + b"\x5d" + d[33:] + bytes(17) + b"\x01\x01\xa0"}, "malformed"),
    ("ED without extensions", {"flags": 0x9D}, "malformed"),
    ("bytes left over", {"auth_data": lambda d: d + b"\0"}, "malformed"),
    ("too short", {"auth_data": lambda d: d[:36]}, "malformed"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("how", "reason"), [pytest.param(h, r, id=n) for n, h, r in AUTHENTICATION]
)
@pytest.mark.parametrize("algorithm", [ES256, ED448], ids=["by py_webauthn", "by us"])
def test_authentication_rule(how: Misbehaviour, reason: Reason, algorithm: int) -> None:
    rp = relying_party(algorithms=(algorithm,))
    made, device = registered(rp)
    answer = device.authenticate(request_options(rp, made), ORIGIN, **how)
    with pytest.raises(CeremonyRefused) as refused:
        authenticate(rp, made, answer)
    assert refused.value.reason == reason


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "https://example.com.evil.example",
        "https://sub.example.com",
        "http://example.com",
        "https://example.com:8443",
        "https://example.com/",
        "HTTPS://EXAMPLE.COM",
        "android:apk-key-hash:AAAA",
        "null",
        "",
    ],
)
def test_origins_are_matched_exactly(origin: str) -> None:
    rp = relying_party()
    made, device = registered(rp)
    options = {**request_options(rp, made), "rpId": "example.com"}
    with pytest.raises(CeremonyRefused) as refused:
        authenticate(rp, made, device.authenticate(options, origin))
    assert refused.value.reason == "origin"
    with pytest.raises(CeremonyRefused) as refused:
        register(rp, Authenticator().register(creation_options(rp), origin))
    assert refused.value.reason == "origin"


def test_app_origins_and_related_origins_are_accepted() -> None:
    app = "android:apk-key-hash:" + b64(bytes(32))
    rp = replace(relying_party(), origins=(ORIGIN, app), related_origins=("https://example.net",))
    made, device = registered(rp)
    for origin in (app, "https://example.net", ORIGIN):
        assert (
            authenticate(rp, made, device.authenticate(request_options(rp, made), origin)).origin
            == origin
        )


CROSSING: list[tuple[Misbehaviour, Reason | None]] = [
    ({"cross_origin": True}, None),
    ({"cross_origin": True, "top_origin": "https://shop.example"}, None),
    ({"cross_origin": False}, None),
    ({"cross_origin": None}, None),
    ({"cross_origin": True, "top_origin": "https://other.example"}, "top_origin"),
    ({"cross_origin": True, "top_origin": "https://shop.example/"}, "top_origin"),
    ({"cross_origin": False, "top_origin": "https://shop.example"}, "top_origin"),
]


@pytest.mark.parametrize(("how", "reason"), CROSSING)
def test_embedding_by_policy(how: Misbehaviour, reason: Reason | None) -> None:
    rp = relying_party(**IFRAME)
    made, device = registered(rp)
    registration = Authenticator().register(creation_options(rp), ORIGIN, **how)
    authentication = device.authenticate(request_options(rp, made), ORIGIN, **how)
    if reason is None:
        assert register(rp, registration).origin == ORIGIN
        assert authenticate(rp, made, authentication).origin == ORIGIN
        return
    with pytest.raises(CeremonyRefused) as refused:
        register(rp, registration)
    assert refused.value.reason == reason
    with pytest.raises(CeremonyRefused) as refused:
        authenticate(rp, made, authentication)
    assert refused.value.reason == reason


GOOD = json.dumps({"type": "webauthn.create", "challenge": b64(CHALLENGE), "origin": ORIGIN})
CLIENT_DATA: list[tuple[str, bytes]] = [
    ("not JSON", b"hello"),
    ("empty object", b"{}"),
    ("a list", b"[]"),
    ("a number", b"1"),
    ("null", b"null"),
    ("not UTF-8", GOOD.encode()[:-1] + b',"x":"\xff"}'),
    ("UTF-16", GOOD.encode("utf-16")),
    ("equal keys", GOOD.encode()[:-1] + b',"origin":"https://example.com"}'),
    ("equal keys below", GOOD.encode()[:-1] + b',"x":{"a":1,"a":1}}'),
    ("a lone surrogate", GOOD.encode()[:-1] + b',"x":"\\ud800"}'),
    ("NaN", GOOD.encode()[:-1] + b',"x":NaN}'),
    ("Infinity", GOOD.encode()[:-1] + b',"x":-Infinity}'),
    ("a huge number", GOOD.encode()[:-1] + b',"x":' + b"9" * 5000 + b"}"),
    ("deep nesting", b"[" * 16_000),
    ("deep nesting below", GOOD.encode()[:-1] + b',"x":' + b"[" * 7000 + b"]" * 7000 + b"}"),
    ("nesting a little too deep", GOOD.encode()[:-1] + b',"x":' + b"[" * 500 + b"]" * 500 + b"}"),
    ("a tail", GOOD.encode() + b"x"),
    ("a NUL at the end", GOOD.encode() + b"\0"),
    ("two marks of byte order", b"\xef\xbb\xbf" * 2 + GOOD.encode()),
    ("type is a number", GOOD.replace('"webauthn.create"', "1").encode()),
    ("challenge is null", GOOD.replace(f'"{b64(CHALLENGE)}"', "null").encode()),
    ("origin is a list", GOOD.replace(f'"{ORIGIN}"', f'["{ORIGIN}"]').encode()),
    ("no type", GOOD.replace('"type"', '"kind"').encode()),
    ("no challenge", GOOD.replace('"challenge"', '"other"').encode()),
    ("no origin", GOOD.replace('"origin"', '"other"').encode()),
    ("token binding is text", GOOD.encode()[:-1] + b',"tokenBinding":"present"}'),
    ("token binding is null", GOOD.encode()[:-1] + b',"tokenBinding":null}'),
    ("token binding without status", GOOD.encode()[:-1] + b',"tokenBinding":{}}'),
    ("token binding of odd status", GOOD.encode()[:-1] + b',"tokenBinding":{"status":"maybe"}}'),
]


def compact(raw: bytes) -> bytes:
    """As browsers write it: without spaces."""
    return raw.replace(b'", "', b'","').replace(b'": ', b'":')


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(write(raw), id=f"{name}, {how}")
        for name, raw in CLIENT_DATA
        for how, write in (("spaced", bytes), ("compact", compact))
    ],
)
def test_client_data_that_is_ambiguous_or_broken(raw: bytes) -> None:
    rp = relying_party()
    answer = Authenticator().register(creation_options(rp), ORIGIN, client_data_json=raw)
    with pytest.raises(CeremonyRefused) as refused:
        register(rp, answer)
    assert refused.value.reason == "malformed"


@pytest.mark.parametrize(
    "raw",
    [
        b"\xef\xbb\xbf" + GOOD.encode(),
        GOOD.encode()[:-1] + b',"x":{"\\u00e9":[1,true,null,{"y":"\\ud83d\\ude00"}]}}',
        GOOD.encode()[:-1] + b',"tokenBinding":{"status":"supported"}}',
        json.dumps(dict(reversed(json.loads(GOOD).items())), indent=3).encode(),
        compact(GOOD.encode()),
        compact(GOOD.encode())[:-1] + b',"x":{"\\u00e9":9}}',
        # Deep enough that the fast parser reads it, but does not write it.
        compact(GOOD.encode())[:-1] + b',"x":' + b"[" * 300 + b"]" * 300 + b"}",
        GOOD.encode()[:-1] + b',"x":' + b"[" * 498 + b"]" * 498 + b"}",
        GOOD.encode()[:-1] + b',"x":"' + b"[" * 7000 + b'"}',
    ],
    ids=[
        "byte order mark",
        "more keys",
        "token binding",
        "other order and spaces",
        "compact",
        "escapes",
        "nesting",
        "as deep as may be",
        "brackets in text",
    ],
)
def test_client_data_that_is_unusual(raw: bytes) -> None:
    rp = relying_party()
    answer = Authenticator().register(creation_options(rp), ORIGIN, client_data_json=raw)
    assert register(rp, answer).origin == ORIGIN


# counter stored, counter answered, policy -> regressed, or None for a refusal
COUNTERS = [
    (0, 0, "refuse", False),
    (0, 1, "refuse", False),
    (5, 6, "refuse", False),
    (5, 2**32 - 1, "refuse", False),
    (5, 5, "refuse", None),
    (5, 4, "refuse", None),
    (5, 0, "refuse", None),
    (5, 5, "flag", True),
    (5, 0, "flag", True),
    (5, 6, "flag", False),
    (0, 0, "flag", False),
]


@pytest.mark.parametrize(("stored", "answered", "policy", "regressed"), COUNTERS)
def test_counter(stored: int, answered: int, policy: str, regressed: bool | None) -> None:
    rp = relying_party(counter=policy)
    made, device = registered(rp)
    made = replace(made, sign_count=stored)
    answer = device.authenticate(request_options(rp, made), ORIGIN, counter=answered)
    if regressed is None:
        with pytest.raises(CeremonyRefused) as refused:
            authenticate(rp, made, answer)
        assert refused.value.reason == "counter"
        return
    seen = authenticate(rp, made, answer)
    assert (seen.counter_regressed, seen.sign_count) == (regressed, answered)


def test_a_wrong_signature_is_no_counter_alarm() -> None:
    rp = relying_party()
    made, device = registered(rp)
    answer = device.authenticate(request_options(rp, made), ORIGIN, counter=0, signature=b"no")
    with pytest.raises(CeremonyRefused) as refused:
        authenticate(rp, made, answer)
    assert refused.value.reason == "signature"


@pytest.mark.parametrize("verification", ["preferred", "discouraged"])
def test_user_verification_is_reported_where_it_is_not_required(verification: str) -> None:
    rp = relying_party(user_verification=verification)
    made, device = registered(rp, uv=False)
    options = request_options(rp, made)
    assert options["userVerification"] == verification
    assert not authenticate(rp, made, device.authenticate(options, ORIGIN, uv=False)).user_verified
    assert authenticate(rp, made, device.authenticate(options, ORIGIN)).user_verified


def test_requirements_are_those_of_the_beginning() -> None:
    """A policy that changed in between neither weakens nor tightens a pending ceremony."""
    strict, lax = (
        relying_party(),
        relying_party(user_verification="discouraged", algorithms=(EDDSA,)),
    )
    answer = Authenticator().register(creation_options(strict), ORIGIN, uv=False)
    with pytest.raises(CeremonyRefused) as refused:
        finish_registration(pending_registration(strict), lax, parse_registration(answer))
    assert refused.value.reason == "user_verification"
    assert (
        finish_registration(
            pending_registration(strict)._replace(user_verification="preferred"),
            lax,
            parse_registration(answer),
        ).algorithm
        == ES256
    )


@pytest.mark.parametrize(("eligible", "before", "after"), [(True, True, False), (True, False, True), (False, False, False)])  # fmt: skip
def test_backup_state_may_change(eligible: bool, before: bool, after: bool) -> None:
    rp = relying_party()
    made, device = registered(rp, Authenticator(backup_eligible=eligible), bs=before)
    seen = authenticate(rp, made, device.authenticate(request_options(rp, made), ORIGIN, bs=after))
    assert (seen.backup_eligible, seen.backed_up, seen.backup_changed) == (
        eligible,
        after,
        before != after,
    )


def test_extensions_are_read() -> None:
    rp = relying_party()
    outputs = {
        "credProtect": 2,
        "hmac-secret": True,
        "more": [1.5, None, {"a": b"\x01"}, -300, 70_000, 2**40],
    }
    made, device = registered(rp, extensions=outputs)
    answer = device.authenticate(request_options(rp, made), ORIGIN, extensions=outputs)
    assert bytes_of(answer)[32] & 0x80
    assert authenticate(rp, made, answer).user_present


def test_longest_credential_id() -> None:
    rp = relying_party()
    made, device = registered(rp, credential_id=bytes(range(256)) * 3 + bytes(255))
    assert len(made.credential_id) == 1023
    assert authenticate(
        rp, made, device.authenticate(request_options(rp, made), ORIGIN)
    ).user_present


# The user's part of §7.2.


def discoverable(rp: Any, made: Credential, device: Authenticator, **how: Any) -> Any:
    answer = device.authenticate(request_options(rp, None), ORIGIN, **how)
    return authenticate(rp, made, answer, discoverable=True)


def test_discoverable_needs_a_user_handle() -> None:
    rp = relying_party()
    made, device = registered(rp)
    assert discoverable(rp, made, device).user_verified
    for absent in (None, ""):
        with pytest.raises(CeremonyRefused) as refused:
            discoverable(rp, made, device, user_handle=absent)
        assert refused.value.reason == "user_handle"
    with pytest.raises(CeremonyRefused) as refused:
        discoverable(rp, made, device, user_handle=b64(b"B" * 43))
    assert refused.value.reason == "user_handle"


OWNERS: list[tuple[str, Callable[[Credential], Credential], Reason]] = [
    ("not offered", lambda c: replace(c, id="Q" * 24), "not_offered"),
    ("of another user", lambda c: replace(c, user_id="V" * 24), "not_offered"),
    ("of another app", lambda c: replace(c, app_id="B" * 24), "not_offered"),
    ("another credential", lambda c: replace(c, credential_id=b"other"), "credential_id"),
    ("registered with another handle", lambda c: replace(c, user_handle="C" * 43), "user_handle"),
]


@pytest.mark.parametrize(("change", "reason"), [pytest.param(c, r, id=n) for n, c, r in OWNERS])
def test_right_user(change: Callable[[Credential], Credential], reason: Reason) -> None:
    """The pending ceremony offers one credential of one user; the stored one that the answer names
    is another.
    """
    rp = relying_party()
    made, device = registered(rp)
    answer = parse_authentication(device.authenticate(request_options(rp, made), ORIGIN))
    pending = pending_authentication(rp, made)
    with pytest.raises(CeremonyRefused) as refused:
        finish_authentication(pending, rp, change(made), answer)
    assert refused.value.reason == reason
    assert finish_authentication(pending, rp, made, answer).user_present


def test_a_transaction_that_offers_nothing_allows_nothing() -> None:
    rp = relying_party()
    made, device = registered(rp)
    answer = parse_authentication(device.authenticate(request_options(rp, made), ORIGIN))
    with pytest.raises(CeremonyRefused) as refused:
        finish_authentication(
            pending_authentication(rp, made)._replace(allowed=()), rp, made, answer
        )
    assert refused.value.reason == "not_offered"


def test_another_key_is_another_signature() -> None:
    rp = relying_party()
    made, device = registered(rp)
    other, _ = registered(rp)
    answer = device.authenticate(request_options(rp, made), ORIGIN)
    with pytest.raises(CeremonyRefused) as refused:
        authenticate(rp, replace(made, public_key=other.public_key), answer)
    assert refused.value.reason == "signature"


S = b64(HANDLE.encode())


@pytest.mark.parametrize(
    ("returned", "same"),
    [
        (S, True),
        (HANDLE, True),
        (b64(S.encode()), True),
        (S + "==", True),
        (b64(b64(S.encode()).encode()), False),
        (HANDLE[:-1], False),
        (HANDLE + "=", False),
        (HANDLE.swapcase(), False),
        (S[:-1], False),
        ("", False),
        ("\ud800", False),
    ],
)
def test_three_encodings_of_the_user_handle(returned: str, same: bool) -> None:
    assert user_handle_matches(returned, HANDLE) is same
    rp = relying_party()
    made, device = registered(rp)
    if returned and same:
        assert discoverable(rp, made, device, user_handle=returned).user_present
    elif returned:
        with pytest.raises(CeremonyRefused) as refused:
            discoverable(rp, made, device, user_handle=returned)
        assert refused.value.reason == "user_handle"


def test_encodings_of_two_handles_never_meet() -> None:
    assert len({len(HANDLE), len(S), len(b64(S.encode()))}) == 3


# The authenticator of the tests itself.


def test_authenticator_honours_the_options() -> None:
    rp = relying_party()
    made, device = registered(rp)
    options = {
        **creation_options(rp),
        "excludeCredentials": [{"type": "public-key", "id": b64(made.credential_id)}],
    }
    with pytest.raises(AuthenticatorRefused, match="InvalidStateError"):
        device.register(options, ORIGIN)
    with pytest.raises(AuthenticatorRefused, match="NotSupportedError"):
        Authenticator(algorithms=(ES512,)).register(creation_options(rp), ORIGIN)
    with pytest.raises(AuthenticatorRefused, match="NotAllowedError"):
        Authenticator().authenticate(request_options(rp, made), ORIGIN)
    other = replace(made, credential_id=b"other")
    with pytest.raises(AuthenticatorRefused, match="NotAllowedError"):
        device.authenticate(request_options(rp, other), ORIGIN)


def test_authenticator_keeps_one_credential_for_each_user() -> None:
    rp = relying_party()
    first, device = registered(rp)
    second, _ = registered(rp, device)
    assert [held.id for held in device.credentials("example.com")] == [second.credential_id]
    assert first.credential_id not in device.held


def test_authenticator_exports_its_key() -> None:
    from cryptography.hazmat.primitives.serialization import load_der_private_key

    key = new_key(ES256)
    rp = relying_party()
    _, device = registered(rp, private_key=key)
    loaded = cast("Any", load_der_private_key(device.credentials("example.com")[0].export(), None))
    assert loaded.private_numbers() == cast("Any", key).private_numbers()
    assert rsa_key() is rsa_key()
    with pytest.raises(ValueError, match="no key"):
        new_key(0)
