"""Types that the client's methods take and return. All are frozen; times are aware `datetime`s.

A field with a default is one that an older broker does not send.
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
    """Who finished a ceremony, and how it was proved.

    Attributes:
        external_id: the user, as the backend names them.
        user_id: the user, as the broker names them.
        purpose: what the ceremony proves. A second factor or an approval is no sign-in, so each has
            a purpose of its own.
        passkey_id: the passkey, as lists show it.
        credential_id: the authenticator's id of it, base64url.
        origin: the page's.
        attestation: "none", "claimed" or "verified" (to a root of the app's policy).
        authenticator_name_claimed: what the authenticator says of itself, unproved.
        at: when the ceremony finished.
        second_factor: whether the passkey is only a second factor.
        approval: id of what the user approved.
        token: the receipt as a signed JSON Web Token, where `verify_nonce` asked for one.
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
        credential_id: the authenticator's, base64url.
        name: what lists show.
        type: "passkey" (can be synced), "security_key" or "platform".
        backed_up: whether it is synced.
        confirmed_at: None until the nonce of its registration was redeemed.
        last_used_at: None while it has not been used.
        live: whether it signs in; False for one that awaits its confirmation.
        second_factor: whether it signs in only where a second factor is asked for.
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
    """One passkey of the app, whoever owns it.

    Attributes:
        external_id: its owner; None while nobody owns it.
        nickname: what lists show; None if not given.
        user_name: what the authenticator shows.
        second_factor: whether it signs in only where a second factor is asked for.
        live: whether it signs in already.

    The others are as in `Passkey`.
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
    """A page of passkeys, and how many there are in all."""

    passkeys: tuple[OwnedPasskey, ...]
    total: int


@dataclass(frozen=True, slots=True)
class User:
    """One user of the app with all passkeys.

    `status` is "active", "inactive", or "pending" until the first passkey.
    """

    id: str
    external_id: str
    status: str
    login_count: int
    created_at: datetime
    updated_at: datetime
    last_login_at: datetime | None
    passkeys: tuple[Passkey, ...]


@dataclass(frozen=True, slots=True)
class ListedUser:
    """One user as lists show it: a `User` without the passkeys."""

    id: str
    external_id: str
    status: str
    login_count: int
    created_at: datetime
    updated_at: datetime
    last_login_at: datetime | None


@dataclass(frozen=True, slots=True)
class UserPage:
    """A page of users, and how many there are in all.

    `created_before` (Unix seconds), given to the next page, keeps users who are created meanwhile
    out of it.
    """

    users: tuple[ListedUser, ...]
    total: int
    created_before: int


@dataclass(frozen=True, slots=True)
class ApprovalRequest:
    """What a user is asked to approve.

    Args:
        id: yours, new in the app, 1 to 256 characters; it stands on the receipt.
        data: any JSON value. The user signs its digest; a browser shows nothing of it, so your page
            must.
    """

    id: str
    data: Any


@dataclass(frozen=True, slots=True)
class Approval:
    """What a user was asked to approve; `approved_at` is None until the user signed it."""

    id: str
    data: Any
    created_at: datetime
    approved_at: datetime | None


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in the app.

    Attributes:
        actor: who did it: an API key, a page, an operator.
        action: like "passkey.registered".
        result: "done" or "refused"; then `reason` says why.
        external_id: None where it concerns no user, or one who was deleted since.
        request_id: finds the request in the broker's log.
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


@dataclass(frozen=True, slots=True)
class EventPage:
    """A page of events, and how many there are in all."""

    events: tuple[Event, ...]
    total: int


@dataclass(frozen=True, slots=True)
class EventBatch:
    """Events behind a cursor, oldest first. Keep `next_cursor` and give it to the next call."""

    events: tuple[Event, ...]
    next_cursor: str


@dataclass(frozen=True, slots=True)
class SignalTicket:
    """For the page's `applySignals`, once, until `expires_at`.

    `missing` are the ids that are no passkeys of the app; where it is `empty` there is nothing to
    tell.
    """

    ticket: str = field(repr=False)
    expires_at: datetime
    missing: tuple[str, ...]
    empty: bool


@dataclass(frozen=True, slots=True)
class MailCode:
    """A code that proves that somebody reads a mailbox, without its secret and its digits.

    `metadata` is what `create_mail_code` was given; `attempts_left` counts wrong guesses.
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
    """The body of the mail, which holds the digits. Sending it is the backend's part."""

    html: str = field(repr=False)
    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class NewMailCode(MailCode):
    """A mail code as it was made: keep `id` and `secret` in the session, mail the `message`.

    `code` are its digits: for the mailbox alone.
    """

    secret: str = field(repr=False)
    code: str = field(repr=False)
    message: MailMessage


@dataclass(frozen=True, slots=True)
class App:
    """The app that the API key belongs to. `origins` are those of its pages."""

    id: str
    name: str
    rp_id: str
    origins: tuple[str, ...]
    created_at: datetime
