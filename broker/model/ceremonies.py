"""Ceremonies: whose they are, the transaction that permits one, and the pending ceremony.

A ceremony is finished by its opener. `Opener` and `FinishKind` are part of the name under which a
pending ceremony is stored, so the finish of another dialect, or of another kind of ceremony, finds
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple, TypeAlias

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
# The word of a dialect, and of whether its caller has a key, which a dialect declares. Part of the
# name under which a ceremony is stored, so that no other dialect's finish finds it.
Opener: TypeAlias = str

MAX_REFUSALS = 10  # refused finishes of one transaction; the last of them ends it


# -- whose ceremony it is --------------------------------------------------------------------------


class Named(NamedTuple):
    """A user that the app knows by an external id. `epoch` is the user's at that moment: what was
    begun in an earlier epoch neither adds nor uses a passkey.
    """

    user_id: str
    external_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Unowned:
    """A user without an external id, stored with the one passkey that has no owner yet."""

    user_id: str


class Anyone(Enum):
    """No user is named. Any user's passkey may answer; a new passkey has no owner."""

    ANYONE = "anyone"


ANYONE = Anyone.ANYONE
# One NamedTuple, one dataclass, one Enum: the codec of one-time values tells them apart by that.
Subject = Named | Unowned | Anyone


class Names(NamedTuple):
    """The names of a new passkey: authenticators show the first two, lists show `nickname`."""

    user_name: str
    user_display_name: str
    nickname: str = ""


class UserEntity(NamedTuple):
    """The user as a new passkey stores it (WebAuthn L3 §5.4.3): the user handle and the names."""

    handle: str
    user_name: str
    user_display_name: str
    nickname: str


# -- transactions and pending ceremonies -----------------------------------------------------------


class AllowedCredential(NamedTuple):
    """A passkey that a ceremony allows, with all that its verification needs: finish doesn't read
    it again.

    All but `sign_count` and `backed_up` never change. Those two are judged by the write that
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

    `entity` is the new passkey's user, None for purpose "authenticate". `offered` has the user's
    passkeys for purpose "authenticate", unless they are too many to store.
    """

    app_id: str
    purpose: Purpose
    subject: Subject
    entity: UserEntity | None
    offered: tuple[AllowedCredential, ...]
    options: CeremonyOptions
    expires_at: float

    @property
    def kind(self) -> FinishKind:
        """The finish that ends its ceremony."""
        return finish_kind(self.purpose, second_factor=self.options.second_factor)

    @property
    def to_look_up(self) -> bool:
        """True if the allowed credentials were too many to store, or are of several users, and must
        be queried.
        """
        named = isinstance(self.subject, Named) or self.options.allow is not None
        return self.purpose == "authenticate" and named and not self.offered


class BegunCeremony(NamedTuple):
    """The part of a pending ceremony that begin adds to its transaction.

    `life` (seconds), `verifications` and `algorithms` (of a registration) are the policy's at that
    moment. `allowed` is None where the transaction's `offered` say it. `attachment` is what the
    options of a registration ask for, None for any. `approval` is the identifier of an approval.
    """

    challenge: bytes
    begun_at: float
    life: int
    verifications: Verifications
    algorithms: tuple[int, ...] = ()
    allowed: tuple[str, ...] | None = None
    attachment: Attachment | None = None
    approval: str | None = None

    def pending(self, name: bytes | None, transaction: Transaction) -> Pending:
        """The whole pending ceremony. `name` is the digest of the transaction's id, None if the
        transaction is not stored.
        """
        if transaction.purpose == "register":
            return self.registration(name, transaction)
        return self.authentication(name, transaction)

    def registration(self, name: bytes | None, transaction: Transaction) -> PendingRegistration:
        """The pending ceremony of a transaction to register."""
        app_id, _, subject, entity, _, options, _ = transaction
        assert entity is not None
        assert not isinstance(subject, Anyone)
        return PendingRegistration(
            app_id,
            self.challenge,
            name,
            subject,
            entity,
            options,
            verification(self.verifications, options),
            self.algorithms,
            self.begun_at,
            self._ends(transaction),
            self.attachment,
        )

    def authentication(self, name: bytes | None, transaction: Transaction) -> PendingAuthentication:
        """The pending ceremony of a transaction to authenticate."""
        app_id, _, subject, _, offered, options, _ = transaction
        assert not isinstance(subject, Unowned)
        return PendingAuthentication(
            app_id,
            self.challenge,
            name,
            subject,
            tuple([o.id for o in offered]) if self.allowed is None else self.allowed,
            offered,
            self.approval,
            options,
            verification(self.verifications, options),
            self.begun_at,
            self._ends(transaction),
        )

    def _ends(self, transaction: Transaction) -> float:
        """A ceremony lives as long as its caller asked, within the policy, and never longer than
        its transaction.
        """
        wish = transaction.options.life
        life = self.life if wish is None else min(wish, self.life)
        return min(self.begun_at + life, transaction.expires_at)


class PendingRegistration(NamedTuple):
    """A begun registration, to compare the answer with. Only `finish_registration` takes one.

    `transaction` is the digest of its id, None for a ceremony without one.
    """

    app_id: str
    challenge: bytes
    transaction: bytes | None
    subject: Named | Unowned
    entity: UserEntity
    options: CeremonyOptions
    user_verification: UserVerification
    algorithms: tuple[int, ...]
    begun_at: float
    expires_at: float
    attachment: Attachment | None = None  # that the options ask for

    @property
    def discoverable(self) -> bool:
        """True if the options ask for a discoverable credential: for a passkey, not for a second
        factor.
        """
        return not self.options.second_factor


class PendingAuthentication(NamedTuple):
    """A begun authentication. `allowed` holds the ids (`Credential.id`) of the passkeys that may
    answer; `offered` those of them that need not be read again.

    For anyone it is discoverable: the owner of the answering passkey signs in, and an empty
    `allowed` means any. `approval` is the identifier of what the user approves by answering.
    """

    app_id: str
    challenge: bytes
    transaction: bytes | None
    subject: Named | Anyone
    allowed: tuple[str, ...]
    offered: tuple[AllowedCredential, ...]
    approval: str | None
    options: CeremonyOptions
    user_verification: UserVerification
    begun_at: float
    expires_at: float


Pending = PendingRegistration | PendingAuthentication


def epoch_of(subject: Subject) -> int:
    """The epoch of a ceremony's user. A user without an external id has one epoch."""
    return subject.epoch if isinstance(subject, Named) else 0


def action_of(pending: Pending) -> str:
    """The action of a finished ceremony in events: second factors and approvals have their own."""
    if isinstance(pending, PendingRegistration):
        return "second_factor.registered" if pending.options.second_factor else "passkey.registered"
    if pending.approval is not None:
        return "approval.signed"
    return "second_factor.used" if pending.options.second_factor else "passkey.used"


def purpose_of(pending: Pending) -> Purpose:
    """The purpose of a begun ceremony."""
    return "register" if isinstance(pending, PendingRegistration) else "authenticate"


def finish_kind_of(pending: Pending) -> FinishKind:
    """The finish that ends a begun ceremony."""
    approved = isinstance(pending, PendingAuthentication) and pending.approval is not None
    return finish_kind(
        purpose_of(pending), second_factor=pending.options.second_factor, approved=approved
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
