"""The words of the domain, as frozen types. No I/O, no clock, no third-party library.

Times are seconds since the epoch (float) in one-time values and timezone-aware `datetime` in durable ones; lives are whole
seconds. Ids (`RelyingParty.id`, `User.id`, `Credential.id`) are 24 ASCII alphanumerics. Byte strings are raw, never base64.
"""

from __future__ import annotations

import ipaddress
import re
import ssl
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from typing import Any, Literal, cast, get_args
from urllib.parse import SplitResult, urlsplit

from broker.errors import InvalidSetting

Purpose = Literal["register", "authenticate"]
UserVerification = Literal["required", "preferred", "discouraged"]
AttestationPreference = Literal["none", "indirect", "direct", "enterprise"]
Attachment = Literal["platform", "cross-platform"]
AttachmentPolicy = Literal["any", "platform", "cross-platform"]
Hint = Literal["security-key", "client-device", "hybrid"]
CounterPolicy = Literal["refuse", "flag"]
LiveAt = Literal["finish", "redemption"]
Trust = Literal["none", "claimed", "verified"]

# COSE algorithm identifiers, https://www.iana.org/assignments/cose — all that a policy may offer.
ALGORITHMS: dict[int, str] = {
    -7: "ES256",
    -8: "EdDSA",
    -257: "RS256",
    -35: "ES384",
    -36: "ES512",
    -53: "Ed448",
}

ID = re.compile(r"[A-Za-z0-9]{24}\Z")


@dataclass(frozen=True, slots=True)
class Policy:
    """What a relying party asks of ceremonies. Every key can be set with `broker app update --set key=value`."""

    user_verification: UserVerification = "required"
    attestation: AttestationPreference = "none"
    attestation_roots: tuple[
        str, ...
    ] = ()  # PEM certificates; a chain to one of them is reported as "verified"
    algorithms: tuple[int, ...] = (-7, -8, -257)
    hints: tuple[Hint, ...] = ()
    authenticator_attachment: AttachmentPolicy = "any"  # when the page names none
    allow_cross_origin: bool = False  # ceremonies inside a cross-origin iframe
    top_origins: tuple[str, ...] = ()  # which pages may embed it, exact
    counter: CounterPolicy = "refuse"  # a signature counter that went back
    live_at: LiveAt = "finish"  # when a new passkey starts to sign in
    transaction_life: int = 600  # seconds, at most 600
    ceremony_life: int = 300  # seconds, at most 600
    nonce_life: int = 60  # seconds, at most 600
    discoverable_limit: int = 10_000  # open ceremonies without a transaction
    max_passkeys: int = 100  # of one user; a registration begins below it

    @classmethod
    def load(cls, stored: Mapping[str, Any]) -> Policy:
        """Build from the JSON that `dump` made. Unknown keys (of newer code) are ignored, missing ones take the default."""
        known = {f.name for f in fields(cls)}
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in stored.items() if k in known
        }
        return cls(**values)

    def dump(self) -> dict[str, Any]:
        """Only what differs from the defaults, so that a default can change without a migration."""
        mine, default = asdict(self), asdict(Policy())
        return {k: list(v) if isinstance(v, tuple) else v for k, v in mine.items() if v != default[k]}

    def set(self, key: str, text: str) -> Policy:
        """Return a copy with `key` set from command-line `text`; lists are comma separated (PEM certificates concatenated).

        Raises:
            InvalidSetting: unknown key, or a value that the key can't take.
        """
        change: dict[str, Any] = {key: _policy_value(key, text)}
        return replace(self, **change)


_CHOICES: dict[str, tuple[str, ...]] = {
    "user_verification": get_args(UserVerification),
    "attestation": get_args(AttestationPreference),
    "authenticator_attachment": get_args(AttachmentPolicy),
    "counter": get_args(CounterPolicy),
    "live_at": get_args(LiveAt),
}
_LIMITS = {
    "transaction_life": (10, 600),
    "ceremony_life": (10, 600),
    "nonce_life": (5, 600),
    "discoverable_limit": (1, 1_000_000),
    "max_passkeys": (1, 1000),
}
_ALGORITHM_NUMBERS = {str(number): number for number in ALGORITHMS}
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.S)


def _policy_value(key: str, text: str) -> object:
    if choices := _CHOICES.get(key):
        if text not in choices:
            raise InvalidSetting(f"{key} is one of {', '.join(choices)}, not {text!r}.")
        return text
    if limits := _LIMITS.get(key):
        if not re.fullmatch(r"[0-9]{1,9}", text) or not limits[0] <= int(text) <= limits[1]:
            raise InvalidSetting(f"{key} is a whole number from {limits[0]} to {limits[1]}, not {text!r}.")
        return int(text)
    if key == "allow_cross_origin":
        if text not in ("true", "false"):
            raise InvalidSetting(f"{key} is true or false, not {text!r}.")
        return text == "true"
    if key == "attestation_roots":
        certificates = tuple(dict.fromkeys(_PEM.findall(text)))
        if (text.strip() and not certificates) or not all(map(_is_certificate, certificates)):
            raise InvalidSetting(f"{key} takes X.509 certificates in PEM, one after the other.")
        return certificates
    items = tuple(item.strip() for item in text.split(",") if item.strip())
    if key == "algorithms":
        by_name = {name: number for number, name in ALGORITHMS.items()}
        try:
            numbers = tuple(by_name.get(item) or _ALGORITHM_NUMBERS[item] for item in items)
        except KeyError:
            numbers = ()
        if not numbers or len(set(numbers)) != len(numbers):
            raise InvalidSetting(f"{key} is a list of {', '.join(by_name)}, not {text!r}.")
        return numbers
    if key == "hints":
        if any(item not in get_args(Hint) for item in items):
            raise InvalidSetting(f"{key} is a list of {', '.join(get_args(Hint))}, not {text!r}.")
        return tuple(dict.fromkeys(items))
    if key == "top_origins":
        return tuple(dict.fromkeys(web_origin(item) for item in items))
    raise InvalidSetting(
        f"There is no policy key {key!r}; there are {', '.join(f.name for f in fields(Policy))}."
    )


def _is_certificate(pem: str) -> bool:
    """Whether OpenSSL reads it: a root that can't be read would fail every registration, not this command."""
    if not pem.isascii():
        return False
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem)
    except (ssl.SSLError, ValueError):
        return False
    return True


@dataclass(frozen=True, slots=True)
class RelyingParty:
    """One RP ID with its origins and its policy: "app" in URLs and on the command line.

    `origins` are matched exactly against clientDataJSON: web origins (`https://example.com`) and app origins
    (`android:apk-key-hash:…`). `related_origins` are web origins outside the RP ID (WebAuthn L3 §5.11), accepted alike.
    """

    id: str
    name: str
    rp_id: str
    origins: tuple[str, ...]
    related_origins: tuple[str, ...] = ()
    policy: Policy = Policy()
    created_at: datetime | None = None  # None until it is stored

    @property
    def accepted_origins(self) -> tuple[str, ...]:
        """Every origin that a ceremony may come from."""
        return self.origins + self.related_origins

    @property
    def web_origins(self) -> tuple[str, ...]:
        """The origins that a browser may send in `Origin`, so those that CORS answers."""
        return tuple(o for o in self.accepted_origins if o.startswith("http"))

    def checked(self) -> RelyingParty:
        """Return itself, its origins in canonical form.

        Raises:
            InvalidSetting: no name, an RP ID that is no domain, no origin, an origin that is not on the RP ID or below it,
                plain http except on localhost. Source: WebAuthn L3 §5.1.3 step "RP ID is a registrable domain suffix of or is
                equal to the effective domain".
        """
        if not 1 <= len(self.name) <= 128:
            raise InvalidSetting("The name has 1 to 128 characters.")
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in self.name):
            raise InvalidSetting("The name has a control character.")
        rp_id = _domain(self.rp_id, "The RP ID")
        if not self.accepted_origins:
            raise InvalidSetting("An app needs at least one origin, like https://example.com.")
        related = tuple(dict.fromkeys(web_origin(origin) for origin in self.related_origins))
        origins = tuple(dict.fromkeys(self._origin(o, rp_id) for o in self.origins if not _is(o, related)))
        return replace(self, rp_id=rp_id, origins=origins, related_origins=related)

    @staticmethod
    def _origin(origin: str, rp_id: str) -> str:
        if origin.startswith("android:"):
            if not re.fullmatch(r"android:apk-key-hash(-sha256)?:[A-Za-z0-9_-]{43}", origin):
                raise InvalidSetting(f"{origin!r} is not android:apk-key-hash:<43 characters of base64url>.")
            return origin
        canonical = web_origin(origin)
        host = urlsplit(canonical).hostname or ""
        if host != rp_id and not host.endswith("." + rp_id):
            raise InvalidSetting(
                f"The host of {canonical} is neither {rp_id} nor below it; list it as a related origin or change the RP ID."
            )
        return canonical


def _is(origin: str, related: tuple[str, ...]) -> bool:
    """Whether an origin is given as a related one too: once is enough."""
    return not origin.startswith("android:") and web_origin(origin) in related


def _domain(text: str, what: str) -> str:
    """A lower-case domain name in ASCII form; `localhost` is one, an IP address is not (WebAuthn L3 §5.1.3: "valid domain").

    The standard library knows IDNA 2003, browsers the newer UTS #46, and the two lead some names to different domains (`straße.de`).
    So only names that IDNA 2003 leaves as they are are converted; of others we take the ASCII form, which means one domain.
    """
    domain = unicodedata.normalize("NFC", text).lower()
    if not domain.isascii():
        try:
            ascii_form = domain.encode("idna").decode("ascii")
            same = ascii_form.encode("ascii").decode("idna") == domain
        except UnicodeError:
            same = False
        if not same:
            raise InvalidSetting(f"{what} {text!r} can't be converted safely; give its ASCII form (xn--…).")
        domain = ascii_form
    # URL Standard §3.5 "ends in a number": such a host is an IPv4 address or nothing, also `127.1` and `0x7f000001`.
    if _is_ipv6(domain) or re.fullmatch(r"[0-9]+|0x[0-9a-f]*", domain.rpartition(".")[2]):
        raise InvalidSetting(f"{what} {text!r} is an IP address; passkeys need a domain.")
    label = r"(?!-)[a-z0-9-]{1,63}(?<!-)"
    if len(domain) > 253 or not re.fullmatch(rf"{label}(\.{label})*", domain):
        raise InvalidSetting(f"{what} {text!r} is not a domain.")
    return domain


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text.strip("[]"))
    except ValueError:
        return False
    return True


def is_origin(text: str) -> bool:
    """Whether `text` has the form of a web origin, `scheme://host[:port]`, also where no passkey could be used."""
    return _origin_parts(text) is not None


def _origin_parts(text: str) -> tuple[SplitResult, str, int | None] | None:
    """An origin's parts, host and port. None: a path, a query, credentials, another scheme, no host."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return None
    if (
        parts.scheme not in ("https", "http")
        or not parts.hostname
        or "@" in parts.netloc
        or parts.path not in ("", "/")
        or "?" in text
        or "#" in text
        or not text.isprintable()
    ):
        return None
    return parts, parts.hostname, port


def web_origin(text: str) -> str:
    """The canonical serialisation of a web origin: `https://host[:port]`, default port left out, host in lower case.

    Raises:
        InvalidSetting: not an origin (a path, a query, credentials), or plain http on anything but localhost.
    """
    found = _origin_parts(text)
    if found is None:
        raise InvalidSetting(f"{text!r} is not an origin like https://example.com.")
    parts, hostname, port = found
    host = _domain(hostname, "The host")
    if parts.scheme == "http" and host != "localhost" and not host.endswith(".localhost"):
        raise InvalidSetting(f"{text} is plain http, which browsers allow on localhost only.")
    default = {"https": 443, "http": 80}[parts.scheme]
    return f"{parts.scheme}://{host}" + (f":{port}" if port is not None and port != default else "")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key as lists show it; its secret is known to nobody."""

    id: str
    app_id: str
    hint: str
    name: str
    created_at: datetime
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, and was true when it was committed."""

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


@dataclass(frozen=True, slots=True)
class User:
    """One of the app's users: the caller's `external_id` (compared byte for byte) and our random `handle` (43 ASCII characters).

    `login_count` and `last_login_at` include passkeys revoked since.
    """

    id: str
    app_id: str
    external_id: str
    handle: str
    status: Literal["pending", "active"]
    login_count: int
    last_login_at: datetime | None
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class Credential:
    """A public key and what we know of it: a "passkey" to people.

    `public_key` is a COSE_Key (CBOR); `user_handle` the handle it was registered with, which the authenticator returns;
    `backup_eligible` is fixed at registration; `live` is false until redemption where the policy says so.
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
    confirmed_at: datetime | None
    created_at: datetime
    updated_at: datetime
    last_used_at: datetime | None
    use_count: int


@dataclass(frozen=True, slots=True)
class Transaction:
    """Permission for one ceremony of one user. Lives in the ephemeral store until finish takes it or `expires_at` passes."""

    app_id: str
    purpose: Purpose
    user_id: str
    external_id: str
    user_handle: str
    display_name: str  # of the passkey, for purpose "register"; else ""
    expires_at: float


@dataclass(frozen=True, slots=True)
class PendingRegistration:
    """A begun registration: what was offered, to compare the answer with. Only `finish_registration` takes one.

    `transaction` (digest of its id) is None where a keyed caller named the user.
    """

    app_id: str
    challenge: bytes
    transaction: bytes | None
    user_id: str
    external_id: str
    user_handle: str
    user_name: str
    user_display_name: str
    nickname: str
    user_verification: UserVerification
    algorithms: tuple[int, ...]
    begun_at: float
    expires_at: float


@dataclass(frozen=True, slots=True)
class PendingAuthentication:
    """A begun authentication. Without a user (`user_id` is None) it is discoverable: no transaction, nothing in `allowed`.

    `transaction` is also None where a keyed caller named the user. `allowed` holds the ids (`Credential.id`) of the passkeys offered.
    """

    app_id: str
    challenge: bytes
    transaction: bytes | None
    user_id: str | None
    allowed: tuple[str, ...]
    user_verification: UserVerification
    begun_at: float
    expires_at: float


Pending = PendingRegistration | PendingAuthentication


@dataclass(frozen=True, slots=True)
class RegistrationAnswer:
    """What `navigator.credentials.create()` returned, decoded from base64url and not yet judged."""

    credential_id: bytes
    client_data_json: bytes
    attestation_object: bytes
    transports: tuple[str, ...]
    attachment: Attachment | None


@dataclass(frozen=True, slots=True)
class AuthenticationAnswer:
    """What `navigator.credentials.get()` returned, decoded and not yet judged. `user_handle` stays text: see `ceremony`."""

    credential_id: bytes
    client_data_json: bytes
    authenticator_data: bytes
    signature: bytes
    user_handle: str | None


@dataclass(frozen=True, slots=True)
class VerifiedRegistration:
    """A registration that satisfies WebAuthn L3 §7.1: all that the new credential is made of."""

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


@dataclass(frozen=True, slots=True)
class VerifiedAuthentication:
    """An authentication that satisfies WebAuthn L3 §7.2. `counter_regressed` is true only where the policy flags it."""

    sign_count: int
    counter_regressed: bool
    user_present: bool
    user_verified: bool
    backup_eligible: bool
    backed_up: bool
    backup_changed: bool
    origin: str


@dataclass(frozen=True, slots=True)
class Used:
    """What a recorded sign-in changed."""

    counter_regressed: bool
    backup_changed: bool


@dataclass(frozen=True, slots=True)
class Receipt:
    """What redemption tells the backend: who, and how it was proved. `at` is when the ceremony finished."""

    external_id: str
    user_id: str
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
    at: float


@dataclass(frozen=True, slots=True)
class Redeemable:
    """What a nonce stands for: the receipt, and the transaction (digest of its id) that the caller may expect."""

    receipt: Receipt
    transaction: bytes | None
    expires_at: float


def fields_of(value: object) -> dict[str, Any]:
    """`asdict` for a flat slotted dataclass, without the deep copy."""
    return {f.name: getattr(value, f.name) for f in fields(cast(Any, value))}
