"""The policy of an app: its requirements of ceremonies, and the options of a single ceremony.

Each key is declared once, with its default, the values it takes and its meaning: a key of the core
as a field of `Policy`, a key of a dialect as a `PolicyKey` in the dialect's package. Postgres holds
both kinds in one JSON object.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Generic, Literal, NamedTuple, TypeVar, cast, get_args

from broker.errors import InvalidSetting, policy_hint
from broker.model.origins import web_origin
from broker.model.values import DEFAULT_RATE, RATE, SWITCH, Values, choice, items, whole

T = TypeVar("T")

UserVerification = Literal["required", "preferred", "discouraged"]
AttestationPreference = Literal["none", "indirect", "direct", "enterprise"]
AttestationRequired = Literal["none", "any", "verified"]
Attachment = Literal["platform", "cross-platform"]
AttachmentPolicy = Literal["any", "platform", "cross-platform"]
Hint = Literal["security-key", "client-device", "hybrid"]
CounterPolicy = Literal["refuse", "flag"]
LiveAt = Literal["finish", "redemption"]
Mediation = Literal["required", "conditional"]
TokenAlgorithm = Literal["RS256", "PS256", "ES256", "EdDSA"]
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


class CeremonyOptions(NamedTuple):
    """The caller's options of a single ceremony, within the app's policy.

    `life` is in seconds. `exclude` and `allow` hold ids of passkeys (`Credential.id`): those to
    exclude besides the user's own, and the only ones that may answer. With `second_factor` the
    ceremony is about second factors: a registration makes one, an authentication takes them too.
    With `unowned` a passkey that nobody owns yet may answer. `binding_challenge` is the unpadded
    base64url SHA-256 of the verifier that redemption asks for (S256 of RFC 7636 §4.2).
    """

    user_verification: UserVerification | None = None
    life: float | None = None
    exclude: tuple[str, ...] | None = None
    allow: tuple[str, ...] | None = None
    second_factor: bool = False
    unowned: bool = False
    mediation: Mediation = "required"
    binding_challenge: str | None = None


NO_OPTIONS = CeremonyOptions()


class Verifications(NamedTuple):
    """The part of a policy that decides about user verification."""

    user_verification: UserVerification
    second_factor_user_verification: UserVerification
    allow_weaker: bool


def verification(of: Policy | Verifications, options: CeremonyOptions) -> UserVerification:
    """The user verification of one ceremony: the policy's; stricter if asked; weaker only where the
    policy allows that.
    """
    base = of.second_factor_user_verification if options.second_factor else of.user_verification
    wish = options.user_verification
    return base if wish is None or (not of.allow_weaker and is_weaker(wish, base)) else wish


LONGEST_NONCE = 600  # seconds: the limit of a nonce's life


class PolicyKey(NamedTuple, Generic[T]):
    """The declaration of one key. The name of a dialect's key begins with the dialect's name."""

    name: str
    default: T
    values: Values[T]
    meaning: str


def _key(values: Values[Any], meaning: str) -> dict[str, Any]:
    """The metadata of a field that is a key of the core."""
    return {"values": values, "meaning": meaning}


def _algorithms(text: str) -> tuple[int, ...]:
    by_name = {name: number for number, name in ALGORITHMS.items()}
    known = by_name | {str(number): number for number in ALGORITHMS}
    given = items(text)
    numbers = tuple(dict.fromkeys(known[item] for item in given if item in known))
    if not numbers or len(numbers) < len(given):
        raise ValueError(f"a list of {', '.join(by_name)}")
    return numbers


def _hints(text: str) -> tuple[Hint, ...]:
    given = tuple(dict.fromkeys(items(text)))
    if not set(given) <= set(get_args(Hint)):
        raise ValueError(f"a list of {', '.join(get_args(Hint))}")
    return cast("tuple[Hint, ...]", given)


def _top_origins(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(web_origin(item) for item in items(text)))


def _certificates(text: str) -> tuple[str, ...]:
    """Certificates that OpenSSL can read: any other root would fail every registration."""
    found = tuple(dict.fromkeys(_PEM.findall(text)))
    try:
        if text.strip() and not (found and text.isascii()):
            raise ValueError
        for certificate in found:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=certificate)
    except (ssl.SSLError, ValueError):
        raise InvalidSetting(
            "attestation_roots takes X.509 certificates in PEM, one after the other."
        ) from None
    return found


_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.S)
_VERIFICATION: Values[UserVerification] = choice(*get_args(UserVerification))
_ATTACHMENT: Values[AttachmentPolicy] = choice(*get_args(AttachmentPolicy))
_CEREMONY_SECONDS = whole(10, 600)


@dataclass(frozen=True, slots=True)
class Policy:
    """A relying party's requirements of ceremonies. `broker app update --set key=value` sets a key,
    and `broker policy` lists the keys.
    """

    user_verification: UserVerification = field(
        default="required",
        metadata=_key(_VERIFICATION, "whether the authenticator must verify the person"),
    )
    attestation: AttestationPreference = field(
        default="none",
        metadata=_key(
            choice(*get_args(AttestationPreference)), "the attestation that browsers are asked for"
        ),
    )
    attestation_roots: tuple[str, ...] = field(
        default=(),
        metadata=_key(
            Values("PEM certificates, one after the other", _certificates),
            "a chain to one of them is reported as verified",
        ),
    )
    attestation_required: AttestationRequired = field(
        default="none",
        metadata=_key(
            choice(*get_args(AttestationRequired)), "what a registration must bring at least"
        ),
    )
    algorithms: tuple[int, ...] = field(
        default=(-7, -8, -257),
        metadata=_key(
            Values(f"a list of {','.join(ALGORITHMS.values())}", _algorithms),
            "of new passkeys, in order of preference",
        ),
    )
    hints: tuple[Hint, ...] = field(
        default=(),
        metadata=_key(
            Values(f"a list of {','.join(get_args(Hint))}", _hints),
            "which authenticators browsers offer first",
        ),
    )
    authenticator_attachment: AttachmentPolicy = field(
        default="any", metadata=_key(_ATTACHMENT, "where the page names none")
    )
    allow_cross_origin: bool = field(
        default=False, metadata=_key(SWITCH, "whether ceremonies run inside a cross-origin iframe")
    )
    top_origins: tuple[str, ...] = field(
        default=(),
        metadata=_key(Values("a list of origins", _top_origins), "the pages that may embed it"),
    )
    counter: CounterPolicy = field(
        default="refuse",
        metadata=_key(
            choice(*get_args(CounterPolicy)), "what to do about a signature counter that went back"
        ),
    )
    live_at: LiveAt = field(
        default="finish",
        metadata=_key(choice(*get_args(LiveAt)), "when a new passkey starts to sign in"),
    )
    transaction_life: int = field(
        default=600, metadata=_key(_CEREMONY_SECONDS, "seconds that a transaction lives")
    )
    ceremony_life: int = field(
        default=300,
        metadata=_key(
            _CEREMONY_SECONDS,
            "seconds that a begun ceremony lives, never past its transaction's end",
        ),
    )
    nonce_life: int = field(
        default=60, metadata=_key(whole(5, LONGEST_NONCE), "seconds that a nonce lives")
    )
    discoverable_limit: int = field(
        default=1_000_000,
        metadata=_key(
            whole(1, 1_000_000), "open ceremonies that pages began without a transaction"
        ),
    )
    max_passkeys: int = field(
        default=100,
        metadata=_key(whole(1, 1000), "passkeys of one user; a registration begins below it"),
    )
    binding_required: bool = field(
        default=False,
        metadata=_key(
            SWITCH, "whether each nonce must be bound to the browser (binding_challenge)"
        ),
    )
    allow_weaker: bool = field(
        default=False,
        metadata=_key(
            SWITCH, "whether a keyed call may ask for less user verification than user_verification"
        ),
    )
    second_factor_user_verification: UserVerification = field(
        default="preferred",
        metadata=_key(_VERIFICATION, "the same of a passkey that is only a second factor"),
    )
    second_factor_attachment: AttachmentPolicy = field(
        default="cross-platform",
        metadata=_key(_ATTACHMENT, "of such a passkey where nobody names one"),
    )
    passlock_open_registration: bool = field(
        default=False,
        metadata=_key(
            SWITCH,
            "whether pages of old Passlock clients may register passkeys that nobody owns yet",
        ),
    )
    decoys: bool = field(
        default=False,
        metadata=_key(
            SWITCH, "whether sign-ins of users who are unknown or have no passkey begin with decoys"
        ),
    )
    begin_rate: str = field(
        default=DEFAULT_RATE, metadata=_key(RATE, "begins of one client address")
    )
    discoverable_rate: str = field(
        default=DEFAULT_RATE,
        metadata=_key(RATE, "begins without a transaction of one client address"),
    )
    keyed_rate: str = field(
        default=DEFAULT_RATE,
        metadata=_key(RATE, "calls of one API key, but for finishes and redemptions"),
    )
    unknown_finish_rate: str = field(
        default=DEFAULT_RATE,
        metadata=_key(RATE, "finishes of one client address that found no ceremony"),
    )
    # The values of the dialects' keys. A key that is missing has its default.
    declared: Mapping[str, object] = field(default_factory=dict)

    def __getitem__(self, key: PolicyKey[T]) -> T:
        """The value of a declared key."""
        return cast("T", getattr(self, key.name, self.declared.get(key.name, key.default)))

    @property
    def ownerless_registration(self) -> bool:
        """True if a page may register a passkey that no user owns yet. Passlock's clients were the
        first with such pages, so the key has their name.
        """
        return self.passlock_open_registration

    @property
    def verifications(self) -> Verifications:
        """The keys that decide about the user verification of a ceremony."""
        return Verifications(
            self.user_verification, self.second_factor_user_verification, self.allow_weaker
        )

    def verification(self, options: CeremonyOptions) -> UserVerification:
        """The user verification of one ceremony."""
        return verification(self, options)

    @classmethod
    def load(cls, stored: Mapping[str, Any]) -> Policy:
        """Build from the JSON that `dump` made. A missing key takes its default. A key that the
        core does not know is a dialect's, or of newer code, and stays.
        """
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()
        }
        known = {key.name: values.pop(key.name) for key in POLICY_KEYS if key.name in values}
        return cls(**known, declared=values)

    def dump(self) -> dict[str, Any]:
        """The keys that differ from their defaults, so that a default can change without a
        migration.
        """
        values = {key.name: self[key] for key in POLICY_KEYS if self[key] != key.default}
        return {
            k: list(v) if isinstance(v, tuple) else v
            for k, v in (values | {**self.declared}).items()
        }

    def set(self, key: str, text: str, keys: Sequence[PolicyKey[Any]] | None = None) -> Policy:
        """Return a copy with `key` set from command-line `text`; lists are comma separated (PEM
        certificates concatenated). `keys` are those there are, the core's unless given.

        Raises:
            InvalidSetting: unknown key, or a value that the key can't take.
        """
        known = {found.name: found for found in keys or POLICY_KEYS}
        if key not in known:
            raise InvalidSetting(f"There is no policy key {key!r}; there are {', '.join(known)}.")
        try:
            value = known[key].values(text)
        except ValueError as fault:
            raise InvalidSetting(f"{key} is {fault}, not {text!r}.") from None
        stored = self.dump() | {key: value}
        if value == known[key].default:
            del stored[key]
        return Policy.load(stored)

    def checked(self) -> Policy:
        """Return itself.

        Raises:
            InvalidSetting: it has keys of which one makes what another asks for impossible.
        """
        if self.attestation_required != "none" and self.attestation == "none":
            raise InvalidSetting(
                f"attestation_required={self.attestation_required} needs attestation=direct (or "
                "indirect, enterprise): unless asked, browsers remove the attestation statement, "
                "and nobody could register."
            )
        if self.attestation_required == "verified" and not self.attestation_roots:
            raise InvalidSetting(
                "attestation_required=verified needs attestation_roots: without roots no "
                "attestation is verified, and nobody could register."
            )
        return self


POLICY_KEYS: tuple[PolicyKey[Any], ...] = tuple(
    PolicyKey(f.name, f.default, f.metadata["values"], f.metadata["meaning"])
    for f in fields(Policy)
    if f.metadata
)
RATE_KEYS: dict[str, PolicyKey[str]] = {key.name: key for key in POLICY_KEYS if key.values is RATE}
OWNERLESS_HINT = policy_hint("passlock_open_registration", "true")
_VERIFICATIONS: tuple[UserVerification, ...] = ("discouraged", "preferred", "required")


def is_weaker(wish: UserVerification, base: UserVerification) -> bool:
    """Whether `wish` asks for less than `base`."""
    return _VERIFICATIONS.index(wish) < _VERIFICATIONS.index(base)
