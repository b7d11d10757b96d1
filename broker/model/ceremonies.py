"""Ceremonies in progress: the transaction that permits one, the pending ceremony, and who may
finish it.

A ceremony is finished by its opener. `Opener` and `FinishKind` are part of the name under which a
pending ceremony is stored, so the finish of another dialect, or of another kind of ceremony, finds
nothing.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from broker.model.policy import (
    Attachment,
    CeremonyOptions,
    Trust,
    UserVerification,
    Verifications,
    verification,
)

Purpose = Literal["register", "authenticate"]
# What a finished ceremony proves: a login is "authenticate" and nothing else.
Proof = Literal[
    "register", "authenticate", "register_second_factor", "authenticate_second_factor", "approve"
]
# Which finish ends a ceremony that its challenge finds; of one that a handle or a user finds, the
# purpose says it.
FinishKind = Proof | Literal["approve_second_factor"]
# Who begins a ceremony: a dialect, and whether with a key. Part of the name under which a ceremony
# is stored, so that no other dialect's finish finds it.
Opener = Literal["page", "keyed", "hanko", "hanko_keyless", "passlock", "propelauth"]

MAX_REFUSALS = 10  # refused finishes of one transaction; the last of them ends it


class AllowedCredential(NamedTuple):
    """A passkey that a ceremony offers, with what judging its answer needs: what was read when it
    was offered isn't read again.

    All but `sign_count` and `backed_up` never change; those two are judged by the write that
    records the sign-in, which also decides whether the passkey is still there and live.
    """

    id: str
    credential_id: bytes
    transports: tuple[str, ...]
    user_handle: str
    public_key: bytes
    algorithm: int
    sign_count: int
    backup_eligible: bool
    backed_up: bool
    attestation_trust: Trust
    aaguid: str
    user_id: str
    app_id: str


class Transaction(NamedTuple):
    """Permission for one ceremony. Lives in the ephemeral store until finish takes it or
    `expires_at` passes.

    `user_id` is None for an authentication of whoever owns the passkey that answers, and for a
    registration whose passkey nobody owns yet.
    """

    app_id: str
    purpose: Purpose
    user_id: str | None
    external_id: str | None
    user_handle: str
    user_name: str  # for purpose "register"; else "", as the next two
    user_display_name: str
    nickname: str
    offered: tuple[
        AllowedCredential, ...
    ]  # the user's passkeys for purpose "authenticate", unless they are very many
    asked: CeremonyOptions
    expires_at: float

    @property
    def to_look_up(self) -> bool:
        """Whether it doesn't say itself who may answer: those of very many, or of several users."""
        named = self.external_id is not None or self.asked.allow is not None
        return self.purpose == "authenticate" and named and not self.offered


def action_of(pending: PendingRegistration | PendingAuthentication) -> str:
    """What finishing a ceremony is called in events: a second factor and an approval have words of
    their own.
    """
    if isinstance(pending, PendingRegistration):
        return "second_factor.registered" if pending.asked.second_factor else "passkey.registered"
    if pending.approval is not None:
        return "approval.signed"
    return "second_factor.used" if pending.asked.second_factor else "passkey.used"


class BegunCeremony(NamedTuple):
    """What a begin adds to its transaction: the pending ceremony, but for what the transaction
    says.

    `life` (seconds), `verifications` and `algorithms` (of a registration) are the policy's at that
    moment. `allowed` is None where the transaction's `offered` say who may answer. `attachment` is
    what the options of a registration ask for, None where any will do.
    """

    challenge: bytes
    begun_at: float
    life: int
    verifications: Verifications
    algorithms: tuple[int, ...] = ()
    allowed: tuple[str, ...] | None = None
    attachment: Attachment | None = None

    def pending(
        self, name: bytes, transaction: Transaction
    ) -> PendingRegistration | PendingAuthentication:
        """The whole pending ceremony. `name` is the digest of the transaction's id."""
        asked = transaction.asked
        user_verification = verification(self.verifications, asked)
        life = self.life if asked.life is None else min(asked.life, self.life)
        ends = min(self.begun_at + life, transaction.expires_at)
        if transaction.purpose == "register":
            assert transaction.user_id is not None, (
                "a registration has a user, also where nobody owns it"
            )
            return PendingRegistration(
                transaction.app_id,
                self.challenge,
                name,
                transaction.user_id,
                transaction.external_id,
                transaction.user_handle,
                transaction.user_name,
                transaction.user_display_name,
                transaction.nickname,
                asked,
                user_verification,
                self.algorithms,
                self.begun_at,
                ends,
                self.attachment,
            )
        offered = transaction.offered
        return PendingAuthentication(
            transaction.app_id,
            self.challenge,
            name,
            transaction.user_id,
            transaction.external_id,
            tuple([o.id for o in offered]) if self.allowed is None else self.allowed,
            offered,
            None,
            asked,
            user_verification,
            self.begun_at,
            ends,
        )


class PendingRegistration(NamedTuple):
    """A begun registration: what was offered, to compare the answer with. Only
    `finish_registration` takes one.

    `transaction` (digest of its id) is None where a keyed caller named the user.
    """

    app_id: str
    challenge: bytes
    transaction: bytes | None
    user_id: str
    external_id: str | None
    user_handle: str
    user_name: str
    user_display_name: str
    nickname: str
    asked: CeremonyOptions
    user_verification: UserVerification
    algorithms: tuple[int, ...]
    begun_at: float
    expires_at: float
    attachment: Attachment | None = None  # that the options ask for

    @property
    def discoverable(self) -> bool:
        """Whether the options ask for a discoverable credential: for a passkey, not for a second
        factor.
        """
        return not self.asked.second_factor


class PendingAuthentication(NamedTuple):
    """A begun authentication. `allowed` holds the ids (`Credential.id`) of the passkeys that may
    answer; `offered` those of them that need not be read again.

    Without a user (`user_id` is None) it is discoverable: whoever owns the answering passkey signs
    in, and an empty `allowed` means any. `approval` is the identifier of what the user approves by
    answering.
    """

    app_id: str
    challenge: bytes
    transaction: bytes | None
    user_id: str | None
    external_id: str | None
    allowed: tuple[str, ...]
    offered: tuple[AllowedCredential, ...]
    approval: str | None
    asked: CeremonyOptions
    user_verification: UserVerification
    begun_at: float
    expires_at: float


Pending = PendingRegistration | PendingAuthentication


def purpose_of(pending: Pending) -> Purpose:
    """The purpose of a begun ceremony."""
    return "register" if isinstance(pending, PendingRegistration) else "authenticate"


def finish_kind_of(pending: Pending) -> FinishKind:
    """The finish of a begun ceremony that its challenge finds."""
    approved = isinstance(pending, PendingAuthentication) and pending.approval is not None
    return finish_kind(
        purpose_of(pending), second_factor=pending.asked.second_factor, approved=approved
    )


def finish_kind(purpose: Purpose, *, second_factor: bool, approved: bool = False) -> FinishKind:
    """The finish that ends a ceremony of this purpose, about a second factor or an approval or
    neither.
    """
    if approved:
        return "approve_second_factor" if second_factor else "approve"
    if second_factor:
        return "register_second_factor" if purpose == "register" else "authenticate_second_factor"
    return purpose
