"""Finish of a registration and of an authentication: the rules of WebAuthn L3 §7.1 and §7.2.

The functions are pure: the pending ceremony, the relying party and the stored credential are
arguments. Each kind of pending ceremony has a type of its own, so a registration can't be finished
as an authentication. The signature is verified last: an earlier rule that fails names its own
reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Set

from webauthn import verify_authentication_response, verify_registration_response
from webauthn.helpers.cose import COSEAlgorithmIdentifier
from webauthn.helpers.exceptions import InvalidAuthenticationResponse
from webauthn.helpers.structs import (
    AuthenticationCredential,
    AuthenticatorAssertionResponse,
    AuthenticatorAttestationResponse,
    RegistrationCredential,
)

from broker.ceremony import attestation, cbor, cose
from broker.ceremony.attestation import Chain, VerificationInputs
from broker.ceremony.authenticator_data import (
    AT,
    BE,
    BS,
    UP,
    UV,
    AuthenticatorData,
    judge_authenticator_data,
    read_authenticator_data,
)
from broker.ceremony.client_data import CREATE, GET, judge_client_data
from broker.ceremony.identity import user_handle_matches
from broker.ceremony.reasons import PARSER_FAULTS, refuse, require
from broker.ceremony.tpm import MANUFACTURERS, tpm
from broker.model import (
    ANYONE,
    AllowedCredential,
    AuthenticationAnswer,
    Credential,
    PendingAuthentication,
    PendingRegistration,
    Policy,
    RegistrationAnswer,
    RelyingParty,
    Trust,
    VerifiedAuthentication,
    VerifiedRegistration,
    base64url,
)


def finish_registration(
    pending: PendingRegistration,
    rp: RelyingParty,
    answer: RegistrationAnswer,
    *,
    tpm_manufacturers: Set[str] = MANUFACTURERS,
) -> VerifiedRegistration:
    """Verify a registration (WebAuthn L3 §7.1). Tests with made-up TPMs pass `tpm_manufacturers`.

    Raises:
        CeremonyRefused: with one of `REASONS`; no other exception, whatever the answer holds.
    """
    origin = judge_client_data(
        answer.client_data_json, kind=CREATE, challenge=pending.challenge, rp=rp
    )
    # WebAuthn L3 §7.1 "Perform CBOR decoding on the attestationObject field"
    whole = cbor.read_all(answer.attestation_object)
    if not isinstance(whole, dict):
        raise refuse("malformed", "The attestation object is not a CBOR map.")
    form, statement, raw = whole.get("fmt"), whole.get("attStmt"), whole.get("authData")
    if not isinstance(form, str) or not isinstance(statement, dict) or not isinstance(raw, bytes):
        raise refuse("malformed", "The attestation object lacks fmt, attStmt or authData.")
    data = read_authenticator_data(raw)
    judge_authenticator_data(
        data,
        rp_id=rp.rp_id,
        verification=pending.user_verification,
        presence=_needs_presence(pending),
    )
    credential = data.attested
    if credential is None:
        raise refuse("malformed", "The authenticator data holds no credential.")
    require(
        credential.credential_id == answer.credential_id,
        "credential_id",
        "The credential id is not the one in the authenticator data.",
    )
    algorithm = credential.members.get(3)
    # §7.1 "Verify that the alg parameter in the credential public key in authData matches the alg
    # attribute of one of the items"
    if type(algorithm) is not int or algorithm not in pending.algorithms:
        raise refuse("algorithm", "The public key is of an algorithm that was not offered.")
    _judge_selection(pending, answer)
    inputs = VerificationInputs(
        statement,
        data,
        credential,
        cose.load(credential.members),
        hashlib.sha256(answer.client_data_json).digest(),
        tpm_manufacturers,
    )
    trust = _judge_statement(form, inputs, rp.policy, pending.begun_at)
    if algorithm in cose.PY_WEBAUTHN_ALGORITHMS and (
        form == "none" or set(statement) == {"alg", "sig"}
    ):
        _verify_registration_again(pending, rp, answer)
    return VerifiedRegistration(
        credential_id=credential.credential_id,
        public_key=credential.public_key,
        algorithm=algorithm,
        sign_count=data.sign_count,
        user_present=data.has(UP),
        user_verified=data.has(UV),
        backup_eligible=data.has(BE),
        backed_up=data.has(BS),
        transports=answer.transports,
        attachment=answer.attachment,
        aaguid=credential.aaguid_text,
        attestation_format=form,
        attestation_trust=trust,
        origin=origin,
    )


def _needs_presence(pending: PendingRegistration) -> bool:
    """True unless the caller permitted conditional create, which has no prompt."""
    return pending.options.mediation != "conditional"


def _judge_selection(pending: PendingRegistration, answer: RegistrationAnswer) -> None:
    """Compare the answer with `authenticatorSelection` of the options.

    A member that the answer lacks passes: no signature covers it, and many SDKs leave it out.
    """
    # WebAuthn L3 §5.4.4 "authenticatorAttachment: If this member is present, eligible
    # authenticators are filtered to be only those"
    require(
        pending.attachment is None or answer.attachment in (None, pending.attachment),
        "attachment",
        f"The options ask for a {pending.attachment} authenticator; this one is another.",
    )
    # §5.4.6 "required: The Relying Party requires a client-side discoverable credential", §10.1.3
    # "rk"
    require(
        not pending.discoverable or answer.resident_key is not False,
        "resident_key",
        "The authenticator made no discoverable credential; use another authenticator.",
    )


def _judge_statement(
    form: str, inputs: VerificationInputs, policy: Policy, begun_at: float
) -> Trust:
    """Verify the attestation statement, then apply the policy's `attestation_required`.

    §7.1 "Verify that attStmt is a correct attestation statement, conveying a valid attestation
    signature"; "assess the attestation trustworthiness".
    """
    trust = _trust_of_statement(form, inputs, policy, begun_at)
    require(
        policy.attestation_required == "none" or trust != "none",
        "attestation_missing",
        "The authenticator does not say what it is, and the app requires that.",
    )
    require(
        policy.attestation_required != "verified" or trust == "verified",
        "attestation_unverified",
        "The attestation leads to no root, and the app requires one; use another authenticator.",
    )
    return trust


_VERIFIERS: dict[str, Callable[[VerificationInputs], Chain | None]] = {
    "packed": attestation.packed,
    "fido-u2f": attestation.fido_u2f,
    "android-key": attestation.android_key,
    "apple": attestation.apple,
    "tpm": tpm,
}


def _trust_of_statement(
    form: str, inputs: VerificationInputs, policy: Policy, begun_at: float
) -> Trust:
    if form == "none":
        require(
            not inputs.statement, "attestation", 'An attestation of format "none" has a statement.'
        )
        return "none"
    if form not in _VERIFIERS:
        raise refuse("attestation", "The attestation is of a format that is not supported.")
    chain = _VERIFIERS[form](inputs)
    if chain is None:
        return "claimed"
    trust = attestation.chain_trust(*chain, policy, begun_at)
    return "claimed" if inputs.statement.get("alg") == cose.RS1 else trust


def _verify_registration_again(
    pending: PendingRegistration, rp: RelyingParty, answer: RegistrationAnswer
) -> None:
    """Verify again, by py_webauthn, what needs no certificate: "none" and self attestation."""
    try:
        verify_registration_response(
            credential=RegistrationCredential(
                id=base64url(answer.credential_id),
                raw_id=answer.credential_id,
                response=AuthenticatorAttestationResponse(
                    client_data_json=answer.client_data_json,
                    attestation_object=answer.attestation_object,
                ),
            ),
            expected_challenge=pending.challenge,
            expected_rp_id=rp.rp_id,
            expected_origin=list(rp.accepted_origins),
            require_user_presence=_needs_presence(pending),
            require_user_verification=pending.user_verification == "required",
            supported_pub_key_algs=[
                COSEAlgorithmIdentifier(a)
                for a in pending.algorithms
                if a in cose.PY_WEBAUTHN_ALGORITHMS
            ],
        )
    except PARSER_FAULTS:
        raise refuse("attestation", "The registration does not verify.") from None


def finish_authentication(
    pending: PendingAuthentication,
    rp: RelyingParty,
    credential: Credential | AllowedCredential,
    answer: AuthenticationAnswer,
) -> VerifiedAuthentication:
    """Verify an authentication with the stored `credential` that the answer names (WebAuthn L3
    §7.2).

    Raises:
        CeremonyRefused: with one of `REASONS`; no other exception, whatever the answer or the
            stored key holds.
    """
    _judge_owner(pending, credential, answer)
    origin = judge_client_data(
        answer.client_data_json, kind=GET, challenge=pending.challenge, rp=rp
    )
    data = read_authenticator_data(answer.authenticator_data)
    # WebAuthn L3 §6.1 "For assertion signatures, the AT flag MUST NOT be set and the
    # attestedCredentialData MUST NOT be included"
    require(
        not data.has(AT), "malformed", "The authenticator data of a sign-in holds a credential."
    )
    judge_authenticator_data(data, rp_id=rp.rp_id, verification=pending.user_verification)
    # §7.2 "Compare currentBe and currentBs with credentialRecord.backupEligible … verify that
    # currentBe is set / is not set"
    require(
        data.has(BE) == credential.backup_eligible,
        "backup_eligibility",
        "The passkey's eligibility for backup has changed.",
    )
    if credential.algorithm in cose.PY_WEBAUTHN_ALGORITHMS:
        _verify_assertion(pending, rp, origin, credential, answer)
    else:
        key = cose.load_stored(credential.public_key)
        signed = answer.authenticator_data + hashlib.sha256(answer.client_data_json).digest()
        # §7.2 "Using credentialRecord.publicKey, verify that sig is a valid signature over the
        # binary concatenation of authData and hash"
        require(
            cose.verify(key, credential.algorithm, answer.signature, signed),
            "signature",
            "The signature does not verify.",
        )
    return VerifiedAuthentication(
        sign_count=data.sign_count,
        counter_regressed=_has_counter_regressed(data, credential, rp.policy),
        user_present=data.has(UP),
        user_verified=data.has(UV),
        backup_eligible=data.has(BE),
        backed_up=data.has(BS),
        backup_changed=data.has(BS) != credential.backed_up,
        origin=origin,
    )


def _judge_owner(
    pending: PendingAuthentication,
    credential: Credential | AllowedCredential,
    answer: AuthenticationAnswer,
) -> None:
    require(
        answer.credential_id == credential.credential_id,
        "credential_id",
        "The answer is about another passkey.",
    )
    user = pending.subject
    discoverable = user is ANYONE and not pending.allowed
    # §7.2 "If the user was not identified before the authentication ceremony was initiated,
    # verify that response.userHandle is present"
    require(
        not discoverable or answer.user_handle is not None,
        "user_handle",
        "The passkey says no user handle, so it can't sign in without a name.",
    )
    # §7.2 "If pkOptions.allowCredentials is not empty, verify that credential.id identifies one of
    # the public key credentials listed"; "If the user was identified before … verify that the
    # identified user account contains a credential record whose id equals"
    require(
        (discoverable or credential.id in pending.allowed)
        and credential.app_id == pending.app_id
        and (user is ANYONE or user.user_id == credential.user_id),
        "not_offered",
        "The passkey is not one of those that this sign-in allows.",
    )
    # §7.2 "verify that response.userHandle equals the user handle of the user account"
    require(
        answer.user_handle is None
        or user_handle_matches(answer.user_handle, credential.user_handle),
        "user_handle",
        "The passkey was made for another user.",
    )


def _verify_assertion(
    pending: PendingAuthentication,
    rp: RelyingParty,
    origin: str,
    credential: Credential | AllowedCredential,
    answer: AuthenticationAnswer,
) -> None:
    """Verify the signature by py_webauthn, which also applies its own rules once more.

    `origin` is the one that the app's list was found to have.
    """
    try:
        verify_authentication_response(
            credential=AuthenticationCredential(
                id=base64url(answer.credential_id),
                raw_id=answer.credential_id,
                response=AuthenticatorAssertionResponse(
                    client_data_json=answer.client_data_json,
                    authenticator_data=answer.authenticator_data,
                    signature=answer.signature,
                ),
            ),
            expected_challenge=pending.challenge,
            expected_rp_id=rp.rp_id,
            expected_origin=origin,
            credential_public_key=cose.for_py_webauthn(credential.public_key),
            credential_current_sign_count=0,
            require_user_verification=pending.user_verification == "required",
        )
    except InvalidAuthenticationResponse:
        raise refuse("signature", "The signature does not verify.") from None
    except PARSER_FAULTS:
        raise refuse("public_key", "The stored public key can't verify the signature.") from None


def _has_counter_regressed(
    data: AuthenticatorData, credential: Credential | AllowedCredential, policy: Policy
) -> bool:
    """True if the counter did not rise and the policy permits that.

    §7.2 "If authData.signCount is nonzero or credentialRecord.signCount is nonzero … less than or
    equal to: this is a signal that the authenticator may be cloned".
    """
    new, stored = data.sign_count, credential.sign_count
    regressed = (new, stored) != (0, 0) and new <= stored
    require(
        not regressed or policy.counter != "refuse",
        "counter",
        "The passkey's signature counter did not rise; it may have been copied.",
    )
    return regressed
