"""Refusal reasons of a ceremony: the closed list that logs, metrics and events carry.

`refuse` makes the refusal, and `require` raises it unless a condition holds. Each reason has up to
three texts:

- `REASONS`: its meaning, for operators and for the documentation;
- `REMEDIES`: the policy key or command that lets the ceremony pass, for the log and keyed callers;
- `_SENTENCES`: what the person at the page can do.

`PARSER_FAULTS` lists the exceptions that py_webauthn and cryptography raise on malformed input. The
list comes from their sources and from the mutation tests, which fail on any other exception.
"""

from __future__ import annotations

from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from webauthn.helpers.exceptions import WebAuthnException

from broker.errors import CeremonyRefused, policy_hint

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
    "attachment": "platform or cross-platform, and the options (the page, or the policy "
    "`authenticator_attachment` or `second_factor_attachment`) asked for the other",
    "resident_key": "not discoverable (credProps.rk is false), and a passkey is",
    "not_offered": "a passkey that this ceremony does not allow, or of another user",
    "user_handle": "no user handle, or not the one registered",
    "signature": "the signature does not verify",
    "attestation": "the attestation statement does not verify or is of no supported format",
    "attestation_trust": "the attestation chain leads to none of the configured roots",
    "attestation_missing": "no attestation statement, "
    "and the policy `attestation_required` asks for one",
    "attestation_unverified": "self attestation or the like, "
    "and the policy `attestation_required` asks for a chain to a root",
    "counter": "the signature counter did not rise: the authenticator may be cloned",
}

# py_webauthn reads COSE keys unguarded, and cryptography checks numbers and certificates: both
# raise LookupError, TypeError and ValueError. The three of x509 are no ValueErrors.
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

_ELSEWHERE = (
    "Passkeys don't work on this page; open the site at its own address, in a tab of its own."
)
_UNUSABLE = "This device or security key can't be used here; use another one."
# Reasons that are not listed have the sentence of `CeremonyRefused`.
_SENTENCES: dict[Reason, str] = {
    "origin": _ELSEWHERE,
    "cross_origin": _ELSEWHERE,
    "top_origin": _ELSEWHERE,
    "user_presence": "The device did not notice you; "
    "try again and touch or unlock it when it asks.",
    "user_verification": "The device did not check that it is you; "
    "set up a PIN, fingerprint or face on it and try again.",
    "algorithm": _UNUSABLE,
    "public_key": _UNUSABLE,
    "attachment": "The site asked for another kind of authenticator; "
    "use a device that it asks for.",
    "resident_key": _UNUSABLE,
    "attestation": _UNUSABLE,
    "attestation_trust": _UNUSABLE,
    "attestation_missing": _UNUSABLE,
    "attestation_unverified": _UNUSABLE,
    "not_offered": "This passkey is not for this sign-in; choose another one.",
    "user_handle": "This passkey is not for this sign-in; choose another one.",
    "backup_eligibility": "This passkey can't be used any more; "
    "sign in another way and add a new one.",
    "counter": "This passkey can't be used any more; sign in another way and add a new one.",
}
REMEDIES: dict[Reason, str] = {
    "origin": "`broker app update --app A --add-origin ORIGIN` registers an origin.",
    "cross_origin": policy_hint("allow_cross_origin", "true"),
    "top_origin": policy_hint("top_origins", "ORIGIN"),
    "user_verification": policy_hint("user_verification", "preferred")
    + " For second factors it is second_factor_user_verification; "
    "a caller may have asked for more.",
    "algorithm": policy_hint("algorithms", "NAMES"),
    "attachment": policy_hint("authenticator_attachment", "any")
    + " For second factors it is second_factor_attachment; the page may have asked for one.",
    "attestation_trust": policy_hint("attestation_roots", "PEM"),
    "attestation_missing": policy_hint("attestation_required", "none"),
    "attestation_unverified": policy_hint("attestation_required", "any"),
    "counter": policy_hint("counter", "flag"),
}


def refuse(reason: Reason, detail: str) -> CeremonyRefused:
    """The refusal to raise. `detail` is a sentence of ours, for the log and keyed callers."""
    hint = f"{detail} {REMEDIES[reason]}" if reason in REMEDIES else detail
    return CeremonyRefused(_SENTENCES.get(reason), reason=reason, hint=hint)


def require(condition: bool, reason: Reason, detail: str) -> None:
    """Verify that a rule's condition holds.

    Raises:
        CeremonyRefused: with `reason` and `detail`, as `refuse`.
    """
    if not condition:
        raise refuse(reason, detail)
