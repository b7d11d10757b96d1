"""The W3C's own 15 registration and authentication pairs (Web Authentication Level 3, "Test
Vectors"): 15 of 15 verify.

Each pair is judged as a browser's answer would be: form, registration, authentication with what the
registration recorded. User verification is "preferred" (several pairs lack UV) and every counter is
0. The two cross-origin pairs are refused by default and accepted by policy. The data's TPM is made
up (manufacturer id:00000000): only here is it a known one.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cbor2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from broker.ceremony import (
    finish_authentication,
    finish_registration,
    parse_authentication,
    parse_registration,
)
from broker.ceremony.tpm import MANUFACTURERS
from broker.errors import CeremonyRefused
from broker.model import (
    ALGORITHMS,
    Policy,
    RelyingParty,
    VerifiedAuthentication,
    VerifiedRegistration,
)
from tests.support.authenticator import b64
from tests.support.ceremonies import credential_of, pending_authentication, pending_registration

DATA = json.loads((Path(__file__).parent / "vectors" / "w3c-webauthn-l3.json").read_text())
PAIRS = {vector["id"]: vector for vector in DATA["vectors"]}
ROOT = (
    x509.load_der_x509_certificate(bytes.fromhex(DATA["attestation_root"]["attestation_ca_cert"]))
    .public_bytes(Encoding.PEM)
    .decode()
)
CROSS_ORIGIN = {"none-es256-crossOrigin", "none-es256-topOrigin"}
OPEN = Policy(
    user_verification="preferred",
    algorithms=tuple(ALGORITHMS),
    allow_cross_origin=True,
    top_origins=("https://example.com",),
)
MADE_UP_TPM = MANUFACTURERS | {"id:00000000"}


def relying_party(policy: Policy) -> RelyingParty:
    return RelyingParty(
        "app", "W3C", DATA["context"]["rp_id"], (DATA["context"]["origin"],), policy=policy
    )


def register(pair: dict[str, Any], policy: Policy, **more: Any) -> VerifiedRegistration:
    given = pair["registration"]
    id_ = b64(bytes.fromhex(given["credential_id"]))
    answer = parse_registration(
        {
            "id": id_,
            "rawId": id_,
            "type": "public-key",
            "response": {
                "clientDataJSON": b64(bytes.fromhex(given["clientDataJSON"])),
                "attestationObject": b64(bytes.fromhex(given["attestationObject"])),
            },
        }
    )
    rp = relying_party(policy)
    pending = pending_registration(rp, challenge=bytes.fromhex(given["challenge"]))
    return finish_registration(pending, rp, answer, **{"tpm_manufacturers": MADE_UP_TPM, **more})


def authenticate(
    pair: dict[str, Any], made: VerifiedRegistration, policy: Policy
) -> VerifiedAuthentication:
    given = pair["authentication"]
    id_ = b64(made.credential_id)
    answer = parse_authentication(
        {
            "id": id_,
            "rawId": id_,
            "type": "public-key",
            "response": {
                "clientDataJSON": b64(bytes.fromhex(given["clientDataJSON"])),
                "authenticatorData": b64(bytes.fromhex(given["authenticatorData"])),
                "signature": b64(bytes.fromhex(given["signature"])),
            },
        }
    )
    rp = relying_party(policy)
    credential = credential_of(made, rp)
    pending = pending_authentication(rp, credential, challenge=bytes.fromhex(given["challenge"]))
    return finish_authentication(pending, rp, credential, answer)


def test_all_fifteen_are_here() -> None:
    assert len(PAIRS) == 15


@pytest.mark.parametrize("name", PAIRS)
def test_pair_verifies(name: str) -> None:
    pair = PAIRS[name]
    made = register(pair, OPEN)
    assert made.credential_id.hex() == pair["registration"]["credential_id"]
    assert made.aaguid.replace("-", "") == pair["registration"]["aaguid"]
    assert made.sign_count == 0
    assert made.attestation_trust == ("none" if name.startswith("none") else "claimed")

    seen = authenticate(pair, made, OPEN)
    assert (seen.sign_count, seen.counter_regressed) == (0, False)
    assert seen.origin == "https://example.org"
    assert seen.backup_changed == (seen.backed_up != made.backed_up)


@pytest.mark.parametrize("name", PAIRS)
def test_chain_leads_to_the_given_root(name: str) -> None:
    trust = {"none": "none", "packed-self-es256": "claimed"}.get(
        name if name.startswith("packed-self") else name.split("-")[0], "verified"
    )
    with_root = replace(OPEN, attestation="direct", attestation_roots=(ROOT,))
    assert register(PAIRS[name], with_root).attestation_trust == trust


@pytest.mark.parametrize("name", sorted(CROSS_ORIGIN))
def test_cross_origin_is_refused_by_default(name: str) -> None:
    strict = replace(OPEN, allow_cross_origin=False)
    with pytest.raises(CeremonyRefused) as registration:
        register(PAIRS[name], strict)
    made = register(PAIRS[name], OPEN)
    with pytest.raises(CeremonyRefused) as authentication:
        authenticate(PAIRS[name], made, strict)
    assert (registration.value.reason, authentication.value.reason) == (
        "cross_origin",
        "cross_origin",
    )


@pytest.mark.parametrize("listed", [(), ("https://example.com:443",), ("https://example.net",)])
def test_top_origin_must_be_listed_exactly(listed: tuple[str, ...]) -> None:
    pair, policy = PAIRS["none-es256-topOrigin"], replace(OPEN, top_origins=listed)
    made = register(pair, OPEN)
    with pytest.raises(CeremonyRefused) as registration:
        register(pair, policy)
    with pytest.raises(CeremonyRefused) as authentication:
        authenticate(pair, made, policy)
    assert (registration.value.reason, authentication.value.reason) == ("top_origin", "top_origin")


def test_a_made_up_tpm_is_unknown_outside_of_this_file() -> None:
    with pytest.raises(CeremonyRefused) as refused:
        register(PAIRS["tpm-es256"], OPEN, tpm_manufacturers=MANUFACTURERS)
    assert refused.value.reason == "attestation"


def test_the_u2f_pair_has_an_aaguid_that_is_not_zero() -> None:
    """L3 §8.6 asks nothing of it, so it is accepted; FIDO's item Resp-8 F-1 would have it
    refused.
    """
    assert register(PAIRS["fido-u2f-es256"], OPEN).aaguid != "00000000-0000-0000-0000-000000000000"


@pytest.mark.parametrize("name", [n for n in PAIRS if n not in CROSS_ORIGIN])
def test_every_pair_is_bound_to_its_challenge(name: str) -> None:
    other = {**PAIRS[name]["registration"], "challenge": "00" * 32}
    with pytest.raises(CeremonyRefused) as refused:
        register({"registration": other}, OPEN)
    assert refused.value.reason == "challenge"


@pytest.mark.parametrize("name", PAIRS)
def test_every_signature_counts(name: str) -> None:
    """One bit of each pair's signature turned: refused, in both ceremonies."""
    pair = PAIRS[name]
    made = register(pair, OPEN)
    turned = bytearray.fromhex(pair["authentication"]["signature"])
    turned[-1] ^= 1
    with pytest.raises(CeremonyRefused) as refused:
        authenticate(
            {"authentication": {**pair["authentication"], "signature": turned.hex()}}, made, OPEN
        )
    assert refused.value.reason == "signature"
    whole = cbor2.loads(bytes.fromhex(pair["registration"]["attestationObject"]))
    if "sig" in whole["attStmt"]:
        signature = bytearray(whole["attStmt"]["sig"])
        signature[-1] ^= 1
        whole["attStmt"]["sig"] = bytes(signature)
        with pytest.raises(CeremonyRefused) as refused:
            register(
                {
                    "registration": {
                        **pair["registration"],
                        "attestationObject": cbor2.dumps(whole).hex(),
                    }
                },
                OPEN,
            )
        assert refused.value.reason == "attestation"
