"""Domain types, all immutable. No I/O, no clock, no third-party library.

Types that every login creates several times are NamedTuples. The others are frozen dataclasses,
whose creation costs eight times as much.

Times are seconds since the epoch (float) in one-time values and timezone-aware `datetime` in
durable ones; lives are whole seconds. Ids (`RelyingParty.id`, `User.id`, `Credential.id`) are 24
ASCII alphanumerics. Byte strings are raw, never base64.
"""

from __future__ import annotations

import re
import unicodedata
from binascii import b2a_base64
from dataclasses import dataclass, fields, replace
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal, NamedTuple, cast
from urllib.parse import urlsplit

from broker.errors import InvalidRequest, InvalidSetting
from broker.model.ceremonies import (
    ANYONE,
    MAX_REFUSALS,
    AllowedCredential,
    Anyone,
    BegunCeremony,
    FinishKind,
    Named,
    Names,
    Opener,
    Pending,
    PendingAuthentication,
    PendingRegistration,
    Proof,
    Purpose,
    Subject,
    Transaction,
    Unowned,
    UserEntity,
    action_of,
    epoch_of,
    finish_kind,
    finish_kind_of,
    purpose_of,
)
from broker.model.links import (
    BeginLink,
    ByChallenge,
    ByHandle,
    ByTransaction,
    ByUser,
    ExpectedCeremony,
    ExpectedReceipt,
    FinishLink,
)
from broker.model.origins import domain, is_origin, page_origin, web_origin
from broker.model.policy import (
    ALGORITHMS,
    LONGEST_NONCE,
    NO_OPTIONS,
    OWNERLESS_HINT,
    POLICY_KEYS,
    RATE_KEYS,
    Attachment,
    AttachmentPolicy,
    AttestationPreference,
    CeremonyOptions,
    CounterPolicy,
    Hint,
    LiveAt,
    Mediation,
    Policy,
    PolicyKey,
    TokenAlgorithm,
    Trust,
    UserVerification,
    Verifications,
    is_weaker,
    verification,
)
from broker.model.values import UNLIMITED, Rate, rate_of

__all__ = [
    "ALGORITHMS",
    "ALL_SCOPES",
    "ANYONE",
    "ID",
    "IDEMPOTENCY_LIFE",
    "LONGEST_NONCE",
    "MAX_REFUSALS",
    "MAX_TEXT",
    "NO_OPTIONS",
    "OWNERLESS_HINT",
    "POLICY_KEYS",
    "RATE_KEYS",
    "UNLIMITED",
    "AllowedCredential",
    "Anyone",
    "ApiKey",
    "Approval",
    "ApprovalRecord",
    "Attachment",
    "AttachmentPolicy",
    "AttestationPreference",
    "AuditRow",
    "AuthenticationAnswer",
    "BeginLink",
    "BegunCeremony",
    "ByChallenge",
    "ByHandle",
    "ByTransaction",
    "ByUser",
    "Caller",
    "CeremonyOptions",
    "CounterPolicy",
    "Credential",
    "Event",
    "ExpectedCeremony",
    "ExpectedReceipt",
    "FinishKind",
    "FinishLink",
    "Hint",
    "Idempotency",
    "LiveAt",
    "Mediation",
    "Named",
    "Names",
    "Opener",
    "Owned",
    "Pending",
    "PendingAuthentication",
    "PendingRegistration",
    "Policy",
    "PolicyKey",
    "Proof",
    "Purpose",
    "Rate",
    "Receipt",
    "Redeemable",
    "RegistrationAnswer",
    "RelyingParty",
    "SignInOutcome",
    "Subject",
    "TokenAlgorithm",
    "Transaction",
    "Trust",
    "Unowned",
    "User",
    "UserEntity",
    "UserVerification",
    "Verifications",
    "VerifiedAuthentication",
    "VerifiedRegistration",
    "action_of",
    "as_dict",
    "base64url",
    "epoch_of",
    "finish_kind",
    "finish_kind_of",
    "is_origin",
    "is_weaker",
    "page_origin",
    "purpose_of",
    "rate_of",
    "validate_text",
    "verification",
    "web_origin",
]

IDEMPOTENCY_LIFE = 60  # seconds in which a repeated idempotent request gets the same answer
MAX_TEXT = 256  # characters of what a caller chooses: external ids, names
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
ID = re.compile(r"[A-Za-z0-9]{24}\Z")


@dataclass(frozen=True, slots=True)
class RelyingParty:
    """One RP ID with its origins and its policy: "app" in URLs and on the command line.

    `origins` are matched exactly against clientDataJSON: web origins (`https://example.com`) and
    app origins (`android:apk-key-hash:…`). `related_origins` are web origins outside the RP ID
    (WebAuthn L3 §5.11), accepted alike.
    """

    id: str
    name: str
    rp_id: str
    origins: tuple[str, ...]
    related_origins: tuple[str, ...] = ()
    policy: Policy = Policy()  # noqa: RUF009 - frozen, so one instance may be everybody's
    created_at: datetime | None = None  # None until it is stored
    updated_at: datetime | None = (
        None  # the version that an update replaces; None until it is stored
    )

    @property
    def accepted_origins(self) -> tuple[str, ...]:
        """Every origin that a ceremony may come from."""
        return self.origins + self.related_origins if self.related_origins else self.origins

    @property
    def web_origins(self) -> tuple[str, ...]:
        """The origins that a browser may send in `Origin`, so those that CORS answers."""
        return _web_origins(self.accepted_origins)

    def checked(self) -> RelyingParty:
        """Return itself, its origins in canonical form.

        Raises:
            InvalidSetting: no name, an RP ID that is no domain, no origin, an origin that is not on
                the RP ID or below it, plain http except on localhost; policy keys that contradict
                each other. Source: WebAuthn L3 §5.1.3 step "RP ID is a registrable domain suffix of
                or is equal to the effective domain".
        """
        if not 1 <= len(self.name) <= 128:
            raise InvalidSetting("The name has 1 to 128 characters.")
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in self.name):
            raise InvalidSetting("The name has a control character.")
        rp_id = domain(self.rp_id, "The RP ID")
        if not self.accepted_origins:
            raise InvalidSetting("An app needs at least one origin, like https://example.com.")
        related = tuple(dict.fromkeys(web_origin(origin) for origin in self.related_origins))
        origins = tuple(
            dict.fromkeys(self._origin(o, rp_id) for o in self.origins if not _is(o, related))
        )
        policy = self.policy.checked()
        return replace(self, rp_id=rp_id, origins=origins, related_origins=related, policy=policy)

    @staticmethod
    def _origin(origin: str, rp_id: str) -> str:
        if origin.startswith("android:"):
            if not re.fullmatch(r"android:apk-key-hash(-sha256)?:[A-Za-z0-9_-]{43}", origin):
                raise InvalidSetting(
                    f"{origin!r} is not android:apk-key-hash:<43 characters of base64url>."
                )
            return origin
        canonical = web_origin(origin)
        host = urlsplit(canonical).hostname or ""
        if host != rp_id and not host.endswith("." + rp_id):
            raise InvalidSetting(
                f"The host of {canonical} is neither {rp_id} nor below it; "
                "list it as a related origin or change the RP ID."
            )
        return canonical


@lru_cache(maxsize=1024)
def _web_origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(o for o in origins if o.startswith("http"))


def _is(origin: str, related: tuple[str, ...]) -> bool:
    """Whether an origin is given as a related one too: once is enough."""
    return not origin.startswith("android:") and web_origin(origin) in related


ALL_SCOPES = frozenset({"*"})  # of an API key: today each key has them all


class Caller(NamedTuple):
    """The caller of a verb: a backend with an API key of the app, or an anonymous caller, such as a
    page, with neither key nor scopes. `address` is an anonymous caller's network, for rate limits.
    """

    app: RelyingParty
    key_id: str | None = None
    scopes: frozenset[str] = frozenset()
    address: str = ""


class Idempotency(NamedTuple):
    """Makes a request idempotent for `IDEMPOTENCY_LIFE`. `key` is the caller's API key with its
    Idempotency-Key, so it is secret; `request` is the digest of the request's path and body.
    """

    key: str
    request: bytes


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key in a list. The store has no secret, only a digest."""

    id: str
    app_id: str
    hint: str
    name: str
    created_at: datetime
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True)
class Event:
    """An audit event of a change or a refusal. `payload` is JSON, if the action has a payload."""

    id: int
    at: datetime
    app_id: str
    actor: str
    action: str
    user_id: str | None
    passkey_id: str | None
    result: str
    reason: str | None
    request_id: str
    payload: dict[str, Any] | None
    address: str | None = None
    user_agent: str | None = None


@dataclass(frozen=True, slots=True)
class AuditRow:
    """An event with the external id of its user, if the user still exists."""

    event: Event
    external_id: str | None


@dataclass(frozen=True, slots=True)
class User:
    """One of the app's users: the caller's `external_id` (compared byte for byte) and our random
    `handle` (43 ASCII characters).

    `login_count` and `last_login_at` include passkeys revoked since. A disabled user neither signs
    in nor registers; the passkeys stay.
    """

    id: str
    app_id: str
    external_id: str
    handle: str
    status: Literal["pending", "active", "inactive"]  # inactive: disabled
    login_count: int
    last_login_at: datetime | None
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class Credential:
    """A public key and its properties: a "passkey" to people.

    `public_key` is a COSE_Key (CBOR); `user_handle` the handle it was registered with, which the
    authenticator returns; `backup_eligible` is fixed at registration; `live` is false until
    redemption where the policy says so. A `second_factor` signs in only in ceremonies that ask for
    one.
    """

    id: str
    app_id: str
    user_id: str
    credential_id: bytes
    user_handle: str
    public_key: bytes
    algorithm: int
    sign_count: int
    backup_eligible: bool
    backed_up: bool
    transports: tuple[str, ...]
    attachment: Attachment | None
    aaguid: str
    attestation_format: str
    attestation_trust: Trust
    user_name: str
    user_display_name: str
    nickname: str
    live: bool
    second_factor: bool
    confirmed_at: datetime | None
    created_at: datetime
    updated_at: datetime
    last_used_at: datetime | None
    use_count: int


@dataclass(frozen=True, slots=True)
class Owned:
    """A credential with its user's external id (None: ownerless) and epoch."""

    credential: Credential
    external_id: str | None
    epoch: int
    disabled: bool  # the user is


@dataclass(frozen=True, slots=True)
class Approval:
    """A payload that a user approves by signing: `digest` is part of the challenge, `identifier` is
    the caller's and unique in the app, `data` is JSON text for lists."""

    identifier: str
    data: str
    digest: bytes


@dataclass(frozen=True, slots=True)
class ApprovalRecord:
    """An approval in a list."""

    id: str
    user_id: str
    identifier: str
    data: str
    created_at: datetime
    approved_at: datetime | None


class RegistrationAnswer(NamedTuple):
    """The result of `navigator.credentials.create()`, decoded from base64url and not yet verified.

    `attachment` and `resident_key` (`credProps.rk`) are None if the page does not send them, as
    many pages do not.
    """

    credential_id: bytes
    client_data_json: bytes
    attestation_object: bytes
    transports: tuple[str, ...]
    attachment: Attachment | None
    resident_key: bool | None = None


class AuthenticationAnswer(NamedTuple):
    """The result of `navigator.credentials.get()`, decoded and not yet verified. `user_handle`
    stays text: see `ceremony`.
    """

    credential_id: bytes
    client_data_json: bytes
    authenticator_data: bytes
    signature: bytes
    user_handle: str | None


class VerifiedRegistration(NamedTuple):
    """A registration that satisfies WebAuthn L3 §7.1: the properties of the new credential."""

    credential_id: bytes
    public_key: bytes
    algorithm: int
    sign_count: int
    user_present: bool
    user_verified: bool
    backup_eligible: bool
    backed_up: bool
    transports: tuple[str, ...]
    attachment: Attachment | None
    aaguid: str
    attestation_format: str
    attestation_trust: Trust
    origin: str


class VerifiedAuthentication(NamedTuple):
    """An authentication that satisfies WebAuthn L3 §7.2. `counter_regressed` is true only where the
    policy flags it.
    """

    sign_count: int
    counter_regressed: bool
    user_present: bool
    user_verified: bool
    backup_eligible: bool
    backed_up: bool
    backup_changed: bool
    origin: str


class SignInOutcome(NamedTuple):
    """The changes of a recorded sign-in."""

    counter_regressed: bool
    backup_changed: bool


class Receipt(NamedTuple):
    """The result of a finished ceremony: the owner of the passkey, and how it was proved. `at` is
    when the ceremony finished.

    `second_factor`: the ceremony asked for no more than a second factor, whichever passkey
    answered.
    """

    subject: Named | Unowned
    purpose: Purpose
    passkey_id: str
    credential_id: bytes
    origin: str
    user_present: bool
    user_verified: bool
    backup_eligible: bool
    backed_up: bool
    backup_changed: bool
    counter_regressed: bool
    attestation: Trust
    authenticator_name_claimed: str | None
    second_factor: bool
    approval: str | None
    at: float

    @property
    def external_id(self) -> str | None:
        """The owner's external id, None for a passkey without an owner."""
        return self.subject.external_id if isinstance(self.subject, Named) else None

    @property
    def proof(self) -> Proof:
        """The proof: a second factor and an approval are no login."""
        if self.approval is not None:
            return "approve"
        if self.second_factor:
            return (
                "register_second_factor"
                if self.purpose == "register"
                else "authenticate_second_factor"
            )
        return self.purpose


class Redeemable(NamedTuple):
    """Content of a nonce: the receipt, the transaction (digest of its id) that the caller may
    expect, and the challenge whose verifier the caller must bring (None: none).
    """

    receipt: Receipt
    transaction: bytes | None
    expires_at: float
    binding_challenge: str | None = None


def as_dict(value: object) -> dict[str, Any]:
    """`asdict` for a flat slotted dataclass, without the deep copy."""
    return {f.name: getattr(value, f.name) for f in fields(cast("Any", value))}


def base64url(raw: bytes) -> str:
    """Unpadded base64url (RFC 4648 §5). The standard library's takes four calls more, and a login
    has a dozen.
    """
    return b2a_base64(raw, newline=False).rstrip(b"=").translate(_URL_SAFE).decode("ascii")


_URL_SAFE = bytes.maketrans(b"+/", b"-_")


def validate_text(value: str, name: str) -> None:
    """1 to 256 characters, none of them NUL (Postgres can't hold it, and C readers end there)."""
    if not value:
        raise InvalidRequest(f"{name} is empty; it has 1 to {MAX_TEXT} characters.")
    if len(value) > MAX_TEXT:
        raise InvalidRequest(f"{name} has {len(value)} characters; {MAX_TEXT} are allowed.")
    if _UNSTORABLE.search(value):
        raise InvalidRequest(
            f"{name} has a character that can't be stored (NUL or half of a surrogate pair)."
        )
