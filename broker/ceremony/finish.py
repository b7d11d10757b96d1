"""Finish of both ceremonies: all rules of WebAuthn L3 §7.1 and §7.2, in an order that asks the
cheap questions first.

Neither function knows stores or clocks; both take the pending ceremony as its own type, so a
registration can't be finished as a login. The verdict on the signature comes last, so that every
earlier refusal says the true reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Set

from webauthn import verify_authentication_response, verify_registration_response
from webauthn.helpers.cose import COSEAlgorithmIdentifier
from webauthn.helpers.exceptions import InvalidAuthenticationResponse
from webauthn.helpers.structs import (
    AuthenticationCredential,
    AuthenticatorAssertionResponse,
    AuthenticatorAttestationResponse,
    RegistrationCredential,
)

from broker.ceremony import attestation, cbor, keys
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
from broker.ceremony.tpm import MANUFACTURERS, tpm
from broker.ceremony.verdict import PARSER_FAULTS, refuse
from broker.model import (
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
    """Judge a registration (WebAuthn L3 §7.1). `tpm_manufacturers` is there for test data with
    made-up TPMs.

    Raises:
        CeremonyRefused: with one of `REASONS`; nothing else, whatever the answer holds.
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
    presence = pending.asked.mediation != "conditional"
    judge_authenticator_data(
        data, rp_id=rp.rp_id, verification=pending.user_verification, presence=presence
    )
    credential = data.attested
    if credential is None:
        raise refuse("malformed", "The authenticator data holds no credential.")
    if credential.credential_id != answer.credential_id:
        raise refuse("credential_id", "The credential id is not the one in the authenticator data.")
    algorithm = credential.members.get(3)
    # §7.1 "Verify that the alg parameter in the credential public key in authData matches the alg
    # attribute of one of the items"
    if type(algorithm) is not int or algorithm not in pending.algorithms:
        raise refuse("algorithm", "The public key is of an algorithm that was not offered.")
    _judge_selection(pending, answer)
    evidence = attestation.Evidence(
        data,
        credential,
        keys.load(credential.members),
        hashlib.sha256(answer.client_data_json).digest(),
    )
    trust = _judge_statement(
        form, statement, evidence, rp.policy, pending.begun_at, tpm_manufacturers
    )
    if algorithm in keys.PY_WEBAUTHN_ALGORITHMS and (
        form == "none" or set(statement) == {"alg", "sig"}
    ):
        _ask_py_webauthn_registration(pending, rp, answer)
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


def _judge_selection(pending: PendingRegistration, answer: RegistrationAnswer) -> None:
    """What the page says of the authenticator against `authenticatorSelection` of the options. What
    it doesn't say is not judged: no signature covers either, and SDKs and browsers leave them out.
    """
    # WebAuthn L3 §5.4.4 "authenticatorAttachment: If this member is present, eligible
    # authenticators are filtered to be only those"
    if pending.attachment is not None and answer.attachment not in (None, pending.attachment):
        raise refuse(
            "attachment",
            f"The options ask for a {pending.attachment} authenticator; this one is another.",
        )
    # §5.4.6 "required: The Relying Party requires a client-side discoverable credential", §10.1.3
    # "rk"
    if pending.discoverable and answer.resident_key is False:
        raise refuse(
            "resident_key",
            "The authenticator made no discoverable credential; use another authenticator.",
        )


def _judge_statement(
    form: str,
    statement: dict[object, object],
    about: attestation.Evidence,
    policy: Policy,
    at: float,
    manufacturers: Set[str],
) -> Trust:
    """§7.1 "Verify that attStmt is a correct attestation statement, conveying a valid attestation
    signature", and "assess the attestation trustworthiness" by the policy."""
    trust = _trust_of_statement(form, statement, about, policy, at, manufacturers)
    if policy.attestation_required != "none" and trust == "none":
        raise refuse(
            "attestation_missing",
            "The authenticator does not say what it is, and the app requires that.",
        )
    if policy.attestation_required == "verified" and trust != "verified":
        raise refuse(
            "attestation_unverified",
            "Nobody that the app trusts vouches for this authenticator; use another one.",
        )
    return trust


def _trust_of_statement(
    form: str,
    statement: dict[object, object],
    about: attestation.Evidence,
    policy: Policy,
    at: float,
    manufacturers: Set[str],
) -> Trust:
    if form == "none":
        if statement:
            raise refuse("attestation", 'An attestation of format "none" has a statement.')
        return "none"
    if form == "packed":
        chain = attestation.packed(statement, about)
        if chain is None:
            return "claimed"
    elif form == "fido-u2f":
        chain = attestation.fido_u2f(statement, about)
    elif form == "android-key":
        chain = attestation.android_key(statement, about)
    elif form == "apple":
        chain = attestation.apple(statement, about)
    elif form == "tpm":
        chain = tpm(statement, about, manufacturers)
    else:
        raise refuse("attestation", "The attestation is of a format that is not supported.")
    trust = attestation.chain_trust(*chain, policy, at)
    return "claimed" if statement.get("alg") == keys.RS1 else trust


def _ask_py_webauthn_registration(
    pending: PendingRegistration, rp: RelyingParty, answer: RegistrationAnswer
) -> None:
    """The second opinion, on formats that it judges without certificates: "none" and self
    attestation.
    """
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
            require_user_presence=pending.asked.mediation != "conditional",
            require_user_verification=pending.user_verification == "required",
            supported_pub_key_algs=[
                COSEAlgorithmIdentifier(a)
                for a in pending.algorithms
                if a in keys.PY_WEBAUTHN_ALGORITHMS
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
    """Judge an authentication with the stored `credential` that the answer names (WebAuthn L3
    §7.2).

    Raises:
        CeremonyRefused: with one of `REASONS`; nothing else, whatever the answer or the stored key
            holds.
    """
    _judge_owner(pending, credential, answer)
    origin = judge_client_data(
        answer.client_data_json, kind=GET, challenge=pending.challenge, rp=rp
    )
    data = read_authenticator_data(answer.authenticator_data)
    flags = data.flags
    # WebAuthn L3 §6.1 "For assertion signatures, the AT flag MUST NOT be set and the
    # attestedCredentialData MUST NOT be included"
    if flags & AT:
        raise refuse("malformed", "The authenticator data of a sign-in holds a credential.")
    judge_authenticator_data(data, rp_id=rp.rp_id, verification=pending.user_verification)
    # §7.2 "Compare currentBe and currentBs with credentialRecord.backupEligible … verify that
    # currentBe is set / is not set"
    eligible, backed_up = bool(flags & BE), bool(flags & BS)
    if eligible != credential.backup_eligible:
        raise refuse("backup_eligibility", "The passkey's eligibility for backup has changed.")
    if credential.algorithm in keys.PY_WEBAUTHN_ALGORITHMS:
        _ask_py_webauthn_authentication(pending, rp, origin, credential, answer)
    else:
        key = keys.load_stored(credential.public_key)
        signed = answer.authenticator_data + hashlib.sha256(answer.client_data_json).digest()
        # §7.2 "Using credentialRecord.publicKey, verify that sig is a valid signature over the
        # binary concatenation of authData and hash"
        if not keys.verify(key, credential.algorithm, answer.signature, signed):
            raise refuse("signature", "The signature does not verify.")
    return VerifiedAuthentication(
        sign_count=data.sign_count,
        counter_regressed=_judge_counter(data, credential, rp.policy),
        user_present=bool(flags & UP),
        user_verified=bool(flags & UV),
        backup_eligible=eligible,
        backed_up=backed_up,
        backup_changed=backed_up != credential.backed_up,
        origin=origin,
    )


def _judge_owner(
    pending: PendingAuthentication,
    credential: Credential | AllowedCredential,
    answer: AuthenticationAnswer,
) -> None:
    if answer.credential_id != credential.credential_id:
        raise refuse("credential_id", "The answer is about another passkey.")
    if pending.user_id is None and not pending.allowed:
        # §7.2 "If the user was not identified before the authentication ceremony was initiated,
        # verify that response.userHandle is present"
        if answer.user_handle is None:
            raise refuse(
                "user_handle",
                "The passkey says no user handle, so it can't sign in without a name.",
            )
    # §7.2 "If pkOptions.allowCredentials is not empty, verify that credential.id identifies one of
    # the public key credentials listed"
    elif credential.id not in pending.allowed:
        raise refuse("not_offered", "The passkey is not one of those that this sign-in allows.")
    # §7.2 "If the user was identified before … verify that the identified user account contains a
    # credential record whose id equals"
    if credential.app_id != pending.app_id or pending.user_id not in (None, credential.user_id):
        raise refuse("not_offered", "The passkey is not one of those that this sign-in allows.")
    # §7.2 "verify that response.userHandle equals the user handle of the user account"
    if answer.user_handle is not None and not user_handle_matches(
        answer.user_handle, credential.user_handle
    ):
        raise refuse("user_handle", "The passkey was made for another user.")


def _ask_py_webauthn_authentication(
    pending: PendingAuthentication,
    rp: RelyingParty,
    origin: str,
    credential: Credential | AllowedCredential,
    answer: AuthenticationAnswer,
) -> None:
    """The verdict on the signature, and the second opinion on the rest. `origin` is the one that
    the app's list was found to have.
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
            credential_public_key=keys.for_py_webauthn(credential.public_key),
            credential_current_sign_count=0,
            require_user_verification=pending.user_verification == "required",
        )
    except InvalidAuthenticationResponse:
        raise refuse("signature", "The signature does not verify.") from None
    except PARSER_FAULTS:
        raise refuse("public_key", "The stored public key can't verify the signature.") from None


def _judge_counter(
    data: AuthenticatorData, credential: Credential | AllowedCredential, policy: Policy
) -> bool:
    """Whether the counter went back, where the policy lets that pass.

    §7.2 "If authData.signCount is nonzero or credentialRecord.signCount is nonzero … less than or
    equal to: this is a signal that the authenticator may be cloned".
    """
    new, stored = data.sign_count, credential.sign_count
    if (new == 0 and stored == 0) or new > stored:
        return False
    if policy.counter == "refuse":
        raise refuse(
            "counter", "The passkey's signature counter did not rise; it may have been copied."
        )
    return True
