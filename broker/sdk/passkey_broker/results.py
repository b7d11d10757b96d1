"""Types that the client's methods take and return. All are frozen; times are aware `datetime`s.

An older broker may leave out a field that has a default.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

Purpose = Literal["register", "authenticate"]
Proof = Literal[
    "register", "authenticate", "register_second_factor", "authenticate_second_factor", "approve"
]
UserVerification = Literal["required", "preferred", "discouraged"]
Mediation = Literal["required", "conditional"]
Attachment = Literal["platform", "cross-platform", "any"]
SignalKind = Literal["update", "delete", "prune"]
UserStatus = Literal["active", "inactive", "pending"]
UserOrder = Literal[
    "created_at:ASC", "created_at:DESC", "updated_at:ASC", "updated_at:DESC", "id:ASC", "id:DESC"
]


@dataclass(frozen=True, slots=True)
class Receipt:
    """The result of a finished ceremony: the user, and the proof.

    Attributes:
        external_id: the backend's id of the user.
        user_id: the broker's id of the user.
        purpose: the purpose that the ceremony proves. A second factor or an approval is no sign-in,
            so each has a purpose of its own.
        passkey_id: the broker's id of the passkey, as in lists.
        credential_id: the authenticator's id of the passkey, base64url.
        origin: the origin of the page.
        attestation: "none", "claimed" or "verified" (to a root of the app's policy).
        authenticator_name_claimed: the name that the authenticator claims, unproved.
        at: the time when the ceremony finished.
        second_factor: True if the passkey is only a second factor.
        approval: the id of the approval.
        token: the receipt as a signed JSON Web Token, if `verify_nonce` requested it.
    """

    external_id: str
    user_id: str
    purpose: Proof
    passkey_id: str
    credential_id: str
    origin: str
    user_present: bool
    user_verified: bool
    backup_eligible: bool
    backed_up: bool
    backup_changed: bool
    counter_regressed: bool
    attestation: str
    authenticator_name_claimed: str | None
    at: datetime
    second_factor: bool = False
    approval: str | None = None
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Passkey:
    """One passkey of a user.

    Attributes:
        id: the broker's id, for `revoke_passkey`.
        credential_id: the authenticator's id, base64url.
        name: the name in lists.
        type: "passkey" (can be synced), "security_key" or "platform".
        backed_up: True if the passkey is synced.
        confirmed_at: None until the nonce of the registration is redeemed.
        last_used_at: None until the first sign-in.
        live: True if the passkey signs in; False until a required confirmation.
        second_factor: True if the passkey signs in only as a second factor.
        aaguid: the authenticator's model.
        attestation: as `Receipt.attestation`.
    """

    id: str
    credential_id: str
    name: str
    type: str
    use_count: int
    backed_up: bool
    confirmed_at: datetime | None
    created_at: datetime
    updated_at: datetime
    last_used_at: datetime | None
    live: bool = True
    second_factor: bool = False
    backup_eligible: bool = False
    transports: tuple[str, ...] = ()
    aaguid: str | None = None
    attestation: str | None = None
    authenticator_name_claimed: str | None = None


@dataclass(frozen=True, slots=True)
class OwnedPasskey:
    """One passkey of the app, of any user or of none.

    Attributes:
        external_id: the owner's id; None without an owner.
        nickname: the name in lists; None if not given.
        user_name: the name that the authenticator shows.
        second_factor: True if the passkey signs in only as a second factor.
        live: True if the passkey signs in.

    The other fields are as in `Passkey`.
    """

    id: str
    external_id: str | None
    credential_id: str
    nickname: str | None
    user_name: str
    type: str
    second_factor: bool
    live: bool
    backed_up: bool
    use_count: int
    created_at: datetime
    last_used_at: datetime | None
    user_id: str | None = None
    user_display_name: str | None = None
    confirmed_at: datetime | None = None
    updated_at: datetime | None = None
    backup_eligible: bool = False
    transports: tuple[str, ...] = ()
    aaguid: str | None = None
    attestation: str | None = None
    authenticator_name_claimed: str | None = None


@dataclass(frozen=True, slots=True)
class PasskeyPage:
    """A page of passkeys, and their total number."""

    passkeys: tuple[OwnedPasskey, ...]
    total: int


@dataclass(frozen=True, slots=True)
class ListedUser:
    """One user as in lists.

    `status` is "active", "inactive", or "pending" until the first passkey.
    """

    id: str
    external_id: str
    status: str
    login_count: int
    created_at: datetime
    updated_at: datetime
    last_login_at: datetime | None


@dataclass(frozen=True, slots=True)
class User(ListedUser):
    """One user of the app with all passkeys."""

    passkeys: tuple[Passkey, ...]


@dataclass(frozen=True, slots=True)
class UserPage:
    """A page of users, and their total number.

    Pass `created_before` (Unix seconds) to the next page, so that it leaves out users created
    meanwhile.
    """

    users: tuple[ListedUser, ...]
    total: int
    created_before: int


@dataclass(frozen=True, slots=True)
class ApprovalRequest:
    """The data that a user approves by signing.

    Args:
        id: your id, new in the app, 1 to 256 characters; the receipt carries it.
        data: any JSON value. The user signs its digest. A browser does not show it, so your page
            must.
    """

    id: str
    data: Any


@dataclass(frozen=True, slots=True)
class Approval:
    """An approval. `approved_at` is None until the user signs."""

    id: str
    data: Any
    created_at: datetime
    approved_at: datetime | None


@dataclass(frozen=True, slots=True)
class Event:
    """An entry of the app's audit log.

    Attributes:
        actor: an API key, a page, an operator.
        action: like "passkey.registered".
        result: "done" or "refused", which has a `reason`.
        external_id: None if the event concerns no user, or a deleted one.
        request_id: finds the request in the broker's log.
        payload: facts of some actions; None if there are none. Of "nonce.replayed" the first
            redemption: `first_at`, `first_request_id`, `first_actor`.
    """

    id: int
    at: datetime
    actor: str
    action: str
    result: str
    reason: str | None
    external_id: str | None
    user_id: str | None
    passkey_id: str | None
    request_id: str | None
    payload: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class EventPage:
    """A page of events, and their total number."""

    events: tuple[Event, ...]
    total: int


@dataclass(frozen=True, slots=True)
class EventBatch:
    """Events after a cursor, oldest first. Pass `next_cursor` to the next call."""

    events: tuple[Event, ...]
    next_cursor: str


@dataclass(frozen=True, slots=True)
class SignalTicket:
    """A one-time ticket for the page's `applySignals`, until `expires_at`.

    `missing` are the ids that are no passkeys of the app. `empty`: there is nothing to signal.
    """

    ticket: str = field(repr=False)
    expires_at: datetime
    missing: tuple[str, ...]
    empty: bool


@dataclass(frozen=True, slots=True)
class MailCode:
    """A mail code, without its secret and its digits.

    `metadata` is that of `create_mail_code`; `attempts_left` counts the remaining guesses.
    """

    id: str
    purpose: str
    email: str
    external_id: str | None
    metadata: dict[str, Any] | None
    created_at: datetime
    expires_at: datetime
    attempts_left: int


@dataclass(frozen=True, slots=True)
class MailMessage:
    """The body of the mail, which holds the digits. The backend sends the mail."""

    html: str = field(repr=False)
    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class NewMailCode(MailCode):
    """A new mail code: keep `id` and `secret` in the session, and mail the `message`.

    `code` holds the digits, for the mailbox alone.
    """

    secret: str = field(repr=False)
    code: str = field(repr=False)
    message: MailMessage


@dataclass(frozen=True, slots=True)
class App:
    """The app of the API key. `origins` are the origins of its pages."""

    id: str
    name: str
    rp_id: str
    origins: tuple[str, ...]
    created_at: datetime
