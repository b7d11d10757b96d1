"""Attestation statements by the rules of WebAuthn L3 §8, and their trust: one row for each rule,
with the exact reason.

Every row misbehaves before signing, so the statement's signature is right and only the rule in
question is broken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID, ObjectIdentifier

from broker.ceremony import Reason, cose
from broker.ceremony.attestation import read_chain, read_der
from broker.ceremony.reasons import REASONS
from broker.errors import CeremonyRefused
from tests.support.authenticator import (
    ALL_APPLICATIONS,
    ED448,
    EDDSA,
    ES256,
    ES384,
    ES512,
    ORIGIN_GENERATED,
    PURPOSE_SIGN,
    RS256,
    Attestation,
    Authenticator,
    Authority,
    PrivateKey,
    cose_key,
    der,
    key_description,
    new_key,
    rsa_key,
    sign,
    tpm_public_area,
)
from tests.support.ceremonies import ORIGIN, creation_options, register, registered, relying_party

ROOT = Authority("Root")
BELOW = ROOT.intermediate()
STRANGER = Authority("Somebody else")
FORMATS: tuple[Attestation, ...] = ("packed", "fido-u2f", "android-key", "apple", "tpm")
EKP = "2.5.29."

Statement = dict[str, Any]


def made_by(form: Attestation, rp: Any, **how: Any) -> Any:
    device = Authenticator(attestation=form, authority=ROOT)
    return register(rp, device.register(creation_options(rp), ORIGIN, **how))


def without(*names: str) -> Callable[[Statement], Statement]:
    return lambda s: {k: v for k, v in s.items() if k not in names}


def having(**members: Any) -> Callable[[Statement], Statement]:
    return lambda s: {**s, **members}


def subject(**parts: str) -> dict[ObjectIdentifier, str]:
    whole = {"C": "SE", "O": "Test", "OU": "Authenticator Attestation", "CN": "Test"} | parts
    names = {
        "C": NameOID.COUNTRY_NAME,
        "O": NameOID.ORGANIZATION_NAME,
        "OU": NameOID.ORGANIZATIONAL_UNIT_NAME,
        "CN": NameOID.COMMON_NAME,
    }
    return {names[part]: text for part, text in whole.items() if text}


def changed(signature: bytes) -> bytes:
    return signature[:-1] + bytes([signature[-1] ^ 1])


ANDROID_OTHER = {"certificate": {"description": key_description(b"x" * 32)}}
IMPORTED = der(0xBF853E, der(0x02, b"\x02"))
DECRYPT = der(0xA1, der(0x31, der(0x02, b"\x01"), der(0x02, b"\x02")))


def android(software: bytes = b"", hardware: bytes | None = None) -> dict[str, Any]:
    """A key description with the right challenge: it is put in after the client data is known, by
    the certificate's maker.
    """
    return {"lists": (software, hardware)}


RULES: list[tuple[Attestation, str, dict[str, Any]]] = [
    # §8.2 packed, self attestation
    ("packed-self", "empty", {"statement": lambda s: {}}),
    ("packed-self", "no alg", {"statement": without("alg")}),
    ("packed-self", "no sig", {"statement": without("sig")}),
    ("packed-self", "alg is text", {"statement": having(alg="ES256")}),
    ("packed-self", "alg is true", {"statement": having(alg=True)}),
    ("packed-self", "sig is text", {"statement": having(sig="sig")}),
    ("packed-self", "sig is empty", {"statement": having(sig=b"")}),
    ("packed-self", "alg of another key", {"statement": having(alg=EDDSA)}),
    ("packed-self", "signature is wrong", {"signature": changed}),
    # §8.2 packed, with a certificate
    ("packed", "signature is wrong", {"signature": changed}),
    ("packed", "alg does not fit the certificate", {"statement": having(alg=RS256)}),
    ("packed", "alg unknown", {"statement": having(alg=-999)}),
    ("packed", "alg is SHA-1", {"statement": having(alg=-65535)}),
    ("packed", "x5c is missing", {"statement": without("x5c")}),
    ("packed", "x5c is empty", {"statement": having(x5c=[])}),
    ("packed", "x5c is a certificate", {"statement": having(x5c=ROOT.der)}),
    ("packed", "x5c is null", {"statement": having(x5c=None)}),
    ("packed", "x5c holds text", {"statement": having(x5c=["x"])}),
    ("packed", "x5c holds no certificate", {"statement": having(x5c=[b"x"])}),
    ("packed", "x5c is too long", {"statement": lambda s: {**s, "x5c": s["x5c"] * 9}}),
    ("packed", "x5c ends in no certificate", {"statement": lambda s: {**s, "x5c": [*s["x5c"], b"\x30\x00"]}}),
    ("packed", "x5c begins with the root", {"statement": lambda s: {**s, "x5c": [ROOT.der, *s["x5c"]]}}),
    ("packed", "certificate is an authority", {"certificate": {"ca": True}}),
    ("packed", "certificate without constraints", {"certificate": {"ca": None}}),
    ("packed", "certificate of another AAGUID", {"aaguid": bytes(16), "certificate": {"more": (
        "1.3.6.1.4.1.45724.1.1.4", der(4, b"x" * 16), False)}}),
    ("packed", "AAGUID extension is critical", {"certificate": {"more": (
        "1.3.6.1.4.1.45724.1.1.4", der(4, bytes.fromhex("b7d3f68e88a6471e9ecf2df26d041ede")), True)}}),
    ("packed", "subject without country", {"certificate": {"subject": subject(C="")}}),
    ("packed", "subject without organisation", {"certificate": {"subject": subject(O="")}}),
    ("packed", "subject of another unit", {"certificate": {"subject": subject(OU="Sales")}}),
    ("packed", "subject without name", {"certificate": {"subject": subject(CN="")}}),
    ("packed", "subject is empty", {"certificate": {"subject": {}}}),
    # §8.6 fido-u2f
    ("fido-u2f", "signature is wrong", {"signature": changed}),
    ("fido-u2f", "no sig", {"statement": without("sig")}),
    ("fido-u2f", "no x5c", {"statement": without("x5c")}),
    ("fido-u2f", "two certificates", {"statement": lambda s: {**s, "x5c": [*s["x5c"], ROOT.der]}}),
    ("fido-u2f", "certificate's key is RSA", {"statement": lambda s: {**s, "x5c": [
        ROOT.issue(rsa_key().public_key(), [])]}}),
    ("fido-u2f", "certificate's key is on P-384", {"statement": lambda s: {**s, "x5c": [
        ROOT.issue(ec.generate_private_key(ec.SECP384R1()).public_key(), [])]}}),
    # §8.4 android-key
    ("android-key", "signature is wrong", {"signature": changed}),
    ("android-key", "no alg", {"statement": without("alg")}),
    ("android-key", "another challenge", ANDROID_OTHER),
    ("android-key", "description is no DER", {"certificate": {"description": b"\x30\x05"}}),
    ("android-key", "description is empty", {"certificate": {"description": b""}}),
    ("android-key", "description of endless tag", {"certificate": {"description": b"\x3f\xff\xff"}}),
    ("android-key", "description is a number", {"certificate": {"description": der(2, b"\1")}}),
    ("android-key", "description is short", {"certificate": {"description": der(0x30, der(2, b"\1"))}}),
    ("android-key", "no description", {"certificate": {"drop": ("1.3.6.1.4.1.11129.2.1.17",)}}),
    ("android-key", "for all applications (software)", android(software=ALL_APPLICATIONS)),
    ("android-key", "for all applications (hardware)", android(hardware=PURPOSE_SIGN + ALL_APPLICATIONS)),
    ("android-key", "imported", android(hardware=PURPOSE_SIGN + IMPORTED)),
    ("android-key", "imported, says software", android(software=IMPORTED)),
    ("android-key", "decrypts too", android(hardware=DECRYPT + ORIGIN_GENERATED)),
    ("android-key", "lists are no DER", android(software=b"\xff")),
    # §8.8 apple
    ("apple", "no x5c", {"statement": without("x5c")}),
    ("apple", "another nonce", {"certificate": {"nonce": der(0x30, der(0xA1, der(4, bytes(32))))}}),
    ("apple", "nonce is empty", {"certificate": {"nonce": b""}}),
    ("apple", "no nonce", {"certificate": {"drop": ("1.2.840.113635.100.8.2",)}}),
    # §8.3 tpm
    ("tpm", "signature is wrong", {"signature": changed}),
    ("tpm", "ver is missing", {"statement": without("ver")}),
    ("tpm", "ver is 1.2", {"statement": having(ver="1.2")}),
    ("tpm", "no alg", {"statement": without("alg")}),
    ("tpm", "no sig", {"statement": without("sig")}),
    ("tpm", "no x5c", {"statement": without("x5c")}),
    ("tpm", "no pubArea", {"statement": without("pubArea")}),
    ("tpm", "no certInfo", {"statement": without("certInfo")}),
    ("tpm", "alg without a hash", {"statement": having(alg=EDDSA)}),
    ("tpm", "magic is wrong", {"certificate": {"magic": b"\xff\x54\x43\x48"}}),
    ("tpm", "a quote, no certification", {"certificate": {"kind": b"\x80\x18"}}),
    ("tpm", "another ceremony", {"certificate": {"extra": bytes(32)}}),
    ("tpm", "another name", {"certificate": {"name": b"\x00\x0b" + bytes(32)}}),
    ("tpm", "name of another hash", {"certificate": {"name": b"\x00\x0c" + bytes(32)}}),
    ("tpm", "area of another key", {"certificate": {"pub_area": tpm_public_area(
        cose_key(new_key(ES256), ES256))}}),
    ("tpm", "area of an RSA key", {"certificate": {"pub_area": tpm_public_area(
        cose_key(rsa_key(), RS256))}}),
    ("tpm", "area ends early", {"certificate": {"pub_area": b"\x00\x23\x00\x0b\x00"}}),
    ("tpm", "area of unknown name hash", {"certificate": {"pub_area": b"\x00\x23\x00\x12" + bytes(60)}}),
    ("tpm", "area is empty", {"statement": having(pubArea=b"")}),
    ("tpm", "area has a tail", {"area": lambda a: a + b"\0"}),
    ("tpm", "area of another curve", {"area": lambda a: a.replace(b"\x00\x10\x00\x03\x00\x10", b"\x00\x10\x00\x04\x00\x10")}),
    ("tpm", "info has a tail", {"statement": lambda s: {**s, "certInfo": s["certInfo"] + b"\0"}}),
    ("tpm", "info ends early", {"statement": lambda s: {**s, "certInfo": s["certInfo"][:20]}}),
    ("tpm", "certificate has a subject", {"certificate": {"subject": subject()}}),
    ("tpm", "certificate is an authority", {"certificate": {"ca": True}}),
    ("tpm", "certificate without constraints", {"certificate": {"ca": None}}),
    ("tpm", "certificate without alternative name", {"certificate": {"drop": (EKP + "17",)}}),
    ("tpm", "certificate without usage", {"certificate": {"drop": (EKP + "37",)}}),
    ("tpm", "certificate of other usage", {"certificate": {"usage": ["1.3.6.1.5.5.7.3.1"]}}),
    ("tpm", "manufacturer unknown", {"certificate": {"manufacturer": "id:00000000"}}),
    ("tpm", "manufacturer is missing", {"certificate": {"manufacturer": ""}}),
    ("tpm", "alternative name is a host", {"certificate": {"names": [x509.DNSName("tpm.example")]}}),
    ("tpm", "certificate of another AAGUID", {"certificate": {"more": (
        "1.3.6.1.4.1.45724.1.1.4", der(4, b"x" * 16), False)}}),
]  # fmt: skip


class Workshop(Authority):
    """An authority that can bend what it is asked to certify: another extension in place of, or
    beside, the asked ones.
    """

    def __init__(self, lists: tuple[bytes, bytes | None] | None) -> None:
        super().__init__("Workshop")
        self.lists = lists

    def issue(
        self,
        public_key: Any,
        extensions: list[tuple[x509.ExtensionType, bool]],
        *,
        more: tuple[str, bytes, bool] | None = None,
        **how: Any,
    ) -> bytes:
        if more:
            oid = ObjectIdentifier(more[0])
            extensions = [pair for pair in extensions if pair[0].oid != oid]
            extensions.append((x509.UnrecognizedExtension(oid, more[1]), more[2]))
        if self.lists:
            (old, critical), *_ = extensions
            assert isinstance(old, x509.UnrecognizedExtension)
            challenge = old.value[old.value.index(b"\x04\x20") + 2 :][:32]
            software, hardware = self.lists
            new = key_description(challenge, software=software, hardware=hardware)
            extensions = [(x509.UnrecognizedExtension(old.oid, new), critical)]
        return super().issue(public_key, extensions, **how)


def answer_of(form: Attestation, how: Mapping[str, Any], rp: Any) -> dict[str, Any]:
    how = dict(how)
    device = Authenticator(attestation=form, authority=Workshop(how.pop("lists", None)))
    if area := how.pop("area", None):
        key = new_key(ES256)
        how["private_key"] = key
        how["certificate"] = {"pub_area": area(tpm_public_area(cose_key(key, ES256)))}
    return device.register(creation_options(rp), ORIGIN, **how)


@pytest.mark.parametrize(("form", "how"), [pytest.param(f, h, id=f"{f}: {n}") for f, n, h in RULES])
def test_statement_rule(form: Attestation, how: dict[str, Any]) -> None:
    rp = relying_party(attestation="direct")
    with pytest.raises(CeremonyRefused) as refused:
        register(rp, answer_of(form, how, rp))
    assert refused.value.reason == "attestation"


def test_certificate_of_version_1() -> None:
    """Version and extensions cut out of the certificate: nobody checks its own signature where no
    roots are configured.
    """

    def first_version(statement: Statement) -> Statement:
        signed, *rest = read_der(read_der(statement["x5c"][0])[0][1])
        parts = [
            der(tag, content) for tag, content in read_der(signed[1]) if tag not in (0xA0, 0xA3)
        ]
        whole = der(0x30, der(0x30, *parts), *(der(tag, content) for tag, content in rest))
        assert x509.load_der_x509_certificate(whole).version is x509.Version.v1
        return {**statement, "x5c": [whole]}

    with pytest.raises(CeremonyRefused) as refused:
        made_by("packed", relying_party(attestation="direct"), statement=first_version)
    assert "version 3" in (refused.value.hint or "")
    assert refused.value.reason == "attestation"


@pytest.mark.parametrize("form", ["android-key", "apple"])
def test_certificate_of_another_key(form: Attestation) -> None:
    """The statement of one key's ceremony round another key: the certificate's signature and nonce
    are right, its key is not.
    """
    rp = relying_party(attestation="direct")
    other = new_key(ES256)

    class Swapped(Authority):
        def issue(self, public_key: Any, extensions: Any, **how: Any) -> bytes:
            return super().issue(other.public_key(), extensions, **how)

    device = Authenticator(attestation=form, authority=Swapped())
    with pytest.raises(CeremonyRefused) as refused:
        register(
            rp,
            device.register(creation_options(rp), ORIGIN),
        )
    assert refused.value.reason == "attestation"


def test_android_key_signed_by_the_certificates_key_alone() -> None:
    """As above, but the signature is the certificate's key's: only the comparison of keys is left
    to refuse it.
    """
    rp = relying_party(attestation="direct")
    other = new_key(ES256)
    seen: dict[str, bytes] = {}

    class Swapped(Authority):
        def issue(self, public_key: Any, extensions: Any, **how: Any) -> bytes:
            return super().issue(other.public_key(), extensions, **how)

    def keep(data: bytes) -> bytes:
        seen["data"] = data
        return data

    def resign(statement: Statement) -> Statement:
        challenge = x509.load_der_x509_certificate(statement["x5c"][0])
        raw = next(
            e.value for e in challenge.extensions if isinstance(e.value, x509.UnrecognizedExtension)
        )
        digest = raw.value[raw.value.index(b"\x04\x20") + 2 :][:32]
        return {**statement, "sig": sign(other, ES256, seen["data"] + digest)}

    device = Authenticator(attestation="android-key", authority=Swapped())
    with pytest.raises(CeremonyRefused) as refused:
        register(
            rp, device.register(creation_options(rp), ORIGIN, auth_data=keep, statement=resign)
        )
    assert "another key" in (refused.value.hint or "")
    assert refused.value.reason == "attestation"


def test_u2f_has_es256_keys_only() -> None:
    rp = relying_party(attestation="direct", algorithms=(ES512,))
    with pytest.raises(CeremonyRefused) as refused:
        made_by("fido-u2f", rp)
    assert "ES256" in (refused.value.hint or "")
    assert refused.value.reason == "attestation"


@pytest.mark.parametrize("form", ["packed-self", *FORMATS])
def test_members_that_a_format_does_not_know_are_ignored(form: Attestation) -> None:
    rp = relying_party(attestation="direct", attestation_roots=(ROOT.pem,))
    made = made_by(form, rp, statement=having(more=1))
    assert made.attestation_trust == ("claimed" if form == "packed-self" else "verified")


@pytest.mark.parametrize(
    "lists", [(b"", b""), (PURPOSE_SIGN + ORIGIN_GENERATED, b""), (b"", PURPOSE_SIGN)]
)
def test_android_lists_that_say_less(lists: tuple[bytes, bytes]) -> None:
    rp = relying_party(attestation="direct")
    made = register(rp, answer_of("android-key", {"lists": lists}, rp))
    assert made.attestation_format == "android-key"


@pytest.mark.parametrize("code", [b"\x00\x04", b"\x00\x0c", b"\x00\x0d"])
def test_tpm_names_of_other_hashes(code: bytes) -> None:
    key = new_key(ES256)
    area = bytearray(tpm_public_area(cose_key(key, ES256)))
    area[2:4] = code
    digest = {
        b"\x00\x04": hashes.SHA1(),
        b"\x00\x0c": hashes.SHA384(),
        b"\x00\x0d": hashes.SHA512(),
    }[code]
    name = code + hashlib.new(digest.name, area).digest()
    rp = relying_party(attestation="direct")
    made = made_by("tpm", rp, private_key=key, certificate={"pub_area": bytes(area), "name": name})
    assert made.attestation_trust == "claimed"


def test_tpm_area_with_schemes_and_several_usages() -> None:
    key = new_key(ES256)
    cose = cose_key(key, ES256)
    point = b"\x00\x20" + cose[-2] + b"\x00\x20" + cose[-3]
    head = b"\x00\x23\x00\x0b\x00\x06\x04\x72\x00\x02pp"
    area = (
        head
        + b"\x00\x06\x00\x80\x00\x43"
        + b"\x00\x18\x00\x0b"
        + b"\x00\x03"
        + b"\x00\x20\x00\x0b"
        + point
    )
    rp = relying_party(attestation="direct")
    how = {"pub_area": area, "usage": ["1.3.6.1.5.5.7.3.2", "2.23.133.8.3"]}
    assert made_by("tpm", rp, private_key=key, certificate=how).attestation_format == "tpm"


# Trust.


@pytest.mark.parametrize("form", FORMATS)
def test_trust_by_roots(form: Attestation) -> None:
    none = relying_party(attestation="direct")
    right = relying_party(attestation="direct", attestation_roots=(STRANGER.pem, ROOT.pem))
    wrong = relying_party(attestation="direct", attestation_roots=(STRANGER.pem,))
    unasked = relying_party(attestation="none", attestation_roots=(STRANGER.pem,))
    assert made_by(form, none).attestation_trust == "claimed"
    assert made_by(form, right).attestation_trust == "verified"
    assert made_by(form, unasked).attestation_trust == "claimed"
    with pytest.raises(CeremonyRefused) as refused:
        made_by(form, wrong)
    assert refused.value.reason == "attestation_trust"


def test_statements_without_a_chain_pass_where_roots_are_configured() -> None:
    rp = relying_party(attestation="direct", attestation_roots=(ROOT.pem,))
    assert made_by("none", rp).attestation_trust == "none"
    assert made_by("packed-self", rp).attestation_trust == "claimed"


def with_chain(*more: bytes) -> Callable[[Statement], Statement]:
    return lambda s: {**s, "x5c": [*s["x5c"], *more]}


NOT_CA = ROOT.intermediate("No authority", ca=False)

CHAINS: list[tuple[str, Authority, dict[str, Any], bool]] = [
    ("leaf", ROOT, {}, True),
    ("leaf and root", ROOT, {"statement": with_chain(ROOT.der)}, True),
    ("leaf and intermediate", BELOW, {"statement": with_chain(BELOW.der)}, True),
    ("leaf, intermediate, root", BELOW, {"statement": with_chain(BELOW.der, ROOT.der)}, True),
    ("leaf and a stranger", ROOT, {"statement": with_chain(STRANGER.der)}, True),
    ("intermediate is missing", BELOW, {}, False),
    ("intermediate of another", BELOW, {"statement": with_chain(STRANGER.der)}, False),
    ("intermediate is no authority", NOT_CA, {"statement": with_chain(NOT_CA.der)}, False),
    ("of a stranger", STRANGER, {"statement": with_chain(STRANGER.der)}, False),
    ("of a namesake", Authority("Root"), {}, False),
    ("expired", ROOT, {"certificate": {"years": (2020, 2025)}}, False),
    ("not yet valid", ROOT, {"certificate": {"years": (2027, 2060)}}, False),
]


@pytest.mark.parametrize(
    ("authority", "how", "good"), [pytest.param(a, h, g, id=n) for n, a, h, g in CHAINS]
)
def test_chain(authority: Authority, how: dict[str, Any], good: bool) -> None:
    """Judged at the time when the ceremony began, not by the machine's clock."""
    rp = relying_party(attestation="direct", attestation_roots=(ROOT.pem,))
    answer = Authenticator(attestation="packed", authority=authority).register(
        creation_options(rp), ORIGIN, **how
    )
    if good:
        assert register(rp, answer).attestation_trust == "verified"
        return
    with pytest.raises(CeremonyRefused) as refused:
        register(rp, answer)
    assert refused.value.reason == "attestation_trust"


def test_a_root_that_is_no_certificate_trusts_nobody() -> None:
    pem = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"
    rp = relying_party(attestation="direct", attestation_roots=(pem,))
    with pytest.raises(CeremonyRefused) as refused:
        made_by("packed", rp)
    assert refused.value.reason == "attestation_trust"


def test_sha1_of_a_tpm_is_never_more_than_claimed() -> None:
    rp = relying_party(attestation="direct", attestation_roots=(ROOT.pem,))
    assert made_by("tpm", rp, certificate={"rs1": True}).attestation_trust == "claimed"
    assert made_by("tpm", rp).attestation_trust == "verified"


# Keys.

P256, P384, P521 = new_key(ES256), new_key(ES384), new_key(ES512)
COMPRESSED: dict[int, Any] = {-3: True}
N = cose_key(rsa_key(), RS256)[-1]
SMALL = cose_key(rsa_key(2, 1024), RS256)[-1]

KEYS: list[tuple[str, int, dict[Any, Any], Reason]] = [
    ("no kty", ES256, {1: None}, "public_key"),
    ("other kty", ES256, {1: 1}, "public_key"),
    ("kty is text", ES256, {1: "EC2"}, "public_key"),
    ("kty is a float", ES256, {1: 2.0}, "public_key"),
    ("no crv", ES256, {-1: None}, "public_key"),
    ("other crv", ES256, {-1: 2}, "public_key"),
    ("crv is true", ES256, {-1: True}, "public_key"),
    ("no x", ES256, {-2: None}, "public_key"),
    ("x is a number", ES256, {-2: 5}, "public_key"),
    ("x is short", ES256, {-2: bytes(31)}, "public_key"),
    ("x is long", ES256, {-2: bytes(33)}, "public_key"),
    ("no y", ES256, {-3: None}, "public_key"),
    ("compressed", ES256, COMPRESSED, "public_key"),
    ("point at zero", ES256, {-2: bytes(32), -3: bytes(32)}, "public_key"),
    ("off the curve", ES256, {-3: b"\1" * 32}, "public_key"),
    ("beyond the field", ES256, {-2: b"\xff" * 32, -3: b"\xff" * 32}, "public_key"),
    ("a private key in it", ES256, {-4: bytes(32)}, "public_key"),
    ("a key id in it", ES256, {2: b"kid"}, "public_key"),
    ("a text member", ES256, {"x": 1}, "public_key"),
    ("P-256 as ES384", ES256, {3: ES384}, "public_key"),
    ("P-256 as EdDSA", ES256, {3: EDDSA}, "public_key"),
    ("P-256 as RS256", ES256, {3: RS256}, "public_key"),
    ("P-384 as ES256", ES384, {3: ES256}, "public_key"),
    ("P-521 as ES384", ES512, {3: ES384, -1: 2}, "public_key"),
    ("Ed25519 of 31 bytes", EDDSA, {-2: bytes(31)}, "public_key"),
    ("Ed25519 as text", EDDSA, {-2: "x" * 32}, "public_key"),
    ("Ed25519 on X25519", EDDSA, {-1: 4}, "public_key"),
    ("Ed25519 as Ed448", EDDSA, {3: ED448}, "public_key"),
    ("Ed448 as EdDSA", ED448, {3: EDDSA}, "public_key"),
    ("RSA without n", RS256, {-1: None}, "public_key"),
    ("RSA n is empty", RS256, {-1: b""}, "public_key"),
    ("RSA n is a number", RS256, {-1: 5}, "public_key"),
    ("RSA n with a zero before", RS256, {-1: b"\0" + N}, "public_key"),
    ("RSA n is even", RS256, {-1: N[:-1] + b"\0"}, "public_key"),
    ("RSA of 1024 bits", RS256, {-1: SMALL}, "public_key"),
    ("RSA of 8200 bits", RS256, {-1: b"\xff" * 1025}, "public_key"),
    ("RSA e is empty", RS256, {-2: b""}, "public_key"),
    ("RSA e is one", RS256, {-2: b"\1"}, "public_key"),
    ("RSA e is even", RS256, {-2: b"\1\0\0"}, "public_key"),
    ("RSA e is huge", RS256, {-2: b"\1" * 5}, "public_key"),
    ("RSA e is text", RS256, {-2: "AQAB"}, "public_key"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("algorithm", "change", "reason"), [pytest.param(a, c, r, id=n) for n, a, c, r in KEYS]
)
def test_public_key_rule(algorithm: int, change: dict[Any, Any], reason: Reason) -> None:
    rp = relying_party(algorithms=tuple({ES256, EDDSA, RS256, ES384, ES512, ED448}))
    answer = Authenticator().register(creation_options(rp), ORIGIN, algorithm=algorithm, key=change)
    with pytest.raises(CeremonyRefused) as refused:
        register(rp, answer)
    assert refused.value.reason == reason
    assert reason in REASONS


def test_a_public_key_that_is_no_map() -> None:
    rp = relying_party()

    def as_list(data: bytes) -> bytes:
        return data[: 37 + 16 + 2 + 32] + b"\x80"

    answer = Authenticator().register(creation_options(rp), ORIGIN, auth_data=as_list)
    with pytest.raises(CeremonyRefused) as refused:
        register(rp, answer)
    assert refused.value.reason == "public_key"


@pytest.mark.parametrize(
    "raw", [b"", b"\x80", b"\xa0", b"\xa1\x03\x00", b"\xa1\x03\xf5", b"\xa1\x03\x26"]
)
def test_a_stored_key_that_is_none(raw: bytes) -> None:
    with pytest.raises(CeremonyRefused) as refused:
        cose.load_stored(raw)
    assert refused.value.reason in ("malformed", "public_key", "algorithm")


PRIVATE: dict[int, PrivateKey] = {a: new_key(a) for a in (ES256, EDDSA, RS256, ES384, ES512, ED448)}


@pytest.mark.parametrize("algorithm", PRIVATE)
def test_verify_binds_key_to_algorithm(algorithm: int) -> None:
    private = PRIVATE[algorithm]
    signature = sign(private, algorithm, b"data")
    assert cose.verify(private.public_key(), algorithm, signature, b"data")
    assert not cose.verify(private.public_key(), algorithm, signature, b"other")
    for other in {*PRIVATE, -258, -259, -65535, -999} - {algorithm}:
        assert not cose.verify(private.public_key(), other, signature, b"data")


def test_registered_keys_are_kept_byte_for_byte() -> None:
    rp = relying_party()
    made, device = registered(rp)
    held = device.credentials("example.com")[0]
    assert cose.load_stored(made.public_key) == held.key.public_key()


def test_a_chain_that_would_keep_us_busy_is_refused() -> None:
    """A stranger's certificates are verified in the event loop, so their number and their keys are
    bounded.
    """
    authority = Authority()
    small = ec.generate_private_key(ec.SECP256R1()).public_key()
    leaf = authority.issue(small, [])
    for chain in ([leaf, leaf], [leaf, *(authority.issue(small, []) for _ in range(4))]):
        with pytest.raises(CeremonyRefused) as refusal:
            read_chain({"x5c": chain})
        assert refusal.value.reason == "attestation"
    huge = rsa.RSAPublicNumbers(65537, (1 << 4200) + 1).public_key()
    with pytest.raises(CeremonyRefused) as refusal:
        read_chain({"x5c": [leaf, authority.issue(huge, [])]})
    assert refusal.value.reason == "attestation"
    assert len(read_chain({"x5c": [leaf, authority.der]})[1]) == 1
