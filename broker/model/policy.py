"""What an app asks of its ceremonies, and what a caller may ask of one of them."""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, get_args

from broker.errors import InvalidSetting
from broker.model.origins import web_origin

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


@dataclass(frozen=True, slots=True)
class CeremonyOptions:
    """What the caller asks of one ceremony, beyond the app's policy and within it.

    `life` is in seconds. `exclude` and `allow` hold ids of passkeys (`Credential.id`): those to
    exclude besides the user's own, and the only ones that may answer. With `second_factor` the
    ceremony is about second factors: a registration makes one, an authentication takes them too.
    With `ownerless` a passkey that nobody owns yet may answer.
    """

    user_verification: UserVerification | None = None
    life: float | None = None
    exclude: tuple[str, ...] | None = None
    allow: tuple[str, ...] | None = None
    second_factor: bool = False
    ownerless: bool = False
    mediation: Mediation = "required"


NO_OPTIONS = CeremonyOptions()


class Verifications(NamedTuple):
    """The part of a policy that decides about user verification."""

    user_verification: UserVerification
    second_factor_user_verification: UserVerification
    allow_weaker: bool


def verification(of: Policy | Verifications, asked: CeremonyOptions) -> UserVerification:
    """The user verification of one ceremony: the policy's; stricter if asked; weaker only where the
    policy allows that.
    """
    base = of.second_factor_user_verification if asked.second_factor else of.user_verification
    wish = asked.user_verification
    return base if wish is None or (not of.allow_weaker and is_weaker(wish, base)) else wish


LONGEST_NONCE = 600  # seconds that a nonce lives at most, whoever asks for how long


def _key(meaning: str, values: str = "") -> dict[str, str]:
    """What a key of a policy means; `values` in words where no table below has them."""
    return {"meaning": meaning, "values": values}


@dataclass(frozen=True, slots=True)
class Policy:
    """What a relying party asks of ceremonies. Every key can be set with `broker app update --set
    key=value`; `broker policy` lists them.
    """

    user_verification: UserVerification = field(
        default="required", metadata=_key("whether the authenticator must verify the person")
    )
    attestation: AttestationPreference = field(
        default="none", metadata=_key("the attestation that browsers are asked for")
    )
    attestation_roots: tuple[str, ...] = field(
        default=(),
        metadata=_key(
            "a chain to one of them is reported as verified",
            "PEM certificates, one after the other",
        ),
    )
    attestation_required: AttestationRequired = field(
        default="none", metadata=_key("what a registration must bring at least")
    )
    algorithms: tuple[int, ...] = field(
        default=(-7, -8, -257),
        metadata=_key(
            "of new passkeys, in order of preference", f"a list of {','.join(ALGORITHMS.values())}"
        ),
    )
    hints: tuple[Hint, ...] = field(
        default=(),
        metadata=_key(
            "which authenticators browsers offer first", f"a list of {','.join(get_args(Hint))}"
        ),
    )
    authenticator_attachment: AttachmentPolicy = field(
        default="any", metadata=_key("where the page names none")
    )
    allow_cross_origin: bool = field(
        default=False, metadata=_key("whether ceremonies run inside a cross-origin iframe")
    )
    top_origins: tuple[str, ...] = field(
        default=(), metadata=_key("the pages that may embed it", "a list of origins")
    )
    counter: CounterPolicy = field(
        default="refuse", metadata=_key("what to do about a signature counter that went back")
    )
    live_at: LiveAt = field(default="finish", metadata=_key("when a new passkey starts to sign in"))
    transaction_life: int = field(default=600, metadata=_key("seconds that a transaction lives"))
    ceremony_life: int = field(
        default=300,
        metadata=_key("seconds that a begun ceremony lives, never past its transaction's end"),
    )
    nonce_life: int = field(default=60, metadata=_key("seconds that a nonce lives"))
    discoverable_limit: int = field(
        default=10_000, metadata=_key("open ceremonies that pages began without a transaction")
    )
    max_passkeys: int = field(
        default=100, metadata=_key("passkeys of one user; a registration begins below it")
    )
    allow_weaker: bool = field(
        default=False,
        metadata=_key(
            "whether a keyed call may ask for less user verification than user_verification"
        ),
    )
    second_factor_user_verification: UserVerification = field(
        default="preferred", metadata=_key("the same of a passkey that is only a second factor")
    )
    second_factor_attachment: AttachmentPolicy = field(
        default="cross-platform", metadata=_key("of such a passkey where nobody names one")
    )
    hanko_algorithm: TokenAlgorithm = field(
        default="RS256", metadata=_key("signs the tokens of the Hanko API")
    )
    passlock_open_registration: bool = field(
        default=False,
        metadata=_key(
            "whether pages of old Passlock clients may register passkeys that nobody owns yet"
        ),
    )

    @property
    def verifications(self) -> Verifications:
        """What decides about the user verification of one ceremony."""
        return Verifications(
            self.user_verification, self.second_factor_user_verification, self.allow_weaker
        )

    def verification(self, asked: CeremonyOptions) -> UserVerification:
        """The user verification of one ceremony."""
        return verification(self, asked)

    @classmethod
    def load(cls, stored: Mapping[str, Any]) -> Policy:
        """Build from the JSON that `dump` made. Unknown keys (of newer code) are ignored, missing
        ones take the default.
        """
        known = {f.name for f in fields(cls)}
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in stored.items() if k in known
        }
        return cls(**values)

    def dump(self) -> dict[str, Any]:
        """Only what differs from the defaults, so that a default can change without a migration."""
        mine, default = asdict(self), asdict(Policy())
        return {
            k: list(v) if isinstance(v, tuple) else v for k, v in mine.items() if v != default[k]
        }

    def set(self, key: str, text: str) -> Policy:
        """Return a copy with `key` set from command-line `text`; lists are comma separated (PEM
        certificates concatenated).

        Raises:
            InvalidSetting: unknown key, or a value that the key can't take.
        """
        change: dict[str, Any] = {key: _policy_value(key, text)}
        return replace(self, **change)

    def checked(self) -> Policy:
        """Return itself.

        Raises:
            InvalidSetting: it has keys of which one makes what another asks for impossible.
        """
        if self.attestation_required != "none" and self.attestation == "none":
            raise InvalidSetting(
                f"attestation_required={self.attestation_required} needs attestation=direct (or indirect, "
                "enterprise): unless asked, browsers remove the attestation statement, and nobody could register."
            )
        if self.attestation_required == "verified" and not self.attestation_roots:
            raise InvalidSetting(
                "attestation_required=verified needs attestation_roots: without roots no attestation is "
                "verified, and nobody could register."
            )
        return self


_CHOICES: dict[str, tuple[str, ...]] = {
    "user_verification": get_args(UserVerification),
    "attestation": get_args(AttestationPreference),
    "attestation_required": get_args(AttestationRequired),
    "authenticator_attachment": get_args(AttachmentPolicy),
    "counter": get_args(CounterPolicy),
    "live_at": get_args(LiveAt),
    "second_factor_user_verification": get_args(UserVerification),
    "second_factor_attachment": get_args(AttachmentPolicy),
    "hanko_algorithm": get_args(TokenAlgorithm),
}
_SWITCHES = frozenset({"allow_cross_origin", "allow_weaker", "passlock_open_registration"})
_VERIFICATIONS: tuple[UserVerification, ...] = ("discouraged", "preferred", "required")
_LIMITS = {
    "transaction_life": (10, 600),
    "ceremony_life": (10, 600),
    "nonce_life": (5, 600),
    "discoverable_limit": (1, 1_000_000),
    "max_passkeys": (1, 1000),
}
_ALGORITHM_NUMBERS = {str(number): number for number in ALGORITHMS}
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.S)


class PolicyKey(NamedTuple):
    """A key of a policy, for people: what it takes, its default and what it means."""

    key: str
    values: str
    default: object
    meaning: str


def policy_keys() -> list[PolicyKey]:
    """Every key, in the order of `Policy`."""
    return [
        PolicyKey(f.name, f.metadata["values"] or _values(f.name), f.default, f.metadata["meaning"])
        for f in fields(Policy)
    ]


def _values(key: str) -> str:
    if limits := _LIMITS.get(key):
        return f"{limits[0]} to {limits[1]}"
    return ", ".join(_CHOICES.get(key, ("true", "false")))


def _policy_value(key: str, text: str) -> object:
    if choices := _CHOICES.get(key):
        if text not in choices:
            raise InvalidSetting(f"{key} is one of {', '.join(choices)}, not {text!r}.")
        return text
    if limits := _LIMITS.get(key):
        if not re.fullmatch(r"[0-9]{1,9}", text) or not limits[0] <= int(text) <= limits[1]:
            raise InvalidSetting(
                f"{key} is a whole number from {limits[0]} to {limits[1]}, not {text!r}."
            )
        return int(text)
    if key in _SWITCHES:
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
    """Whether OpenSSL reads it: a root that can't be read would fail every registration, not this
    command.
    """
    if not pem.isascii():
        return False
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem)
    except (ssl.SSLError, ValueError):
        return False
    return True


def is_weaker(wish: UserVerification, base: UserVerification) -> bool:
    """Whether `wish` asks for less than `base`."""
    return _VERIFICATIONS.index(wish) < _VERIFICATIONS.index(base)
