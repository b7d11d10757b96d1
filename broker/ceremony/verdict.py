"""Why a ceremony is refused: the bounded words that logs, metrics and events carry, and the exceptions that third-party parsers raise.

`refuse` makes the refusal; the type of its first argument keeps the list closed. `PARSER_FAULTS` is the one place that names
what py_webauthn and cryptography can raise on bytes of a stranger: found by reading their sources and by the mutation tests,
which fail on any other exception.
"""

from __future__ import annotations

from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from webauthn.helpers.exceptions import WebAuthnException

from broker.errors import CeremonyRefused

Reason = Literal[
    "malformed",
    "type",
    "challenge",
    "origin",
    "cross_origin",
    "top_origin",
    "rp_id",
    "user_presence",
    "user_verification",
    "backup_flags",
    "backup_eligibility",
    "public_key",
    "algorithm",
    "credential_id",
    "attachment",
    "resident_key",
    "not_offered",
    "user_handle",
    "signature",
    "attestation",
    "attestation_trust",
    "attestation_missing",
    "attestation_unverified",
    "counter",
]

# Every reason that `finish_registration` and `finish_authentication` give, and what it tells an operator.
REASONS: dict[Reason, str] = {
    "malformed": "client data, authenticator data or attestation object can't be read",
    "type": "client data is of the other ceremony",
    "challenge": "another challenge than the one sent",
    "origin": "an origin that the app does not list",
    "cross_origin": "inside a cross-origin iframe, which the policy does not allow",
    "top_origin": "embedded by a page that the policy does not list",
    "rp_id": "made for another RP ID",
    "user_presence": "the user was not present",
    "user_verification": "the user was not verified and the policy requires it",
    "backup_flags": "backed up without being eligible for backup",
    "backup_eligibility": "backup eligibility differs from the one registered",
    "public_key": "the public key is malformed, weak or not on its curve",
    "algorithm": "an algorithm that was not offered",
    "credential_id": "the credential id is too long or not the one answered",
    "attachment": "platform or cross-platform, and the options (the page, or the policy `authenticator_attachment` or "
    "`second_factor_attachment`) asked for the other",
    "resident_key": "not discoverable (credProps.rk is false), and a passkey is",
    "not_offered": "a passkey that this ceremony does not allow, or of another user",
    "user_handle": "no user handle, or not the one registered",
    "signature": "the signature does not verify",
    "attestation": "the attestation statement does not verify or is of no supported format",
    "attestation_trust": "the attestation chain leads to none of the configured roots",
    "attestation_missing": "no attestation statement, and the policy `attestation_required` asks for one",
    "attestation_unverified": "self attestation or the like, and the policy `attestation_required` asks for a chain to a root",
    "counter": "the signature counter did not rise: the authenticator may be cloned",
}

# LookupError, TypeError and ValueError come from webauthn's unguarded reads of COSE keys and from cryptography's number and
# certificate checks; the x509 three are not ValueErrors.
PARSER_FAULTS = (
    WebAuthnException,
    InvalidSignature,
    UnsupportedAlgorithm,
    LookupError,
    TypeError,
    ValueError,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


def refuse(reason: Reason, sentence: str) -> CeremonyRefused:
    """The refusal to raise: `reason` for the operator, `sentence` for the developer who reads the answer."""
    return CeremonyRefused(sentence, reason=reason)
