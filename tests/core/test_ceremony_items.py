"""The public FIDO2 server conformance items, each as a named row: `tests/core/vectors/README.md`
says which do not apply, and why.

The items' texts are in `vectors/fido-server-items.json`; the payloads here are our own. A row is
called by group (MC: make credential, GA: get assertion, MDS: metadata service), test and case, and
must end as its item expects, but for those in `DISAGREEMENTS`, where Level 3 or sense says
otherwise: those must end the other way. The four tables together hold every item.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from broker.ceremony import begin_registration
from broker.errors import CeremonyRefused, InvalidRequest
from tests.support.authenticator import (
    EDDSA,
    ES256,
    ES384,
    ES512,
    RS256,
    Attestation,
    Authenticator,
    Authority,
    b64,
    cose_key,
    key_description,
    new_key,
    sign,
    tpm_public_area,
    unb64,
)
from tests.support.ceremonies import (
    CHALLENGE,
    HANDLE,
    ORIGIN,
    authenticate,
    creation_options,
    register,
    registered,
    relying_party,
    request_options,
)

VECTORS = Path(__file__).parent / "vectors"
GROUPS = {
    "MakeCredential Request": "MC",
    "MakeCredential Response": "MC",
    "GetAssertion Request": "GA",
    "GetAssertion Response": "GA",
    "Metadata Service Tests": "MDS",
}
ITEMS = {
    f"{GROUPS[item['group']]} {'-'.join(item['test'].split('-')[-2:])} {item['case']}": item[
        "expect"
    ]
    for item in json.loads((VECTORS / "fido-server-items.json").read_text())["items"]
}

ROOT = Authority("Root")
BELOW = ROOT.intermediate()
EXPIRED = ROOT.intermediate("Expired", years=(2020, 2025))
STRANGER = Authority("Stranger")

Row = Callable[[], object]
Change = Callable[[dict[str, Any]], Any]


def changed(signature: bytes) -> bytes:
    return signature[:-1] + bytes([signature[-1] ^ 1])


def mc(
    form: Attestation = "packed",
    *,
    wire: Change | None = None,
    device: Mapping[str, Any] | None = None,
    policy: Mapping[str, Any] | None = None,
    **how: Any,
) -> Row:
    """A registration with a misbehaving device, and a change of its JSON; the app asks for
    attestation and knows the root.
    """

    def run() -> object:
        rp = relying_party(
            **{"attestation": "direct", "attestation_roots": (ROOT.pem,), **(policy or {})}
        )
        made = Authenticator(**{"attestation": form, "authority": ROOT, **(device or {})})
        answer = made.register(creation_options(rp), ORIGIN, **how)
        return register(rp, wire(answer) if wire else answer)

    return run


def ga(
    *,
    wire: Change | None = None,
    device: Mapping[str, Any] | None = None,
    policy: Mapping[str, Any] | None = None,
    **how: Any,
) -> Row:
    """An authentication, likewise."""

    def run() -> object:
        rp = relying_party(**(policy or {}))
        made, holder = registered(rp, Authenticator(**(device or {})))
        answer = holder.authenticate(request_options(rp, made), ORIGIN, **how)
        return authenticate(rp, made, wire(answer) if wire else answer)

    return run


def top(**members: Any) -> Change:
    """Replace members of the JSON; `...` takes one out."""
    return lambda answer: _with(answer, members)


def inner(**members: Any) -> Change:
    """As `top`, in `response`."""
    return lambda answer: {**answer, "response": _with(answer["response"], members)}


def _with(holder: Mapping[str, Any], members: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in {**holder, **members}.items() if v is not ...}


def client_data(kind: str, **members: Any) -> bytes:
    """Client data with members replaced before signing; `...` takes one out."""
    usual = {"type": kind, "challenge": b64(CHALLENGE), "origin": ORIGIN, "crossOrigin": False}
    return json.dumps(_with(usual, members)).encode()


def statement(**members: Any) -> Change:
    return lambda s: _with(s, members)


def whole(**members: Any) -> Change:
    return lambda o: _with(o, members)


def chain(*more: bytes) -> Change:
    return lambda s: {**s, "x5c": [*s["x5c"], *more]}


def own_signature() -> Row:
    """A full statement whose signature is the credential's key's, not the certificate's."""
    key, seen = new_key(ES256), {}

    def keep(data: bytes) -> bytes:
        seen["data"] = data
        return data

    raw = client_data("webauthn.create")

    def resign(given: dict[str, Any]) -> dict[str, Any]:
        return {**given, "sig": sign(key, ES256, seen["data"] + hashlib.sha256(raw).digest())}

    return mc(private_key=key, auth_data=keep, statement=resign, client_data_json=raw)


def flags(data: bytes, byte: int, tail: bytes) -> bytes:
    return data[:32] + bytes([byte]) + data[33:37] + tail


def creation() -> object:
    options = creation_options(relying_party(attestation="none"))
    assert isinstance(options["user"]["name"], str)
    assert isinstance(options["user"]["displayName"], str)
    assert 1 <= len(unb64(options["user"]["id"])) <= 64
    assert options["rp"] == {"name": "Example", "id": "example.com"}
    assert len(unb64(options["challenge"])) >= 16
    assert {"type": "public-key", "alg": ES256} in options["pubKeyCredParams"]
    assert options["timeout"] > 0
    assert options["attestation"] == "none"
    return options


def request() -> object:
    rp = relying_party(user_verification="preferred")
    made, _ = registered(rp)
    options = request_options(rp, made)
    assert len(unb64(options["challenge"])) >= 16
    assert isinstance(options["extensions"], dict)
    assert options["rpId"] == "example.com"
    assert options["allowCredentials"][0]["id"] == b64(made.credential_id)
    assert options["userVerification"] == "preferred"
    return options


def excluded() -> object:
    rp = relying_party()
    made, _ = registered(rp)
    options = begin_registration(
        rp,
        challenge=CHALLENGE,
        user_handle=HANDLE,
        user_name="alice",
        user_display_name="Alice",
        exclude=[(made.credential_id, made.transports)],
        life=60,
        attachment=None,
        user_verification=rp.policy.user_verification,
    )
    (descriptor,) = options["excludeCredentials"]
    assert (descriptor["type"], descriptor["id"]) == ("public-key", b64(made.credential_id))
    return options


def tpm_of_sha384() -> Row:
    key = new_key(ES256)
    area = bytearray(tpm_public_area(cose_key(key, ES256)))
    area[2:4] = b"\x00\x0c"
    name = b"\x00\x0c" + hashlib.sha384(area).digest()
    return mc("tpm", private_key=key, certificate={"pub_area": bytes(area), "name": name})


def android_of_another_key() -> object:
    other = new_key(ES256)

    class Swapped(Authority):
        def issue(self, public_key: Any, extensions: Any, **how: Any) -> bytes:
            return super().issue(other.public_key(), extensions, **how)

    authority = Swapped()
    return mc(
        "android-key",
        device={"authority": authority},
        policy={"attestation_roots": (authority.pem,)},
    )()


def self_packed(algorithm: int) -> Row:
    return mc("packed-self", algorithm=algorithm, policy={"algorithms": (algorithm,)})


ROWS: dict[str, Row] = {
    "MC Req-1 P-1": creation,
    "MC Req-1 P-2": creation,
    # RegistrationResponseJSON
    "MC Resp-1 P-1": excluded,
    "MC Resp-1 F-1": mc(wire=top(id=...)),
    "MC Resp-1 F-2": mc(wire=top(id=7)),
    "MC Resp-1 F-3": mc(wire=top(id="!?")),
    "MC Resp-1 F-4": mc(wire=top(type=...)),
    "MC Resp-1 F-5": mc(wire=top(type=7)),
    "MC Resp-1 F-6": mc(wire=top(type="publickey")),
    "MC Resp-1 F-7": mc(wire=top(response=...)),
    "MC Resp-1 F-8": mc(wire=top(response="x")),
    "MC Resp-1 F-9": mc(wire=inner(clientDataJSON=...)),
    "MC Resp-1 F-10": mc(wire=inner(clientDataJSON=7)),
    "MC Resp-1 F-11": mc(wire=inner(clientDataJSON="")),
    "MC Resp-1 F-12": mc(wire=inner(attestationObject=...)),
    "MC Resp-1 F-13": mc(wire=inner(attestationObject=7)),
    "MC Resp-1 F-14": mc(wire=inner(attestationObject="")),
    # attestation object
    "MC Resp-3 P-1": mc(extensions={"credProtect": 1}),
    "MC Resp-3 F-1": mc(attestation_object=lambda o: list(o.values())),
    "MC Resp-3 F-2": mc(attestation_object=whole(fmt=...)),
    "MC Resp-3 F-3": mc(attestation_object=whole(fmt=7)),
    "MC Resp-3 F-4": mc(attestation_object=whole(attStmt=...)),
    "MC Resp-3 F-5": mc(attestation_object=whole(attStmt=[])),
    "MC Resp-3 F-6": mc(attestation_object=whole(authData=...)),
    "MC Resp-3 F-7": mc(attestation_object=whole(authData="x")),
    "MC Resp-3 F-8": mc(attestation_object=whole(authData=b"")),
    "MC Resp-3 F-9": mc(auth_data=lambda d: flags(d, 0x1D, d[37:])),
    "MC Resp-3 F-10": mc(auth_data=lambda d: flags(d, 0x1D, b"")),
    "MC Resp-3 F-11": mc(auth_data=lambda d: flags(d, 0x5D, b"")),
    "MC Resp-3 F-12": mc(auth_data=lambda d: d + b"\0"),
    "MC Resp-3 F-13": mc(statement=lambda s: {}),
    "MC Resp-3 F-14": mc(statement=statement(alg=...)),
    "MC Resp-3 F-15": mc(statement=statement(alg="-7")),
    "MC Resp-3 F-17": mc(statement=statement(sig=...)),
    "MC Resp-3 F-18": mc(statement=statement(sig="x")),
    "MC Resp-3 F-19": mc(statement=statement(sig=b"")),
    # algorithms
    "MC Resp-4 P-5": self_packed(RS256),
    "MC Resp-4 P-9": self_packed(ES256),
    "MC Resp-4 P-10": self_packed(ES384),
    "MC Resp-4 P-11": self_packed(ES512),
    "MC Resp-4 P-12": self_packed(EDDSA),
    # packed, full
    "MC Resp-5 P-1": mc(),
    "MC Resp-5 P-2": mc(device={"authority": BELOW}, statement=chain(BELOW.der)),
    "MC Resp-5 F-1": mc(attestation_object=whole(fmt="unheard-of")),
    "MC Resp-5 F-2": mc(signature=changed),
    "MC Resp-5 F-3": mc(statement=statement(x5c=...)),
    "MC Resp-5 F-4": mc(statement=statement(x5c=ROOT.der)),
    "MC Resp-5 F-5": mc(statement=statement(x5c=[])),
    "MC Resp-5 F-6": mc(certificate={"years": (2020, 2025)}),
    "MC Resp-5 F-7": mc(certificate={"years": (2030, 2060)}),
    "MC Resp-5 F-9": mc(device={"authority": STRANGER}, statement=chain(BELOW.der)),
    "MC Resp-5 F-11": mc(
        device={"authority": BELOW},
        statement=lambda s: {**s, "x5c": [ROOT.der, BELOW.der, *s["x5c"]]},
    ),
    "MC Resp-5 F-12": mc(device={"authority": EXPIRED}, statement=chain(EXPIRED.der)),
    "MC Resp-5 F-13": mc(signature=lambda s: sign(new_key(ES256), ES256, b"other")),
    "MC Resp-5 F-14": own_signature(),
    # packed, self
    "MC Resp-6 P-1": mc("packed-self"),
    "MC Resp-6 F-1": mc("packed-self", signature=changed),
    "MC Resp-6 F-2": mc(
        "packed-self", statement=statement(x5c=[ROOT.issue(new_key(ES256).public_key(), [])])
    ),
    "MC Resp-6 F-3": mc("packed-self", attestation_object=whole(fmt="unheard-of")),
    # none
    "MC Resp-7 P-1": mc("packed-self", policy={"attestation": "none"}),
    "MC Resp-7 P-2": mc(
        "packed-self", policy={"attestation": "none"}, device={"aaguid": bytes(16)}
    ),
    "MC Resp-7 F-1": mc(policy={"attestation": "none"}, attestation_object=whole(fmt="none")),
    # fido-u2f
    "MC Resp-8 P-1": mc("fido-u2f", aaguid=bytes(16)),
    "MC Resp-8 F-2": mc("fido-u2f", aaguid=bytes(16), signature=changed),
    # tpm
    "MC Resp-9 P-1": mc("tpm"),
    "MC Resp-9 P-2": mc("tpm", certificate={"rs1": True}),
    "MC Resp-9 P-3": tpm_of_sha384(),
    "MC Resp-9 F-1": mc("tpm", statement=lambda s: {**s, "x5c": [ROOT.der, *s["x5c"]]}),
    "MC Resp-9 F-2": mc("tpm", certificate={"extra": bytes(32)}),
    "MC Resp-9 F-3": mc("tpm", certificate={"magic": b"\xff\x54\x43\x00"}),
    "MC Resp-9 F-4": mc(
        "tpm", certificate={"pub_area": tpm_public_area(cose_key(new_key(ES256), ES256))}
    ),
    # android-key
    "MC Resp-A P-1": mc("android-key"),
    "MC Resp-A F-1": mc("android-key", certificate={"description": key_description(bytes(32))}),
    "MC Resp-A F-2": android_of_another_key,
    "MC Resp-A F-3": mc("android-key", statement=lambda s: {**s, "x5c": [ROOT.der, *s["x5c"]]}),
    # AuthenticationResponseJSON
    "GA Req-1 P-1": request,
    "GA Resp-1 P-1": ga(),
    "GA Resp-1 F-1": ga(wire=top(id=...)),
    "GA Resp-1 F-2": ga(wire=top(id=7)),
    "GA Resp-1 F-3": ga(wire=top(id="!?")),
    "GA Resp-1 F-4": ga(wire=top(type=...)),
    "GA Resp-1 F-5": ga(wire=top(type=7)),
    "GA Resp-1 F-6": ga(wire=top(type="publickey")),
    "GA Resp-1 F-7": ga(wire=top(response=...)),
    "GA Resp-1 F-8": ga(wire=top(response="x")),
    "GA Resp-1 F-9": ga(wire=inner(clientDataJSON=...)),
    "GA Resp-1 F-10": ga(wire=inner(clientDataJSON=7)),
    "GA Resp-1 F-11": ga(wire=inner(clientDataJSON="")),
    "GA Resp-1 F-12": ga(wire=inner(authenticatorData=...)),
    "GA Resp-1 F-13": ga(wire=inner(authenticatorData=7)),
    "GA Resp-1 F-14": ga(wire=inner(authenticatorData="!?")),
    "GA Resp-1 F-15": ga(wire=inner(authenticatorData="")),
    "GA Resp-1 F-16": ga(wire=inner(signature=...)),
    "GA Resp-1 F-17": ga(wire=inner(signature=7)),
    "GA Resp-1 F-18": ga(wire=inner(signature="!?")),
    "GA Resp-1 F-19": ga(wire=inner(signature="")),
    "GA Resp-1 F-20": ga(signature=changed),
    "GA Resp-1 F-21": ga(wire=inner(userHandle=7)),
    # authenticator data
    "GA Resp-3 P-1": ga(device={"counts": False}),
    "GA Resp-3 P-2": ga(),
    "GA Resp-3 P-3": ga(up=True, uv=True),
    "GA Resp-3 P-5": ga(policy={"user_verification": "discouraged"}, up=True, uv=False),
    "GA Resp-3 P-6": ga(policy={"user_verification": "discouraged"}, uv=True),
    "GA Resp-3 P-8": ga(extensions={"more": "x"}),
    "GA Resp-3 F-1": ga(auth_data=lambda d: d + b"\0"),
    "GA Resp-3 F-2": ga(auth_data=lambda d: hashlib.sha256(b"x").digest() + d[32:]),
    "GA Resp-3 F-3": ga(wire=inner(clientDataJSON=b64(client_data("webauthn.get", more=1)))),
    "GA Resp-3 F-4": ga(counter=1),
    "GA Resp-3 F-5": ga(uv=False),
}

# Client data is judged alike in both ceremonies: F-1 to F-17 of both "Resp-2". "other" stands for
# the other ceremony's type.
COLLECTED: list[dict[str, Any]] = [
    {"type": ...},
    {"type": 7},
    {"type": ""},
    {"type": "webauthn.unheard-of"},
    {"type": "other"},
    {"challenge": ...},
    {"challenge": 7},
    {"challenge": ""},
    {"challenge": "!?"},
    {"challenge": b64(bytes(32))},
    {"origin": ...},
    {"origin": 7},
    {"origin": ""},
    {"origin": "https://other.example"},
    {"tokenBinding": "present"},
    {"tokenBinding": {}},
    {"tokenBinding": {"status": "maybe"}},
]


def collected(kind: str, other: str) -> list[bytes]:
    """The client data of each case, for one kind of ceremony."""
    return [
        client_data(kind, **({"type": other} if members == {"type": "other"} else members))
        for members in COLLECTED
    ]


ROWS |= {
    f"MC Resp-2 F-{number}": mc(client_data_json=raw)
    for number, raw in enumerate(collected("webauthn.create", "webauthn.get"), 1)
}
ROWS |= {
    f"GA Resp-2 F-{number}": ga(client_data_json=raw)
    for number, raw in enumerate(collected("webauthn.get", "webauthn.create"), 1)
}

# Where we do the opposite of the item, on purpose.
DISAGREEMENTS: dict[str, Row] = {
    "MC Resp-5 F-10": mc(device={"authority": BELOW}, statement=chain(BELOW.der, ROOT.der)),
    "MC Resp-8 F-1": mc("fido-u2f", aaguid=b"\1" * 16),
    "GA Resp-3 P-4": ga(policy={"user_verification": "preferred"}, up=False, uv=False),
    "GA Resp-3 P-7": ga(policy={"user_verification": "discouraged"}, up=False, uv=False),
    "MC Resp-4 P-8": mc("packed-self", algorithm=RS256, key={3: -65535}),
    "MC Resp-B P-1": mc(attestation_object=whole(fmt="android-safetynet")),
}

# Judged where their subject lives: the challenge is made by the broker, so two begins are compared
# there.
ELSEWHERE = {"MC Req-1 P-3", "GA Req-1 P-2"}

NOT_APPLICABLE = {
    "MC Resp-3 F-16",
    *(f"MC Resp-4 P-{n}" for n in (1, 2, 3, 4, 6, 7)),
    "MC Resp-5 F-8",
    *(f"MC Resp-B F-{n}" for n in range(1, 8)),
    "MDS Resp-1 P-1",
    *(f"MDS Resp-1 F-{n}" for n in range(1, 7)),
}


def test_every_item_has_its_place() -> None:
    tables: list[set[str]] = [set(ROWS), set(DISAGREEMENTS), ELSEWHERE, NOT_APPLICABLE]
    assert set().union(*tables) == set(ITEMS)
    assert sum(map(len, tables)) == len(ITEMS) == 173


def test_the_readme_names_what_is_not_as_the_item_says() -> None:
    readme = (VECTORS / "README.md").read_text()
    for name in (*DISAGREEMENTS, *ELSEWHERE, *NOT_APPLICABLE):
        assert f"`{name}`" in readme, name


@pytest.mark.parametrize("name", [name for name in ROWS if ITEMS[name] == "accept"])
def test_accepted(name: str) -> None:
    assert ROWS[name]()


@pytest.mark.parametrize("name", [name for name in ROWS if ITEMS[name] == "reject"])
def test_rejected(name: str) -> None:
    with pytest.raises((CeremonyRefused, InvalidRequest)) as refused:
        ROWS[name]()
    assert refused.value.reason


@pytest.mark.parametrize("name", [name for name in DISAGREEMENTS if ITEMS[name] == "reject"])
def test_accepted_against_the_item(name: str) -> None:
    assert DISAGREEMENTS[name]()


REASONS_AGAINST = {
    "GA Resp-3 P-4": "user_presence",
    "GA Resp-3 P-7": "user_presence",
    "MC Resp-4 P-8": "algorithm",
    "MC Resp-B P-1": "attestation",
}


@pytest.mark.parametrize("name", [name for name in DISAGREEMENTS if ITEMS[name] == "accept"])
def test_rejected_against_the_item(name: str) -> None:
    with pytest.raises(CeremonyRefused) as refused:
        DISAGREEMENTS[name]()
    assert refused.value.reason == REASONS_AGAINST[name]
